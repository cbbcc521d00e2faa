"""Inputs: which clips a command line means, their captions, and pixels cut to the size that a model takes."""

from __future__ import annotations

import glob
import hashlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import PIL
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

from vgen import video, world
from vgen.captions import beside, kept, read_captions
from vgen.errors import UsageError
from vgen.probe import BadClip, Probe, probe

VIDEOS = {".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".ts", ".mts", ".m2ts", ".mpg", ".mpeg"}
VIDEOS |= {".flv", ".wmv", ".3gp", ".ogv", ".gif"}
IMAGES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
WORLD_FPS = Fraction(8)
_WORLD_CLIP = re.compile(r"world(-simple|-hollow|-full)?:(\d+)/(\d+)")
_WORLD = re.compile(r"world(-simple|-hollow|-full)?:(\d+)(?::(\d+))?")

Size = tuple[int, int, int]  # frames, height, width


@dataclass(frozen=True)
class World:
    """One clip of the procedural world."""

    seed: int
    index: int
    variety: world.Variety = "plain"


@dataclass(frozen=True)
class Item:
    """One input, before it is read. `path` of a clip of the world is its name: world:SEED/INDEX.

    Of a video, `frames` are the first and the end of those that are meant, where not all are. `facts` is what a
    manifest tells of it, kept with its latents.
    """

    path: Path
    captions: tuple[str, ...] = ()
    kind: Literal["video", "image", "world"] = "video"
    world: World | None = None
    frames: tuple[int, int] | None = None
    facts: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def name(self) -> str:
        """The path, and the frames that are meant."""
        return f"{self.path}[{self.frames[0]}:{self.frames[1]}]" if self.frames else str(self.path)

    def sha256(self) -> str:
        """Hash of the content of the file, in hex; of name and first frame for a clip of the world. Raises BadClip."""
        if self.world:
            first = world.clip(self.world.seed, self.world.index, 1, 32, 32, variety=self.world.variety)[0]
            drawn = first.add(1).mul(127.5).round().to(torch.uint8).numpy().tobytes()
            return hashlib.sha256(str(self.path).encode() + drawn).hexdigest()
        return _hashed(self.path, *_stamp(self.path))


class Seen(NamedTuple):
    """What is known of a clip before its frames are read: the hash of its content, and of a video its probe.

    `file` is the hash of the whole file where only some of its frames are meant.
    """

    sha256: str
    probe: Probe | None = None
    file: str = ""


class Loaded(NamedTuple):
    """Pixels (3, T, H, W) in [-1, 1], where they came from, and other streams of the clip (the world's `mask`)."""

    pixels: Tensor
    record: dict[str, Any]
    extra: dict[str, Tensor]


def discover(inputs: Sequence[str], captions: Path | None = None) -> list[Item]:
    """What files, folders, globs and 'world[-VARIETY]:COUNT[:SEED]' name: clips and images, each once, in order.

    Folders are searched to the bottom, sorted, without hidden files. Captions are the rows of the file `captions` (CSV
    or JSONL, columns `file` and `caption`, any number of rows for a file), else the lines of NAME.txt beside a clip.
    With `captions` and no inputs, its files are the inputs. Raises UsageError for a name that nothing answers to.
    """
    folders = [Path(text) for text in inputs if Path(text).is_dir()]
    told = read_captions(captions, folders) if captions else {}
    found: dict[tuple[Path, Any], Item] = {}
    for item in (one for text in inputs for one in _named(text)):
        found.setdefault((item.path if item.world else item.path.resolve(), item.frames), item)
    if captions and not inputs:
        found = {(path, None): _file(path) for path in told}
    items = [
        item if item.world else replace(item, captions=told.get(path) or item.captions or beside(item.path))
        for (path, _), item in found.items()
    ]
    if not items:
        raise UsageError("No clips are given.", f"Name files or folders with {', '.join(sorted(VIDEOS | IMAGES))}.")
    return items


def look(item: Item) -> Seen:
    """Probe and hash a clip, for `bucket` and `load` not to do it each. Raises BadClip."""
    told = _probed(item.path, *_stamp(item.path)) if item.kind == "video" else None
    whole = item.sha256()
    if told is None or item.frames is None:
        return Seen(whole, told)
    start, stop = item.frames
    if not 0 <= start < stop <= len(told.pts):
        raise BadClip(item.path, f"it has {len(told.pts)} frames; {start} to {stop} are asked for")
    return Seen(hashlib.sha256(f"{whole}/{start}/{stop}".encode()).hexdigest(), told, whole)


def _stamp(path: Path) -> tuple[int, int]:
    """Size and time of change of a file; nothing where there is none."""
    try:
        told = path.stat()
    except OSError:
        return 0, 0
    return told.st_size, told.st_mtime_ns


@lru_cache(maxsize=4)  # a manifest names many parts of one file in a row
def _probed(path: Path, size: int, changed: int) -> Probe:
    return probe(path)


@lru_cache(maxsize=4)
def _hashed(path: Path, size: int, changed: int) -> str:
    """The hash of a file. Raises BadClip."""
    try:
        return video.file_sha256(path)
    except OSError as error:
        raise BadClip(path, f"it cannot be read ({error.strerror})") from error


def _part(item: Item, told: Probe) -> tuple[Probe, float]:
    """A probe that ends where the item does, for its times alone, and the item's start in seconds."""
    if item.frames is None:
        return told, 0.0
    start, stop = item.frames
    end = told.pts[stop] if stop < len(told.pts) else told.pts[0] + told.duration
    return replace(told, pts=told.pts[:stop], duration=end - told.pts[0]), float(told.pts[start] - told.pts[0])


def load(
    item: Item,
    num_frames: int,
    height: int,
    width: int,
    fps: Fraction | float | None = None,
    *,
    whole: bool = False,
    seen: Seen | None = None,
) -> Loaded:
    """The first frames of a clip, resized to cover height x width at its own aspect ratio and cut at the centre.

    `fps` is the rate to read at; the clip's own when None. An image is a clip of one frame. Raises BadClip; with
    `whole`, also for damage behind those frames (see `video.read`).
    """
    seen = seen or look(item)
    if item.world:
        return _load_world(item, item.world, seen, num_frames, height, width, fps)
    if item.kind == "image":
        if num_frames != 1:
            raise BadClip(item.path, f"it has 1 frame, {num_frames} are needed")
        frames, record = _open_image(item, seen)
        pts, rate, aspect = [Fraction(0)], Fraction(fps or 1), Fraction(1)
    else:
        told = seen.probe or probe(item.path)
        clip = _read_video(item, seen, told, num_frames, fps, whole)
        frames, record, aspect = clip.frames, clip.source, told.pixel_aspect
        pts, rate = list(clip.pts), clip.fps
    pixels, fit = cover(frames, height, width, aspect)
    return Loaded(pixels, {**_record(record, pts, rate), **fit}, {})


def load_file(
    path: Path | str, num_frames: int, height: int, width: int, fps: Fraction | float | None = None
) -> tuple[Tensor, dict[str, Any]]:
    """Pixels (3, T, H, W) in [-1, 1] and record of one file, as `load` gives them. Raises BadClip."""
    loaded = load(_file(Path(path)), num_frames, height, width, fps)
    return loaded.pixels, loaded.record


def bucket(item: Item, sizes: Sequence[Size], fps: Fraction | float | None = None, *, seen: Seen | None = None) -> Size:
    """The size, of those allowed, that fits a clip: of those that it has frames for, the nearest in aspect ratio.

    Among equals the one with most frames wins, then the largest. Raises BadClip where the clip is too short for all.
    """
    if item.world:
        return max(sizes, key=math.prod)
    if item.kind == "image":
        with _opened(item.path) as image:
            count, ratio = 1, image.width / image.height
            if image.getexif().get(0x0112, 1) >= 5:  # orientation: on its side
                ratio = 1 / ratio
    else:
        told = (seen and seen.probe) or probe(item.path)
        part, start = _part(item, told)
        count, ratio = video.available(part, fps, start=start), _ratio(told)
    fitting = [size for size in sizes if size[0] <= count]
    if not fitting:
        rate = f" at {float(fps):g} fps" if fps and item.kind == "video" else ""
        have = f"{count} frame" + "s" * (count != 1)
        raise BadClip(item.path, f"it has {have}{rate}, {min(size[0] for size in sizes)} are needed")
    return min(fitting, key=lambda s: (round(abs(math.log(s[2] / s[1] / ratio)), 6), -s[0], -s[1] * s[2]))


def _ratio(told: Probe) -> float:
    """Width to height as shown."""
    return float(told.width * told.pixel_aspect / told.height)


# Names


def _file(path: Path) -> Item:
    """A file by its extension; what is no known image is tried as a video."""
    return Item(path, kind="image" if path.suffix.lower() in IMAGES else "video")


def _named(text: str) -> Iterator[Item]:
    """The inputs that one argument names. Raises UsageError where there are none."""
    spec = _WORLD.fullmatch(text)
    path = Path(text)
    if spec:
        yield from _of_world((spec[1] or "-plain")[1:], int(spec[2]), int(spec[3] or 0))
    elif path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix.lower() in VIDEOS | IMAGES and _visible(p, path))
        if not files:
            known = ", ".join(sorted(VIDEOS | IMAGES))
            raise UsageError(f"The folder '{text}' holds no clips.", f"Known extensions: {known}.")
        yield from map(_file, files)
    elif path.suffix.lower() == ".jsonl" and path.is_file():
        yield from _of_manifest(path)
    elif path.exists():
        yield _file(path)
    elif glob.has_magic(text) and (matches := sorted(glob.glob(text, recursive=True))):  # noqa: PTH207, pathlib takes no absolute pattern
        for match in matches:
            if Path(match).is_dir() or Path(match).suffix.lower() in VIDEOS | IMAGES:
                yield from _named(match)
    elif text.startswith("world"):
        raise UsageError(
            f"'{text}' is no part of the world.", "Write world:COUNT, world:COUNT:SEED or world-full:COUNT."
        )
    else:
        raise UsageError(f"There is no file or folder '{text}'.", "Check the path; globs have to match something.")


