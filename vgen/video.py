"""Reading video: upright RGB frames at exact times, or an error that says why not.

Shapes: T frames, H height, W width; RGB is the last axis, uint8.
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path
from typing import Any

import av
import torch
from torch import Tensor

from vgen.errors import UsageError
from vgen.probe import SWSCALE, UNTAGGED, BadClip, Probe, open_video, packets_of, probe, video_stream

__all__ = ["BadClip", "Clip", "Probe", "available", "file_sha256", "frames", "probe", "read"]

_SEEKABLE = ("mp4", "matroska")
_WHOLE = 60  # seconds: longer clips are not decoded to the end only to see whether they are sound
_MARGIN = 20  # frames: containers seek by decoding time, which runs up to 16 frames ahead of the screen


@dataclass(frozen=True)
class Clip:
    """Frames (T, H, W, 3) uint8, their time stamps in the file in seconds, the rate they were taken at, and whence."""

    frames: Tensor
    pts: tuple[Fraction, ...]
    fps: Fraction
    source: dict[str, Any]


def read(
    path: Path | str,
    *,
    num_frames: int | None = None,
    fps: Fraction | float | None = None,
    start: float = 0.0,
    every: int = 1,
    whole: bool = False,
    seen: Probe | None = None,
    sha256: str = "",
) -> Clip:
    """Frames of a video by time: the one shown at start + k / fps, or with no `fps` the clip's own frames.

    `start` is in seconds after the first frame, `every` takes one of so many, and no `num_frames` reads to the end.
    A `fps` above the clip's shows frames again, as a player would. `seen` saves a second probe, `sha256` of the file a
    second look at its bytes. Raises BadClip for a damaged file or one with too few frames: the frames up to the last
    one needed are checked, and with `whole` those behind it too, in clips of up to a minute.
    """
    if every < 1 or start < 0 or (fps is not None and fps <= 0) or (num_frames is not None and num_frames < 1):
        raise UsageError("To read a clip: every >= 1, start >= 0, fps > 0 and num_frames >= 1.")
    told = seen or probe(path)
    rate = told.fps if fps is None else _rational(fps)
    chosen = _choose(told, fps, start, every, num_frames)
    wanted = sorted(set(chosen))
    last = len(told.pts) - 1 if whole and told.duration <= _WHOLE else wanted[-1]
    pixels, decoder, why = _take(told, wanted, last)
    if len(wanted) != len(chosen):
        pixels = pixels[[bisect_left(wanted, index) for index in chosen]]
    return Clip(pixels, tuple(told.pts[i] for i in chosen), rate / every, _record(told, sha256, decoder, why))


def frames(path: Path | str, *, seen: Probe | None = None, start: int = 0, stop: int | None = None) -> Iterator[Tensor]:
    """Frames (H, W, 3) of a video, number `start` to `stop` - 1, in order, one at a time, with the checks of `read`.

    Raises BadClip.
    """
    told = seen or probe(path)
    for index, frame in _decode(told, start, (stop or len(told.pts)) - 1):
        if index >= start:
            yield _upright(torch.from_numpy(_rgb(frame)), told)


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def available(told: Probe, fps: Fraction | float | None = None, *, start: float = 0.0, every: int = 1) -> int:
    """How many frames `read` can give."""
    return len(_times(told, fps, start, every, None))


def _rational(fps: Fraction | float) -> Fraction:
    """A rate given on a command line as the fraction that was meant: 23.976 stays 2997/125."""
    return Fraction(fps).limit_denominator(100_000)


def _times(told: Probe, fps: Fraction | float | None, start: float, every: int, count: int | None) -> list[int]:
    """Numbers of the frames shown at start, start + every / fps ..., at most `count` of them.

    Stamps are rounded to ticks (a millisecond in Matroska), so a frame counts as shown a twentieth of a frame
    early; else 30 fps asked of 30 fps would now and then show one frame twice and skip the next.
    """
    slack = 1 / told.fps / 20
    begin, end = told.pts[0] + Fraction(start), told.pts[0] + told.duration - slack
    if begin >= end:
        return []
    if fps is None:
        return list(range(max(bisect_right(told.pts, begin + slack) - 1, 0), len(told.pts), every))[:count]
    step = every / _rational(fps)
    steps = math.ceil((end - begin) / step)
    return [bisect_right(told.pts, begin + k * step + slack) - 1 for k in range(min(steps, count or steps))]


def _choose(told: Probe, fps: Fraction | float | None, start: float, every: int, count: int | None) -> list[int]:
    """The frames to take. Raises BadClip where there are too few."""
    chosen = _times(told, fps, start, every, count)
    if len(chosen) < (count or 1):
        rate = "" if fps is None else f" at {float(fps):g} fps"
        after = f" after {start:g} s" if start else ""
        strided = f", one of {every}" if every > 1 else ""
        raise BadClip(told.path, f"it has {len(chosen)} frames{rate}{after}{strided}, {count or 1} are needed")
    return chosen


def _take(told: Probe, wanted: Sequence[int], last: int) -> tuple[Tensor, str, str]:
    """The wanted frames (T, H, W, 3), numbers rising, the decoder that gave them, and why not decord.

    All up to `last` are decoded, as a check.
    """
    if told.decoder == "decord":
        pixels, why = _with_decord(told, wanted)
        if pixels is not None:
            for _ in _decode(told, wanted[0], last):
                pass  # decord paints over damaged data without a word; this raises
            return pixels, "decord", ""
    else:
        why = told.why
    pixels = torch.empty((len(wanted), told.height, told.width, 3), dtype=torch.uint8)
    place = {index: k for k, index in enumerate(wanted)}
    for index, frame in _decode(told, wanted[0], last):
        if index in place:
            pixels[place[index]] = _upright(torch.from_numpy(_rgb(frame)), told)
    return pixels, "pyav", why


def _with_decord(told: Probe, wanted: Sequence[int]) -> tuple[Tensor | None, str]:
    """The wanted frames, or None and what is wrong with decord's answer.

    A fresh reader, one thread, rising order: decord decodes ahead without bound, does not survive a fork, and
    seeks wrongly when asked to go back.
    """
    try:
        import decord
    except (ImportError, OSError) as error:  # OSError: its libraries do not load
        return None, f"decord does not import: {error}"
    decord.logging.set_level(decord.logging.QUIET)
    try:
        reader = decord.VideoReader(str(told.path.resolve()), num_threads=1, fault_tol=1)
        stamps = reader.get_frame_timestamp(range(len(reader)))[:, 0]
        if len(stamps) != len(told.pts):
            return None, f"decord counts {len(stamps)} frames, the packets {len(told.pts)}"
        slack = 1 / told.fps / 10
        if any(abs(Fraction(float(a)) - b) > slack for a, b in zip(stamps, told.pts, strict=True)):
            return None, "decord's time stamps differ from the packets'"
        pixels = torch.from_numpy(reader.get_batch(list(wanted)).asnumpy())
        del reader
    except (decord.DECORDError, RuntimeError) as error:
        return None, f"decord failed: {str(error).splitlines()[0][:120]}"
    if pixels.shape[1:3] != (told.height, told.width):
        return None, "decord gives another size"
    return pixels, ""


def _decode(told: Probe, first: int, last: int) -> Iterator[tuple[int, Any]]:
    """PyAV's frames from at or before `first` up to `last`, in order, with their numbers. Raises BadClip."""
    with open_video(told.path) as container:
        stream = video_stream(container, told.path)
        stream.thread_type = "AUTO"
        if first > _MARGIN and told.container in _SEEKABLE and not told.open_gop:
            container.seek(int(told.pts[first - _MARGIN] / told.time_base), stream=stream)
        expected: int | None = None
        try:
            for count, frame in enumerate(_frames(container, stream)):
                index = _number(told, frame, count)
                if index is None:
                    continue
                if expected is None and index > 0 and index > first:
                    raise BadClip(told.path, f"frame {first} at {float(told.pts[first]):.3f} s does not decode")
                _check(told, frame, index, expected)
                yield index, frame
                expected = index + 1
                if index >= last:
                    return
        except av.FFmpegError as error:
            at = expected or 0
            raise BadClip(told.path, f"damaged: decoding fails after frame {at} ({error.strerror})") from error
    raise BadClip(told.path, f"it ends after {expected or 0} of {len(told.pts)} frames")


