"""Test clips whose every frame carries its own number as a barcode that survives compression."""

from collections.abc import Iterable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from torch import Tensor

HEIGHT, WIDTH, BITS = 48, 128, 8


def picture(number: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """(H, W, 3) uint8: red above, blue below, and between them 8 black or white blocks, the highest bit first."""
    image = np.zeros((height, width, 3), np.uint8)
    third = height // 3
    image[:third] = (200, 30, 30)
    image[2 * third :] = (30, 30, 200)
    for bit in range(BITS):
        left, right = bit * width // BITS, (bit + 1) * width // BITS
        image[third : 2 * third, left:right] = 255 * (number >> (BITS - 1 - bit) & 1)
    return image


def number(frame: Tensor) -> int:
    """The number that a frame (H, W, 3) carries; it must stand upright."""
    height, width = frame.shape[:2]
    top, bottom = frame[height // 6].float().mean(0), frame[height - height // 6].float().mean(0)
    assert top[0] > top[2] + 60, "not upright"
    assert bottom[2] > bottom[0] + 60, "not upright"
    row = frame[height // 2 - 2 : height // 2 + 2].float().mean((0, 2))
    blocks = [row[(2 * bit + 1) * width // (2 * BITS)] > 128 for bit in range(BITS)]
    return sum(int(on) << (BITS - 1 - bit) for bit, on in enumerate(blocks))


def numbers(frames: Iterable[Tensor]) -> list[int]:
    """The numbers of all frames."""
    return [number(frame) for frame in frames]


def make(
    path: Path,
    count: int = 30,
    fps: Fraction = Fraction(10),
    *,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    pts: Iterable[int] | None = None,
    rotation: int = 0,
    options: Mapping[str, str] | None = None,
    size: tuple[int, int] = (HEIGHT, WIDTH),
    tags: Mapping[str, int] | None = None,
    bframes: int | None = None,
    gop: int = 12,
) -> Path:
    """Write a clip of numbered frames; `pts` are in units of 1 / fps, `rotation` in degrees clockwise."""
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=fps)
        stream.height, stream.width, stream.pix_fmt, stream.gop_size = *size, pix_fmt, gop
        stream.options = dict(options or {})
        stream.codec_context.time_base = 1 / fps
        if bframes is not None:
            stream.codec_context.max_b_frames = bframes
        for name, value in (tags or {}).items():
            setattr(stream.codec_context, name, value)
        if rotation:
            stream.set_display_rotation(-rotation)
        for index, stamp in enumerate(range(count) if pts is None else pts):
            image = torch.from_numpy(picture(index, *(size if rotation % 180 == 0 else size[::-1])))
            stored = torch.rot90(image, rotation // 90).contiguous().numpy()  # turned back; the flag undoes it
            frame = av.VideoFrame.from_ndarray(stored, format="rgb24").reformat(format=pix_fmt)
            frame.pts, frame.time_base = stamp, 1 / fps
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def remux(source: Path, path: Path, *, start: float = 0.0, offset: float = 0.0) -> Path:
    """Copy packets without decoding, from the key frame before `start`, stamps shifted so that `start` is `offset`.

    A start between key frames leaves frames before time zero, which mp4 hides behind an edit list.
    """
    with av.open(str(source)) as read, av.open(str(path), "w") as write:
        old = read.streams.video[0]
        new = write.add_stream_from_template(old)
        assert old.time_base is not None
        if start:
            read.seek(round(start / old.time_base), stream=old)
        shift = round((offset - start) / old.time_base)
        for packet in read.demux(old):
            if packet.dts is None or packet.pts is None:
                continue
            packet.pts, packet.dts, packet.stream = packet.pts + shift, packet.dts + shift, new
            write.mux(packet)
    return path