def _visible(path: Path, folder: Path) -> bool:
    """Whether a path is a file that is not hidden, nor in a hidden folder."""
    return path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)


def _of_world(variety: str, count: int, seed: int) -> Iterator[Item]:
    """The first `count` clips of the world of that seed, captioned."""
    name = "world" if variety == "plain" else f"world-{variety}"
    for index in range(count):
        one = World(seed, index, variety)  # type: ignore[arg-type]
        caption = world.clip(seed, index, 1, 32, 32, variety=one.variety)[2]
        yield Item(Path(f"{name}:{seed}/{index}"), (caption,), "world", one)


def _of_manifest(path: Path) -> Iterator[Item]:
    """The clips that a manifest keeps. Raises UsageError."""
    for one in kept(path):
        spec = _WORLD_CLIP.fullmatch(one.source)
        if spec:
            drawn = World(int(spec[2]), int(spec[3]), (spec[1] or "-plain")[1:])  # type: ignore[arg-type]
            yield Item(Path(one.source), one.captions, "world", drawn, facts=one.facts)
        else:
            file = next((f for place in (Path(), path.parent) if (f := place / one.source).is_file()), Path(one.source))
            yield Item(file, one.captions, frames=one.frames, facts=one.facts)


# Pixels


def _read_video(
    item: Item, seen: Seen, told: Probe, num_frames: int, fps: Fraction | float | None, whole: bool
) -> video.Clip:
    """The frames of a video, or of its part. Raises BadClip."""
    part, start = _part(item, told)
    if item.frames and (count := video.available(part, fps, start=start)) < num_frames:
        raise BadClip(item.path, f"frames {item.frames[0]} to {item.frames[1]} give {count}, {num_frames} are needed")
    clip = video.read(
        item.path,
        num_frames=num_frames,
        fps=fps,
        start=start,
        whole=whole and item.frames is None,
        seen=told,
        sha256=seen.file or seen.sha256,
    )
    return replace(clip, source={**clip.source, "frames": list(item.frames)}) if item.frames else clip