def _frames(container: Any, stream: Any) -> Iterator[Any]:
    """PyAV's frames from the next key frame on."""
    for packet in packets_of(container, stream):
        yield from packet.decode()
    yield from stream.decode(None)


def _number(told: Probe, frame: Any, count: int) -> int | None:
    """Which frame of the clip this is; None for one in front of the clip. Raises BadClip for one that is not in it."""
    if not told.stamped:
        if count >= len(told.pts):
            raise BadClip(told.path, f"it decodes to more than the {len(told.pts)} frames it lists")
        return count
    if frame.pts is None:
        raise BadClip(told.path, "a frame comes out of the decoder without a time stamp")
    stamp = frame.pts * told.time_base
    if stamp < told.pts[0]:
        return None
    index = bisect_left(told.pts, stamp)
    if index == len(told.pts) or told.pts[index] != stamp:
        raise BadClip(told.path, f"a frame at {float(stamp):.3f} s is not in its packets")
    return index


def _check(told: Probe, frame: Any, index: int, expected: int | None) -> None:
    """Raises BadClip for a frame that is damaged, out of turn, or of another size."""
    if expected is not None and index != expected:
        raise BadClip(told.path, f"damaged: frame {index} comes where frame {expected} should")
    if frame.is_corrupt:
        raise BadClip(told.path, f"damaged: frame {index} is corrupt")
    size = (frame.height, frame.width) if told.rotation % 180 == 0 else (frame.width, frame.height)
    if size != (told.height, told.width):
        raise BadClip(told.path, f"its size changes at frame {index}, from {told.width}x{told.height}")


def _rgb(frame: Any) -> Any:
    """A PyAV frame as (H, W, 3) uint8 RGB, by the matrix and range that the frame is tagged with."""
    source = SWSCALE.get(int(frame.colorspace), UNTAGGED)
    return frame.reformat(format="rgb24", src_colorspace=source).to_ndarray()


def _upright(image: Tensor, told: Probe) -> Tensor:
    """(H, W, 3) as it is to be shown."""
    image = image.flip(1) if told.mirrored else image
    return torch.rot90(image, -told.rotation // 90, (0, 1)) if told.rotation else image


def _record(told: Probe, sha256: str, decoder: str, why: str) -> dict[str, Any]:
    """Where frames came from and how, in plain values."""
    record = {
        "path": str(told.path),
        "sha256": sha256 or file_sha256(told.path),
        "bytes": told.path.stat().st_size,
        "container": told.container,
        "codec": told.codec,
        "pix_fmt": told.pix_fmt,
        "rotation": told.rotation,
        "mirrored": told.mirrored,
        "fps": str(told.fps),
        "vfr": told.vfr,
        "decoder": decoder,
        "version": version("decord" if decoder == "decord" else "av"),
    }
    if why:
        record["why"] = why
    if told.bits > 8:
        tags = f"primaries {told.color_primaries}, transfer {told.color_trc}, matrix {told.color_space}"
        record["converted"] = f"{told.bits} to 8 bits a channel, no tone mapping ({tags})"
    return record
