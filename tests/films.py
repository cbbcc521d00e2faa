"""Small films with motion, cuts and sound, for tests of verbs that make a film of a film."""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from torch import Tensor

from vgen.video_write import write

RATE = 44100
NOW = Fraction(0)


def scene(count: int, height: int = 96, width: int = 128, *, hue: int = 0, speed: float = 2.0) -> Iterator[Tensor]:
    """A soft bright ball that moves to the right over a still slope; `hue` turns the colours.

    Not smaller by default, for x264 does not repeat itself on frames of about 64x48.
    """
    y, x = torch.meshgrid(torch.arange(height).float(), torch.arange(width).float(), indexing="ij")
    ground = torch.stack([40 + 100 * x / width, 60 + 80 * y / height, torch.full_like(x, 90)], -1).roll(hue, -1)
    colour = torch.tensor([250.0, 210.0, 30.0]).roll(hue, -1)
    for k in range(count):
        centre = width / 4 + k * speed
        cover = torch.sigmoid(height / 6 - ((x - centre) ** 2 + (y - height / 2) ** 2).sqrt())[..., None]
        yield (ground * (1 - cover) + colour * cover).round().to(torch.uint8)


def film(path: Path, count: int = 9, fps: Fraction | int = 10, **told: Any) -> Path:
    """A scene in a file."""
    return write(path, scene(count, **told), Fraction(fps))


def with_sound(video: Path, path: Path, *, codec: str = "aac", tracks: int = 1, late: Fraction = NOW) -> Path:
    """The same video, which begins `late`, with a second and a half of sine waves, another pitch on each track."""
    with av.open(str(video)) as read, av.open(str(path), "w") as target:
        old = read.streams.video[0]
        pictures = target.add_stream_from_template(old)
        sounds: list[Any] = [target.add_stream(codec, rate=RATE if codec == "aac" else 48000) for _ in range(tracks)]
        for k, one in enumerate(sounds):
            one.codec_context.layout = "mono"
            one.metadata["language"] = ("eng", "deu", "fra")[k]
        for packet in read.demux(old):
            if packet.dts is not None:
                shift = round(late / packet.time_base)
                packet.pts, packet.dts, packet.stream = packet.pts + shift, packet.dts + shift, pictures
                target.mux(packet)
        for k, one in enumerate(sounds):
            rate = one.codec_context.sample_rate
            wave = np.sin(np.arange(int(1.5 * rate)) * (2 * math.pi * (220 + 110 * k) / rate)).astype(np.float32)
            frame = av.AudioFrame.from_ndarray(wave[None], format="fltp", layout="mono")
            frame.sample_rate, frame.pts = rate, 0
            resampler = av.AudioResampler(format=one.codec_context.format, layout="mono", rate=rate)
            for part in [*resampler.resample(frame), *resampler.resample(None)]:
                target.mux(one.encode(part))
            target.mux(one.encode())
    return path


def heard(path: Path) -> list[list[tuple[Fraction, bytes]]]:
    """The packets of each sound track: when, and what."""
    found: dict[int, list[tuple[Fraction, bytes]]] = {}
    with av.open(str(path)) as container:
        for packet in container.demux(container.streams.audio) if container.streams.audio else ():
            if packet.pts is not None:
                assert packet.time_base is not None
                found.setdefault(packet.stream.index, []).append((packet.pts * packet.time_base, bytes(packet)))
    return [found[index] for index in sorted(found)]