def _load_world(
    item: Item, one: World, seen: Seen, num_frames: int, height: int, width: int, fps: Fraction | float | None
) -> Loaded:
    """A clip of the world, drawn at the size that is asked for, with the cover of its object as `mask` (T, H, W).

    It is drawn anew for any rate: at half its own, a frame lasts twice as long.
    """
    rate = WORLD_FPS if fps is None else Fraction(fps).limit_denominator(100_000)
    size, pace = (num_frames, height, width), float(WORLD_FPS / rate)
    pixels, cover, _, _ = world.clip(one.seed, one.index, *size, variety=one.variety, pace=pace)
    source = {"uri": str(item.path), "sha256": seen.sha256, "bytes": 0, "container": "world", "codec": "world"}
    fit = {"orig_hw": [height, width], "resize_hw": [height, width], "crop_xyxy": [0, 0, width, height]}
    stamps = [str(k / rate) for k in range(num_frames)]
    record = {"source": source, "fps": str(rate), "pts": stamps, "rotation": 0, "decoder": {"name": "world"}, **fit}
    return Loaded(pixels, record, {"mask": cover})


def _record(source: dict[str, Any], pts: Sequence[Fraction], rate: Fraction) -> dict[str, Any]:
    """What a latent file keeps of where its pixels came from. Fractions are text."""
    source = dict(source)
    decoder = {"name": source.pop("decoder"), "version": source.pop("version"), **_some(source, "why", "converted")}
    told = {"uri": source.pop("path"), **source}
    rotation = told.pop("rotation")
    stamps = [str(stamp) for stamp in pts]
    return {"source": told, "fps": str(rate), "pts": stamps, "rotation": rotation, "decoder": decoder}


