"""Writing video: mp4, webm, gif, a folder of PNGs or one, whole or not at all, with the record of the run inside.

Frames are an iterable of uint8 tensors (H, W, 3), RGB. Any size is kept: H.264 counts 4:2:0 in pairs of pixels and
even its cropping window moves in steps of two, so an odd width or height is written as 4:4:4 in mp4, which everything
built on FFmpeg plays, but not every device does. VP9 keeps odd sizes in 4:2:0.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

from vgen.errors import UsageError, VgenError
from vgen.outputs import LATENTS, PICTURE, check_frames, check_output, whole
from vgen.probe import SWSCALE, UNTAGGED, Probe, open_video, probe

H264 = ("libx264", "libopenh264", "h264_videotoolbox", "h264_mf")  # the first that this build of FFmpeg has
GIF_FPS = 50  # players show a delay below 2 hundredths of a second as ten
_BT709, _LIMITED, _FULL = 1, 1, 2  # code points of ITU-T H.273, and FFmpeg's numbers for limited and full range
_COMMENT = "comment"


@dataclass(frozen=True)
class Look:
    """How a player is to show the frames of a video: the code points of ITU-T H.273, and the shape of a pixel.

    Matrix 2 leaves a video untagged. `aspect` is width / height of one pixel.
    """

    primaries: int = _BT709
    transfer: int = _BT709
    matrix: int = _BT709
    range: int = _LIMITED
    aspect: Fraction = Fraction(1)

    @staticmethod
    def of(told: Probe) -> Look:
        """That of a video that was read, so that what is written is shown as it is; BT.709 for one stored as RGB."""
        if told.pix_fmt.startswith(("rgb", "bgr", "gbr", "pal")) or told.color_space not in (*SWSCALE, 2):
            return Look(aspect=told.pixel_aspect)
        full = told.color_range == _FULL or told.pix_fmt.startswith("yuvj")
        tags = (told.color_primaries, told.color_trc, told.color_space)
        return Look(*tags, _FULL if full else _LIMITED, told.pixel_aspect)


def write(
    path: Path | str,
    frames: Iterable[Tensor],
    fps: Fraction,
    *,
    metadata: Mapping[str, Any] | None = None,
    quality: int = 18,
    look: Look | None = None,
    hold: Fraction | None = None,
) -> Path:
    """Write frames (H, W, 3) uint8 at an exact rate; the extension says as what, none makes a folder of PNGs.

    A .png takes one frame. `metadata` is kept as JSON in the file. `quality` is the constant rate factor of H.264,
    0 best to 51; VP9's is set to match. `look` is how a video is shown, BT.709 when absent; `hold` is how long a GIF
    shows its last frame, in seconds. Replaces what is at `path`, in one step. Raises VgenError for frames that do
    not fit together or a disk that refuses, UsageError for an extension that is no video's or picture's.
    """
    kind = check_output(path, overwrite=True)
    target = Path(path)
    if kind == LATENTS:
        raise UsageError(f"'{path}' is a latent file; frames are not latents.", "Name an .mp4, .webm, .gif or folder.")
    if fps <= 0 or not 0 <= quality <= 51 or (kind == ".gif" and fps > GIF_FPS):
        raise UsageError(
            f"'{path}' cannot be written at {float(fps):g} fps with quality {quality}.",
            f"fps above 0 (a GIF: up to {GIF_FPS}), quality from 0 to 51.",
        )
    arrays = _arrays(frames)
    first = next(arrays, None)
    if first is None:
        raise VgenError(f"'{path}' was not written: there are no frames.")
    if kind == PICTURE:
        check_frames(target, 1 + sum(1 for _ in arrays))
    arrays = chain([first], arrays)
    note = None if metadata is None else as_text(metadata)
    with whole(target) as temporary:
        if not kind:
            _write_pngs(temporary, arrays, note)
            return target
        if kind == PICTURE:
            _write_png(temporary, first, note)
            return target
        try:
            if kind == ".gif":
                count = _write_gif(temporary, arrays, fps, hold)
            else:
                count = _encode(temporary, arrays, fps, note, quality, look or Look())
        except av.FFmpegError as error:
            if isinstance(error, OSError):  # the disk's, not the encoder's
                raise
            size = f"{first.shape[1]}x{first.shape[0]}"
            raise VgenError(f"'{path}' was not written: the encoder refuses {size} ({error.strerror}).") from error
        if kind == ".gif" and note is not None:
            _comment_gif(temporary, note)
        found = len(probe(temporary).pts)
        if found != count:
            raise VgenError(f"'{path}' was not written: {count} frames went in, {found} came out.")
    return target


def as_text(metadata: Mapping[str, Any]) -> str:
    """A record as it stands in a file."""
    return json.dumps(metadata, sort_keys=True, ensure_ascii=False, default=str)


def read_metadata(path: Path | str) -> dict[str, Any]:
    """The record in a file or folder that `write` made; empty where there is none. Raises BadClip."""
    path = Path(path)
    if path.is_dir():
        first = min(path.glob("frame_*.png"), default=None)
        return {} if first is None else read_metadata(first)
    if path.suffix.lower() == ".png":
        with Image.open(path) as image:
            note = str(image.info.get(_COMMENT, ""))
    else:
        with open_video(path) as container:
            note = next((v for k, v in container.metadata.items() if k.lower() == _COMMENT), "")
    try:
        record = json.loads(note)
    except ValueError:  # another program's comment
        return {}
    return record if isinstance(record, dict) else {}


def contact_sheet(frames: Iterable[Tensor], path: Path | str, columns: int | None = None) -> Path:
    """All frames (H, W, 3) uint8 side by side in one PNG, small ones enlarged to 128 pixels of width."""
    path = Path(path)
    arrays = list(_arrays(frames))
    if not arrays:
        raise VgenError(f"'{path}' was not written: there are no frames.")
    scale = math.ceil(128 / arrays[0].shape[1])
    height, width = (side * scale for side in arrays[0].shape[:2])
    columns = columns or math.ceil(math.sqrt(len(arrays) * height / width))
    rows, gap = math.ceil(len(arrays) / columns), 2
    sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    for index, array in enumerate(arrays):
        top, left = index // columns * (height + gap), index % columns * (width + gap)
        sheet[top : top + height, left : left + width] = array.repeat(scale, 0).repeat(scale, 1)
    with whole(path) as temporary:
        Image.fromarray(sheet).save(temporary, format="PNG")
    return path


def _arrays(frames: Iterable[Tensor]) -> Iterator[np.ndarray]:
    """Frames as contiguous arrays. Raises VgenError for one of another kind or size than (H, W, 3) uint8."""
    shape = None
    for index, frame in enumerate(frames):
        if frame.dtype != torch.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
            raise VgenError(f"Frame {index} is {frame.dtype} {tuple(frame.shape)}; uint8 (H, W, 3) is written.")
        if frame.shape != (shape or frame.shape):
            raise VgenError(f"Frame {index} is {tuple(frame.shape)}, those before it {tuple(shape or ())}.")
        shape = frame.shape
        yield np.ascontiguousarray(frame.detach().cpu().numpy())


def _encode(path: Path, arrays: Iterator[np.ndarray], fps: Fraction, note: str | None, quality: int, look: Look) -> int:
    """H.264 in mp4 or VP9 in webm. Returns the number of frames."""
    first = next(arrays)
    height, width = first.shape[:2]
    mp4 = path.suffix == ".mp4"
    with av.open(str(path), "w", options={"movflags": "+faststart"} if mp4 else {}) as container:
        if note is not None:
            container.metadata[_COMMENT] = note
        stream: Any = container.add_stream(_h264() if mp4 else "libvpx-vp9", rate=fps)
        stream.width, stream.height = width, height
        stream.pix_fmt = "yuv444p" if mp4 and (width % 2 or height % 2) else "yuv420p"
        _tune(stream, fps, quality, look)
        matrix = SWSCALE.get(look.matrix, UNTAGGED)
        count = 0
        for array in chain([first], arrays):
            frame = av.VideoFrame.from_ndarray(array, format="rgb24")
            frame = frame.reformat(format=stream.pix_fmt, dst_colorspace=matrix, dst_color_range=look.range)
            frame.pts, frame.time_base = count, 1 / fps
            container.mux(stream.encode(frame))
            count += 1
        container.mux(stream.encode())
    return count


def _tune(stream: Any, fps: Fraction, quality: int, look: Look) -> None:
    """Rate, colour tags, shape of pixels and quality of an encoder."""
    context = stream.codec_context
    context.time_base = 1 / fps
    context.color_primaries, context.color_trc, context.colorspace = look.primaries, look.transfer, look.matrix
    context.color_range = look.range
    if look.aspect != 1:
        context.sample_aspect_ratio = look.aspect
    name = context.codec.name
    if name == "libx264":
        stream.options = {"crf": str(quality)}
    elif name == "libvpx-vp9":
        stream.options = {"crf": str(round(quality * 63 / 51)), "b": "0", "row-mt": "1", "cpu-used": "2"}
    else:  # encoders without a constant rate factor: 0.2 bits a pixel is about 18
        context.bit_rate = max(100_000, int(stream.width * stream.height * fps * 2 ** ((18 - quality) / 6) / 5))


def _h264() -> str:
    """The H.264 encoder to use. Raises VgenError where there is none."""
    for name in H264:
        if name in av.codecs_available:
            return name
    raise VgenError("This build of PyAV has no H.264 encoder.", "Write .webm or .gif, or install PyAV from PyPI.")


def _write_gif(path: Path, arrays: Iterator[np.ndarray], fps: Fraction, hold: Fraction | None) -> int:
    """A GIF with one palette made from all frames. Its clock ticks in hundredths; no frame is off by more than half."""
    first = next(arrays)
    tick = Fraction(1, 100)
    graph = av.filter.Graph()
    source = graph.add_buffer(
        width=first.shape[1], height=first.shape[0], format=av.VideoFormat("rgb24"), time_base=tick
    )
    split, make = graph.add("split"), graph.add("palettegen", "reserve_transparent=0")
    use, sink = graph.add("paletteuse", "dither=sierra2_4a"), graph.add("buffersink")
    source.link_to(split)
    split.link_to(use, 0, 0)
    split.link_to(make, 1, 0)
    make.link_to(use, 0, 1)
    use.link_to(sink)
    graph.configure()
    count = 0
    for count, array in enumerate(chain([first], arrays), 1):
        frame = av.VideoFrame.from_ndarray(array, format="rgb24")
        frame.pts, frame.time_base = round((count - 1) * 100 / fps), tick
        graph.push(frame)
    graph.push(None)
    with av.open(str(path), "w", format="gif") as container:
        stream: Any = container.add_stream("gif", rate=fps)
        stream.width, stream.height, stream.pix_fmt = first.shape[1], first.shape[0], "pal8"
        stream.codec_context.time_base = tick
        for index in range(count):
            shown: Any = graph.pull()
            shown.time_base = tick
            for packet in stream.encode(shown):
                if hold is not None and index == count - 1:
                    packet.duration = round(hold * 100)
                container.mux(packet)
        container.mux(stream.encode())
    return count


def _comment_gif(path: Path, note: str) -> None:
    """Put a comment extension (GIF89a, section 24) behind the global colour table."""
    data = path.read_bytes()
    behind = 13 + (3 << (data[10] & 7) + 1 if data[10] & 0x80 else 0)
    text = note.encode()
    blocks = b"".join(bytes([len(b)]) + b for b in (text[k : k + 255] for k in range(0, len(text), 255)))
    path.write_bytes(data[:behind] + b"\x21\xfe" + blocks + b"\x00" + data[behind:])


def _write_pngs(folder: Path, arrays: Iterator[np.ndarray], note: str | None) -> None:
    """frame_00000.png and on; the first carries the record."""
    folder.mkdir()
    for index, array in enumerate(arrays):
        _write_png(folder / f"frame_{index:05d}.png", array, note if index == 0 else None)


def _write_png(path: Path, array: np.ndarray, note: str | None) -> None:
    """One frame, with the record where there is one."""
    chunks = PngImagePlugin.PngInfo()
    if note is not None:
        chunks.add_itxt(_COMMENT, note)
    Image.fromarray(array).save(path, format="PNG", pnginfo=chunks)
