"""Joining clips that were written in parts, with the sound of another file, without coding anything again."""

from __future__ import annotations

import heapq
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

import av

from vgen.errors import UsageError, VgenError
from vgen.outputs import whole
from vgen.probe import open_video

FORMATS = {".mp4": "mp4", ".webm": "webm"}  # outputs that hold sound


@dataclass(frozen=True)
class Clock:
    """When frames are shown: stamps in ticks of `tick` seconds, rising from 0; the last frame stays `last` ticks.

    `rate` is the constant rate, where it is one.
    """

    tick: Fraction
    stamps: Iterator[int]
    last: int
    rate: Fraction | None = None


def sound(source: Path, output: Path) -> tuple[bool, list[str]]:
    """Whether `output` can take the sound of a video, and what a user should hear of what is left behind.

    Raises UsageError where the output holds sound, but not of that codec; BadClip for a file that is no video.
    """
    with open_video(source) as container:
        tracks = [stream.codec_context for stream in container.streams.audio]
        left = ["Subtitles are not copied."] if container.streams.subtitles else []
    kind = FORMATS.get(output.suffix.lower())
    if tracks and kind is None:
        what = "A GIF" if output.suffix.lower() == ".gif" else "A folder of pictures"
        return False, [f"{what} has no sound: that of {source} is left out.", *left]
    if kind is None:
        return False, left
    known = _codecs(kind)
    bad = sorted({"of an unknown kind" if one is None else one.codec.canonical_name for one in tracks} - known)
    if bad:
        raise UsageError(
            f"{output} cannot take the sound of {source}: {kind} holds no {', '.join(bad)}.",
            "Name an .mp4, or leave the sound out with --no-audio." if kind != "mp4" else "Give --no-audio.",
        )
    return bool(tracks), left


def _codecs(kind: str) -> set[str]:
    """The codecs that a container holds, by FFmpeg's names."""
    with av.open(os.devnull, "w", format=kind) as container:
        return set(container.supported_codecs)


def join(
    path: Path, parts: Sequence[Path], clock: Clock, *, comment: str, heard: Path | None = None, since: Fraction
) -> None:
    """Write the frames of `parts`, in order, to one file, shown by `clock`, with all sound of `heard`.

    `since` is the time in `heard`, in seconds, of the first frame: sound from before it is cut off. Replaces what is
    at `path`, in one step. Raises VgenError for parts that do not fit together.
    """
    options = {"movflags": "+faststart"} if path.suffix.lower() == ".mp4" else {}
    with whole(path) as temporary, ExitStack() as stack:
        target: Any = stack.enter_context(av.open(str(temporary), "w", options=options))
        target.metadata["comment"] = comment
        first: Any = stack.enter_context(open_video(parts[0])).streams.video[0]
        pictures = target.add_stream_from_template(first, opaque=True)
        pictures.time_base = clock.tick
        if clock.rate:
            pictures.codec_context.framerate = clock.rate
        flows = [_pictures(parts, pictures, clock, _settings(first))]
        if heard:
            flows.append(_sounds(stack.enter_context(open_video(heard)), target, since))
        try:
            for _, packet in heapq.merge(*flows, key=lambda one: one[0]):
                target.mux(packet)
        except av.FFmpegError as error:
            if isinstance(error, OSError):  # the disk's
                raise
            raise VgenError(f"{path} was not written: parts or sound do not go in ({error.strerror}).") from error


def _pictures(parts: Sequence[Path], stream: Any, clock: Clock, settings: bytes) -> Iterator[tuple[Fraction, Any]]:
    """The packets of all parts with their new stamps, and when each is to be decoded, in seconds.

    A packet shows the frame whose rank its old stamp has among those of its part. It is decoded at the time of the
    frame that comes `delay` places before it in the file, so that none is shown before it is decoded.
    """
    delay = max(max(k - rank for k, rank in enumerate(_ranks(part))) for part in parts)
    before = list(range(-delay, 0))
    for number, part in enumerate(parts):
        with open_video(part) as container:
            old = container.streams.video[0]
            if _settings(old) != settings:
                raise VgenError(f"{part} was written by another encoder than {parts[0]}.", "Remove their folder.")
            packets = [packet for packet in container.demux(old) if packet.size]
            times = list(islice(clock.stamps, len(packets)))
            decoded = [*before, *times]
            for packet, rank, dts in zip(packets, _order(packets), decoded, strict=False):
                packet.stream, packet.time_base = stream, clock.tick
                packet.pts, packet.dts = times[rank], dts
                end = clock.last if number == len(parts) - 1 else 1
                packet.duration = times[rank + 1] - times[rank] if rank + 1 < len(times) else end
                yield dts * clock.tick, packet
            before = decoded[len(packets) :]


def _sounds(source: Any, target: Any, since: Fraction) -> Iterator[tuple[Fraction, Any]]:
    """The packets of all sound, moved so that `since` is 0, and their times; the tracks join `target` at once."""
    tracks = {}
    for stream in source.streams.audio:
        tracks[stream.index] = target.add_stream_from_template(stream, opaque=True)
        tracks[stream.index].metadata.update({k: v for k, v in stream.metadata.items() if k == "language"})

    def packets() -> Iterator[tuple[Fraction, Any]]:
        for packet in source.demux(source.streams.audio):
            if packet.dts is None:
                continue
            shift = round(since / packet.time_base)
            packet.dts -= shift
            packet.pts = None if packet.pts is None else packet.pts - shift
            time, packet.stream = packet.dts * packet.time_base, tracks[packet.stream.index]
            yield time, packet

    return packets()


def _ranks(part: Path) -> list[int]:
    """For the packets of a clip in the order of decoding, the place of each on the screen."""
    with open_video(part) as container:
        return _order([packet for packet in container.demux(container.streams.video[0]) if packet.size])


def _order(packets: Sequence[Any]) -> list[int]:
    """The rank of each packet's stamp."""
    places = {stamp: rank for rank, stamp in enumerate(sorted(packet.pts for packet in packets))}
    return [places[packet.pts] for packet in packets]


def _settings(stream: Any) -> bytes:
    """What a decoder is told before the first packet."""
    return bytes(stream.codec_context.extradata or b"")
