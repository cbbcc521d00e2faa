"""Data of a camera motion: those of ordinary clips that show it, and more made by moving a window over still ones."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vgen import camera, clips, encode, family, video
from vgen.camera import BOTH, Motion, matches
from vgen.camera_move import ROOM, moved
from vgen.clips import WORLD_FPS, Item, Size
from vgen.encode import Encoded
from vgen.errors import UsageError
from vgen.family import Checkpoint, Family
from vgen.files import make_folder
from vgen.generate import to_frames
from vgen.model import Model, OnStep
from vgen.probe import BadClip, probe
from vgen.store import Store
from vgen.video_write import contact_sheet, write

FORMAT = 1  # of the lines of a cache; another number when `camera.estimate` changes
TRIES = 4  # windows that are tried for each clip to be made
QUALITY = 6  # of the clips that are made: the constant rate factor of H.264, near to lossless
WORKERS = 4  # threads that read and measure clips
PIECES = 8  # of a long clip, at most
USUAL = 127  # the motion bucket that is sampled at when none is named
SHOWN = 16  # clips on a contact sheet


@dataclass(frozen=True)
class Found:
    """A clip and how its camera moves. An image, or a clip that stands still all over, has the motion of a still."""

    item: Item
    sha256: str
    motion: Motion

    @property
    def still(self) -> bool:
        """Whether a window can be moved over it: an image with texture, or a clip whose camera stands."""
        return matches(self.motion, "static")


@dataclass(frozen=True)
class Choice:
    """What a run trains on, and what it is checked with.

    `kept` are the clips that show each word, `sources` those that a window is moved over, `pictures` those that are
    held out: samples start from their first frames.
    """

    kept: Mapping[str, Sequence[Found]]
    sources: Sequence[Found]
    pictures: Sequence[Found]


def words(asked: str) -> tuple[str, ...]:
    """The motions, an adapter each, that a word of --camera asks for: "pan" means both ways."""
    return BOTH.get(asked, (asked,))


def discover(inputs: Sequence[str]) -> list[Item]:
    """The clips and images that --data names. Raises UsageError, for stores of latents too."""
    if not inputs:
        raise UsageError("--data is missing.", "Give clips and images, or folders of them.")
    for one in inputs:
        if (Path(one) / "store.json").exists():
            raise UsageError(
                f"--camera looks for a motion in clips; {one} is a store of latents.",
                "Give the clips, or leave --camera out: a store is trained on as it is.",
            )
    return clips.discover(inputs)


def encoding(card: Family, options: Any, checkpoint: Checkpoint) -> Any:
    """The options of `encode` for the clips that `options` (CameraOptions) train on: size, rate, machine.

    Raises UsageError for a size that the checkpoint does not take.
    """
    size: dict[str, int] = {}
    if options.clip_size:
        numbers = options.clip_size.lower().split("x")
        if len(numbers) != 3 or not all(n.isdecimal() for n in numbers):
            raise UsageError(f"--clip-size {options.clip_size} is not FRAMESxHEIGHTxWIDTH.", "For example: 14x320x576")
        size = dict(zip(("num_frames", "height", "width"), map(int, numbers), strict=True))
    machine = {name: getattr(options, name) for name in ("seed", "device", "dtype", "threads")}
    kind: Any = card.options("encode")
    told = family.resolve(card, kind(inputs=options.data, fps=options.clip_fps, **size, **machine), checkpoint)
    if told.num_frames < 2:
        raise UsageError("A camera cannot move in a clip of one frame.", "Set --clip-size.")
    return told


def survey(
    items: Sequence[Item], size: Size, fps: float | None, cache: Path, on_step: OnStep
) -> tuple[list[Found], list[str]]:
    """The camera motion of what would be trained on of each clip, or piece of a long one; and why some are left out.

    `cache` is a file of JSON lines, by content hash, size and rate: what is in it is not measured again.
    """
    known, found, aside = _known(cache), [], []
    pieces = [piece for item in items for piece in cut(item, size[0], fps)]

    def measured(item: Item) -> tuple[str, Found] | str:
        try:
            seen = clips.look(item)
            told = f"{seen.sha256}/{'x'.join(map(str, size))}/{fps or 0:g}/{FORMAT}"
            return told, Found(item, seen.sha256, known.get(told) or _motion(item, size, fps, seen))
        except BadClip as error:
            return f"{item.name}: {error.reason}"

    workers = ThreadPoolExecutor(WORKERS)
    try:
        for i, outcome in enumerate(workers.map(measured, pieces)):
            if isinstance(outcome, str):
                aside.append(outcome)
            else:
                told, one = outcome
                if told not in known:
                    known[told] = one.motion
                    _note(cache, told, one.motion)
                found.append(one)
            on_step("camera", i + 1, len(pieces))
    finally:
        workers.shutdown(cancel_futures=True)
    return found, aside


def cut(item: Item, num_frames: int, fps: float | None) -> list[Item]:
    """A video of many times `num_frames` in up to PIECES pieces, all of one length; what a manifest has cut stays."""
    if item.kind != "video" or item.frames:
        return [item]
    try:
        told = probe(item.path)
    except BadClip:  # `survey` says why
        return [item]
    count = min(PIECES, video.available(told, fps) // (num_frames + 1))
    bounds = [round(k * len(told.pts) / count) for k in range(count + 1)] if count > 1 else []
    return [replace(item, frames=pair) for pair in pairwise(bounds)] or [item]


def _known(cache: Path) -> dict[str, Motion]:
    """What a cache tells; a line that a killed run left half is passed over."""
    known = {}
    for line in cache.read_text().splitlines() if cache.exists() else ():
        try:
            told = json.loads(line)
        except ValueError:
            continue
        known[told["clip"]] = Motion(**told["motion"])
    return known


def _note(cache: Path, clip: str, motion: Motion) -> None:
    make_folder(cache.parent)
    rounded = {k: v if isinstance(v, bool) else round(v, 6) for k, v in asdict(motion).items()}
    with cache.open("a") as file:
        file.write(json.dumps({"clip": clip, "motion": rounded}) + "\n")


def _motion(item: Item, size: Size, fps: float | None, seen: clips.Seen) -> Motion:
    """The motion of the frames of a clip that are trained on; of an image, that of the image shown twice."""
    count = 1 if item.kind == "image" else size[0]
    frames = to_frames(clips.load(item, count, *size[1:], fps=fps, seen=seen).pixels)
    return camera.estimate(torch.cat([frames, frames]) if item.kind == "image" else frames)


# Choosing


def choose(found: Sequence[Found], asked: Sequence[str], *, synthesize: int, least: int, pictures: int) -> Choice:
    """Divide clips into those to train on, those to make more of, and `pictures` to check with.

    Pictures are of clips that are not trained on, if there are enough, and else of those that can be spared.
    Raises UsageError where fewer than `least` clips of a word would be trained on, or no picture is left.
    """
    kept = {word: [one for one in found if one.item.kind != "image" and matches(one.motion, word)] for word in asked}
    still = [one for one in found if one.still and not (asked == ("static",) and one.item.kind == "image")]
    sources = still if synthesize else []
    choice = Choice(kept, sources, [])
    for word in asked:
        _require(found, choice, word, synthesize, least)
    trained = {id(one): 2 for some in kept.values() for one in some}
    used = {id(one): 1 for one in sources} | trained
    for one in sorted((one for one in found if one.motion.known), key=lambda o: (used.get(id(o), 0), o.sha256)):
        if len(choice.pictures) == pictures:
            break
        fewer = _without(choice, one)
        enough = all(len(some) + synthesize >= least for some in fewer.kept.values())
        if enough and (fewer.sources or not synthesize):
            choice = fewer
    if pictures and not choice.pictures:
        raise UsageError(
            "No clip is left to check the adapter with: all are trained on.",
            "Give more --data, lower --min-clips, or turn the check off with --check-samples 0.",
        )
    return choice


def _without(choice: Choice, one: Found) -> Choice:
    """A clip set apart as a picture."""
    kept = {word: [other for other in some if other is not one] for word, some in choice.kept.items()}
    return Choice(kept, [other for other in choice.sources if other is not one], [*choice.pictures, one])


def _require(found: Sequence[Found], choice: Choice, word: str, synthesize: int, least: int) -> None:
    """Raises UsageError, with the numbers and the ways out, where there are too few clips of a word."""
    kept = len(choice.kept[word])
    still = [one for one in found if one.still]
    have = f"{kept} of {len(found)} clips show '{word}'"
    if synthesize and not choice.sources:
        what = "clip" if word == "static" else "clip or image"
        raise UsageError(
            f"--synthesize has nothing to move a window over: {have}, and no {what} stands still.",
            "Give --data with images, or with clips whose camera stands.",
        )
    if kept + synthesize >= least:
        return
    others = {name: sum(matches(one.motion, name) for one in found) for name in camera.WORDS}
    shown = ", ".join(f"{name} {count}" for name, count in others.items() if count) or "none"
    images = sum(one.item.kind == "image" for one in still)
    can = f"--synthesize {least - kept} (of {len(still) - images} still clips and {images} images), " if still else ""
    fewer = f", or --min-clips {kept + synthesize}" if kept + synthesize else ""
    raise UsageError(
        f"{have}{f', {synthesize} more would be made' if synthesize else ''}; {least} are needed.",
        f"Ways out: {can}more --data{fewer}. Motions found: {shown}.",
    )


# Making


def make(
    sources: Sequence[Found], word: str, count: int, size: Size, fps: float | None, folder: Path, on_step: OnStep
) -> list[Item]:
    """Up to `count` clips of a word in `folder`: a window moved over each source in turn. What is there stays.

    What is made depends on the sources' content, the word and the size alone. A clip whose motion is not read back is
    dropped, and another tried. Raises BadClip.
    """
    made: list[Item] = []
    for number in range(count * TRIES if sources else 0):
        source = sources[number % len(sources)]
        name = hashlib.sha256(f"{source.sha256}/{word}/{number}/{size}/{fps}/{FORMAT}".encode()).hexdigest()
        path = folder / f"{word}-{number:04d}-{name[:12]}.mp4"
        if not path.exists():
            frames, rate = _moved(source.item, word, size, fps, int(name[:16], 16))
            if not matches(camera.estimate(frames), word):
                continue
            write(path, torch.from_numpy(frames), rate, quality=QUALITY)
        made.append(Item(path, source.item.captions))
        on_step(f"make {word}", len(made), count)
        if len(made) == count:
            break
    return made


def _moved(item: Item, word: str, size: Size, fps: float | None, seed: int) -> tuple[NDArray[np.uint8], Fraction]:
    """Frames (T, H, W, 3) that a window shows which moves over a still clip or an image, and their rate."""
    count, height, width = size
    image = item.kind == "image"
    loaded = clips.load(item, 1 if image else count, round(ROOM * height), round(ROOM * width), fps=fps)
    frames = moved(to_frames(loaded.pixels).numpy(), word, size, seed)
    usual = WORLD_FPS if image else Fraction(loaded.record["fps"])
    return frames, Fraction(fps).limit_denominator(1001) if fps else usual


# Encoding


def fill(model: Model, store: Store, items: Sequence[Item], size: Size, options: Any, on_step: OnStep) -> list[Encoded]:
    """Bring a store to hold exactly these clips, encoding those that are not there; gives what became of each.

    Families that are told a motion bucket are told the usual one, however fast a clip goes: the adapter brings the
    motion also where nothing is asked.
    """
    store.repair()
    items = [replace(item, facts={**item.facts, "motion_bucket": USUAL}) for item in items]
    encode.embed_captions(model, store, items, on_step)
    results = list(encode.encode(model, store, items, [size], options, on_step))
    store.remove(set(store.keys()) - {one.key for one in results})
    return results


def sheet(items: Sequence[Item], size: Size, fps: float | None, path: Path) -> Path:
    """A picture of the first, the middle and the last frame of up to SHOWN clips, spread over all, two clips a row."""
    some = [items[round(k * (len(items) - 1) / (SHOWN - 1))] for k in range(SHOWN)] if len(items) > SHOWN else items
    shown: list[Tensor] = []
    for item in some:
        frames = to_frames(clips.load(item, *size, fps=fps).pixels)
        shown += [_small(frames[k]) for k in (0, len(frames) // 2, -1)]
    return contact_sheet(shown, path, columns=6)


def _small(frame: Tensor) -> Tensor:
    """A frame (H, W, 3) at most 256 pixels wide."""
    every = math.ceil(frame.shape[1] / 256)
    return frame[::every, ::every]


def pictures(chosen: Sequence[Found], size: Size, fps: float | None, folder: Path) -> list[Item]:
    """The first frames of clips as PNG files in `folder`, with their captions. What is there stays."""
    made = []
    for one in chosen:
        path = folder / f"{one.sha256[:16]}.png"
        if not path.exists():
            write(path, to_frames(clips.load(one.item, 1, *size[1:], fps=fps).pixels), Fraction(1))
        made.append(Item(path, one.item.captions, "image"))
    return made
