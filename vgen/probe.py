"""What a video file holds, from its header and its packets, and which decoder can be trusted with it.

Only the first frame is decoded (its side data alone tell how to turn the picture upright).
decord is the default. It was seen to give wrong frames, without an error, in the cases that `_fault` lists; PyAV,
read in order, was right in each of them.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

import av

from vgen.errors import VgenError

logging.getLogger("libav").addHandler(logging.NullHandler())  # else FFmpeg's words go to stderr by themselves
DECORD_CONTAINERS = ("mp4", "matroska")
DECORD_CODECS = ("h264", "hevc", "vp8", "vp9")
SWSCALE = {1: 1, 4: 4, 5: 5, 6: 5, 7: 7, 9: 9, 10: 9}  # H.273 matrix -> swscale's
UNTAGGED = 5  # what swscale takes an untagged clip for: BT.601


class BadClip(VgenError):
    """A file that gives no trustworthy frames. Batch commands set it aside with `reason` and go on."""

    def __init__(self, path: Path, reason: str, do: str = "") -> None:
        super().__init__(f"{path}: {reason}.", do)
        self.path = path
        self.reason = reason


@dataclass(frozen=True)
class Probe:
    """A video file. Times are in seconds, sizes in pixels as shown (turned upright).

    `pts` are the stamps of the frames that are shown, in order; `stamped` is False where the container has
    none (AVI) and they are counted. With `open_gop` decoding cannot start clean at every key frame. `rotation` is
    clockwise, after mirroring left to right where `mirrored`. `pixel_aspect` is width / height of one pixel as
    shown. Colour tags are the code points of ITU-T H.273 (2: not said), `color_range` 1 for limited, 2 for full.
    """

    path: Path
    container: str
    codec: str
    width: int
    height: int
    rotation: int
    mirrored: bool
    pixel_aspect: Fraction
    fps: Fraction
    pts: tuple[Fraction, ...]
    duration: Fraction
    time_base: Fraction
    stamped: bool
    vfr: bool
    open_gop: bool
    has_audio: bool
    pix_fmt: str
    bits: int
    color_primaries: int
    color_trc: int
    color_space: int
    color_range: int
    decoder: str
    why: str


@dataclass(frozen=True)
class _Packet:
    """The stamps of one packet, in ticks, in the order of decoding."""

    pts: int | None
    dts: int | None
    duration: int
    key: bool
    idr: bool
    discard: bool


def probe(path: Path | str) -> Probe:
    """Read header and packets. Raises BadClip."""
    path = Path(path)
    _check_file(path)
    with open_video(path) as container:
        stream = video_stream(container, path)
        try:
            first, packets = _demux(container, stream)
        except av.FFmpegError as error:
            raise BadClip(path, f"its first frame does not decode ({error.strerror})") from error
        if first is None or not packets:
            raise BadClip(path, "it holds no frame that decodes")
        name = _container(container)
        if len(packets) < (stream.frames if name == "avi" else len(stream.index_entries) if name == "mp4" else 0):
            raise BadClip(path, "it is cut short: its index lists more frames than it holds")
        return _describe(path, name, container, stream, first, packets)


def open_video(path: Path) -> Any:
    """An open PyAV container. Only local files are followed, whatever a playlist names. Raises BadClip."""
    try:
        return av.open(str(path.resolve()), metadata_errors="ignore", options={"protocol_whitelist": "file"})
    except (av.FFmpegError, OSError) as error:
        raise BadClip(path, f"it is not a readable video ({error.strerror})") from error


def video_stream(container: Any, path: Path) -> Any:
    """The video stream of a container, set to fail on damage rather than to paint over it. Raises BadClip."""
    stream = container.streams.best("video")
    if stream is None or "attached_pic" in str(stream.disposition.name or ""):
        raise BadClip(path, "it has no video stream")
    if stream.codec_context is None:
        raise BadClip(path, "this build of FFmpeg has no decoder for its video stream")
    stream.codec_context.options = {"err_detect": "explode"}
    return stream


def _check_file(path: Path) -> None:
    """Raises BadClip for what cannot be a whole video: not there, empty, or shorter than it says."""
    if not path.is_file():
        raise BadClip(path, "it is a folder" if path.is_dir() else "there is no such file")
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            said = _said_size(file, size)
    except OSError as error:
        raise BadClip(path, f"it cannot be read ({error.strerror})") from error
    if size == 0:
        raise BadClip(path, "it is empty")
    if said > size:
        raise BadClip(path, f"it is cut short: {size} bytes of {said}")


def _said_size(file: IO[bytes], size: int) -> int:
    """How long an mp4 or Matroska file says it is, in bytes; 0 where it does not say."""
    head = file.read(64)
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"free", b"wide", b"skip", b"styp"):
        return _boxes_end(file, size)
    segment = head.find(b"\x18\x53\x80\x67") if head[:4] == b"\x1a\x45\xdf\xa3" else -1
    if segment < 0 or len(head) < segment + 12:
        return 0
    width = 9 - head[segment + 4].bit_length()
    number = int.from_bytes(head[segment + 4 : segment + 4 + width], "big") & ((1 << 7 * width) - 1)
    unknown = number == (1 << 7 * width) - 1
    return 0 if unknown else segment + 4 + width + number


def _boxes_end(file: IO[bytes], size: int) -> int:
    """Where the last top-level box of an mp4 file of `size` bytes ends."""
    end = 0
    while end + 8 <= size:
        file.seek(end)
        head = file.read(16)
        length = int.from_bytes(head[:4], "big")
        if length == 1:
            length = int.from_bytes(head[8:16], "big")
        if length < 8 or not head[4:8].isalnum():  # 0 means up to the end; anything else is trailing rubbish
            return min(end, size)
        end += length
    return end


def _container(container: Any) -> str:
    """A short name of the container."""
    name = str(container.format.name)
    return {"mov,mp4,m4a,3gp,3g2,mj2": "mp4", "matroska,webm": "matroska"}.get(name, name)


def packets_of(container: Any, stream: Any) -> Iterator[Any]:
    """Packets from the next key frame on, without those shown before it: they are made from frames in front of it."""
    numbered = _container(container) != "avi"  # else the stamps of packets say nothing about the screen
    begun, start = False, None
    for packet in container.demux(stream):
        if packet.size == 0 or not (begun or packet.is_keyframe):
            continue
        if not begun:
            begun, start = True, packet.pts if numbered else None
        if start is None or packet.pts is None or packet.pts >= start:
            yield packet


def _demux(container: Any, stream: Any) -> tuple[Any, list[_Packet]]:
    """The first frame, and the packets that make frames."""
    first = None
    packets: list[_Packet] = []
    length_size = _nal_length_size(stream)
    for packet in packets_of(container, stream):
        if first is None:
            first = next(iter(packet.decode()), None)
        if stream.codec_context.name == "vp8" and not bytes(packet)[0] & 0x10:
            continue  # a frame that is only referred to, never shown
        idr = not packet.is_keyframe or not length_size or _has_idr(bytes(packet), length_size)
        packets.append(
            _Packet(packet.pts, packet.dts, packet.duration or 0, packet.is_keyframe, idr, packet.is_discard)
        )
    if first is None:
        first = next(iter(stream.decode(None)), None)
    return first, packets


def _nal_length_size(stream: Any) -> int:
    """Bytes of the length before each unit of H.264 in mp4 or Matroska; 0 for anything else."""
    extra = stream.codec_context.extradata
    return (extra[4] & 3) + 1 if stream.codec_context.name == "h264" and extra and extra[0] == 1 else 0


def _has_idr(data: bytes, length_size: int) -> bool:
    """Whether an H.264 packet holds a slice of an IDR picture (unit type 5), at which decoding can start clean."""
    at = 0
    while at + length_size < len(data):
        if data[at + length_size] & 0x1F == 5:
            return True
        at += length_size + int.from_bytes(data[at : at + length_size], "big")
    return False


def _describe(path: Path, name: str, container: Any, stream: Any, first: Any, packets: list[_Packet]) -> Probe:
    """Put the findings together. Raises BadClip for stamps that do not rise."""
    context, tick = stream.codec_context, Fraction(stream.time_base)
    stamped = name != "avi" and all(p.pts is not None for p in packets)
    ticks, length = _shown(packets, stamped)
    if any(a >= b for a, b in pairwise(ticks)):
        raise BadClip(path, "two of its frames carry the same time stamp")
    pts = tuple(tick * t for t in ticks) if stamped or name == "avi" else _counted(stream, len(packets))
    fps = _rate(stream, pts, tick)
    vfr = any(abs(b - a - 1 / fps) > max(tick, 1 / fps / 20) for a, b in pairwise(pts))
    rotation, mirrored = _orientation(path, first)
    aspect = Fraction(stream.sample_aspect_ratio or 1) or Fraction(1)
    lying = rotation % 180 == 90
    bits = max(c.bits for c in first.format.components)
    turned, open_gop = rotation != 0 or mirrored, _open_gop(packets)
    fault = _fault(name, context.name, packets, pts, open_gop=open_gop, bits=bits, turned=turned, vfr=vfr)
    return Probe(
        path=path,
        container=name,
        codec=stream.codec_context.codec.canonical_name,
        width=first.height if lying else first.width,
        height=first.width if lying else first.height,
        rotation=rotation,
        mirrored=mirrored,
        pixel_aspect=1 / aspect if lying else aspect,
        fps=fps,
        pts=pts,
        duration=pts[-1] - pts[0] + (tick * length or 1 / fps),
        time_base=tick,
        stamped=stamped,
        vfr=vfr,
        open_gop=open_gop,
        has_audio=bool(container.streams.audio),
        pix_fmt=first.format.name,
        bits=bits,
        color_primaries=int(context.color_primaries),
        color_trc=int(context.color_trc),
        color_space=int(context.colorspace),
        color_range=int(context.color_range),
        decoder="pyav" if fault else "decord",
        why=fault,
    )


def _shown(packets: list[_Packet], stamped: bool) -> tuple[list[int], int]:
    """Stamps of the frames that are shown, in order, in ticks, and the length of the last one.

    An AVI file numbers its packets, so their decoding stamps, sorted, are the times of its frames.
    """
    if not stamped:
        dts = sorted(p.dts for p in packets if p.dts is not None)
        return [t - dts[0] for t in dts], packets[-1].duration
    shown = sorted((p.pts, p.duration) for p in packets if p.pts is not None and not p.discard)
    return [t for t, _ in shown], shown[-1][1] if shown else 0


def _counted(stream: Any, count: int) -> tuple[Fraction, ...]:
    """Stamps of a stream that has none, from its frame rate."""
    rate = Fraction(stream.average_rate or stream.guessed_rate or 25)
    return tuple(k / rate for k in range(count))


def _rate(stream: Any, pts: tuple[Fraction, ...], tick: Fraction) -> Fraction:
    """The frame rate: what the header says where the stamps agree, else the mean over the stamps."""
    said = Fraction(stream.average_rate or stream.guessed_rate or 0)
    if len(pts) < 2:
        return said or Fraction(1)
    span, steps = pts[-1] - pts[0], len(pts) - 1
    if said and abs(steps / said - span) <= max(2 * tick, span / 1000):
        return said
    return (steps / span).limit_denominator(100_000)


def _orientation(path: Path, frame: Any) -> tuple[int, bool]:
    """Degrees clockwise, and whether to mirror before that, from the display matrix (ISO 14496-12, 8.3.2)."""
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return 0, False
    a, b, _, c, d, *_ = struct.unpack("=9i", bytes(data))
    degrees = math.degrees(math.atan2(-c, d))
    quarters = round(degrees / 90)
    if abs(degrees - 90 * quarters) > 1:
        raise BadClip(path, f"it is to be shown turned by {degrees:.0f} degrees; only quarter turns are read")
    return quarters % 4 * 90, a * d - b * c < 0


def _fault(
    name: str,
    codec: str,
    packets: Iterable[_Packet],
    pts: tuple[Fraction, ...],
    *,
    open_gop: bool,
    bits: int,
    turned: bool,
    vfr: bool,
) -> str:
    """Why decord 0.6 is not to be trusted with a file; empty where it is."""
    faults = (
        (importlib.util.find_spec("decord") is None, "decord is not installed"),
        (name == "mpegts", "decord reads MPEG-TS one group of pictures late"),
        (name == "avi", "decord seeks wrongly in AVI"),
        (codec in ("av1", "libdav1d", "libaom-av1"), "decord cannot open AV1"),
        (name not in DECORD_CONTAINERS or codec not in DECORD_CODECS, f"decord is not trusted with {codec} in {name}"),
        (any(p.discard for p in packets), "decord shows frames that the edit list hides"),
        (bool(pts) and pts[0] != 0, "decord loses the stamps of a clip that does not start at 0"),
        (open_gop, "decord seeks wrongly in open groups of pictures"),
        (turned, "decord's batches fail on clips with a rotation flag"),
        (bits > 8, f"{bits} bits a channel are converted by PyAV"),
        (vfr, "the frame rate varies and exact times are wanted"),
    )
    return next((why for is_so, why in faults if is_so), "")


def _open_gop(packets: Iterable[_Packet]) -> bool:
    """Whether some key frame is not a clean start: not IDR, or followed by frames shown before it."""
    key = None
    for index, packet in enumerate(packets):
        if packet.key:
            key = packet.pts
            if index and not packet.idr:
                return True
        elif key is not None and packet.pts is not None and packet.pts < key:
            return True
    return False