def _some(record: dict[str, Any], *names: str) -> dict[str, Any]:
    """Move those of `names` that are there out of a record."""
    return {name: record.pop(name) for name in names if name in record}


def _opened(path: Path) -> Image.Image:
    """An image whose header is readable. Raises BadClip."""
    try:
        return Image.open(path)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadClip(path, f"it is not a readable image ({error})") from error


def _open_image(item: Item, seen: Seen) -> tuple[Tensor, dict[str, Any]]:
    """A picture (1, H, W, 3) uint8, turned as its EXIF says, on white where it is transparent. Raises BadClip."""
    path = item.path
    with _opened(path) as image:
        if image.mode.startswith(("I", "F")):
            raise BadClip(path, f"its mode is {image.mode}; pictures of 8 bits a channel are read")
        try:
            upright = ImageOps.exif_transpose(image).convert("RGBA")
        except (OSError, ValueError, SyntaxError) as error:
            raise BadClip(path, f"damaged: {error}") from error
        name = image.format
    white = Image.new("RGBA", upright.size, "white")
    picture = np.asarray(Image.alpha_composite(white, upright).convert("RGB"))
    record = {"path": str(path), "sha256": seen.sha256, "bytes": path.stat().st_size, "container": "image"}
    record |= {"codec": str(name).lower(), "rotation": 0, "decoder": "pillow", "version": PIL.__version__}
    return torch.from_numpy(picture.copy())[None], record


def cover(
    frames: Tensor, height: int, width: int, aspect: Fraction = Fraction(1)
) -> tuple[Tensor, dict[str, list[int]]]:
    """Frames (T, h, w, 3) uint8 to pixels (3, T, height, width) in [-1, 1], and how.

    Bicubic with an antialiasing filter, one frame at a time to save memory; `aspect` is width / height of a pixel.
    """
    count, tall, wide, _ = frames.shape
    scale = max(Fraction(height, tall), Fraction(width) / (wide * aspect))
    rows, columns = max(height, round(tall * scale)), max(width, round(wide * aspect * scale))
    top, left = (rows - height) // 2, (columns - width) // 2
    pixels = torch.empty((3, count, height, width))
    for k in range(count):
        frame = frames[k].permute(2, 0, 1)[None].float()
        if (rows, columns) != (tall, wide):
            frame = F.interpolate(frame, (rows, columns), mode="bicubic", antialias=True, align_corners=False)
        pixels[:, k] = frame[0, :, top : top + height, left : left + width].clamp(0, 255) / 127.5 - 1
    fit = {"orig_hw": [tall, wide], "resize_hw": [rows, columns], "crop_xyxy": [left, top, left + width, top + height]}
    return pixels, fit
