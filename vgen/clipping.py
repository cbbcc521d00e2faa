"""Clipping without encoding again: key frames, and the packets between two of them copied to a file.

A copy can only begin at a key frame. It ends at any frame, a few early where frames refer to later ones (B-frames).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import av

from vgen.errors import VgenError
from vgen.outputs import whole
from vgen.probe import BadClip, Probe, open_video, packets_of, video_stream


def keyframes(told: Probe) -> tuple[int, ...]:
    """Numbers of the frames at which a copy of a clip can begin, rising. Raises BadClip."""
    with open_video(told.path) as container:
        stream = video_stream(container, told.path)
        try:
            found = {number for packet, number in _numbered(told, packets_of(container, stream)) if packet.is_keyframe}
        except av.FFmpegError as error:
            raise BadClip(told.path, f"its packets cannot be read ({error.strerror})") from error
    return tuple(sorted(found))


def snap(start: int, keys: Sequence[int]) -> int | None:
    """The first key frame at or after `start`, so that nothing in front of it comes along; None where there is none."""
    place = bisect_left(keys, start)
    return keys[place] if place < len(keys) else None


def copy(told: Probe, start: int, stop: int, path: Path) -> int:
    """Write frames `start`, a key frame, to `stop` - 1 as they are, and return how many they became.

    The stamps begin at 0; sound is left behind. Raises BadClip, and VgenError where the container refuses.
    """
    with open_video(told.path) as container, whole(path) as temporary:
        stream = video_stream(container, told.path)
        if told.stamped and start:
            container.seek(int(told.pts[start] / told.time_base), stream=stream)
        packets = _decodable(_numbered(told, container.demux(stream)), start, stop)
        try:
            with av.open(str(temporary), "w") as file:
                target = file.add_stream_from_template(stream)
                shift = packets[0].pts if packets[0].pts is not None else packets[0].dts
                for packet in packets:
                    packet.pts = None if packet.pts is None else packet.pts - shift
                    packet.dts = None if packet.dts is None else packet.dts - shift
                    packet.stream = target
                    file.mux(packet)
        except (av.FFmpegError, ValueError) as error:
            if isinstance(error, OSError):
                raise
            raise VgenError(f"'{path}' was not written: {told.codec} cannot be copied into it ({error}).") from error
    return len(packets)


def _numbered(told: Probe, packets: Iterator[Any]) -> Iterator[tuple[Any, int]]:
    """Packets that make frames, in the order of decoding, with the numbers of those frames."""
    count = 0
    for packet in packets:
        if packet.size == 0 or packet.is_discard:
            continue
        if not told.stamped:
            yield packet, count
            count += 1
            continue
        stamp = packet.pts * told.time_base
        number = bisect_left(told.pts, stamp)
        if number < len(told.pts) and told.pts[number] == stamp:
            yield packet, number


def _decodable(packets: Iterator[tuple[Any, int]], start: int, stop: int) -> list[Any]:
    """The longest beginning of a clip whose frames are all there and need none after it."""
    taken: list[Any] = []
    whole_until, highest = 0, start
    for packet, number in packets:
        if number < start or (not taken and number != start):
            continue
        highest = max(highest, number)
        if highest >= stop:
            break
        taken.append(packet)
        if len(taken) == highest - start + 1:
            whole_until = len(taken)
    return taken[:whole_until]
