"""Orbits around a cube of six colours, drawn in closed form: parallel rays, each met with the cube's three slabs."""

from __future__ import annotations

from fractions import Fraction
from math import cos, radians, sin
from pathlib import Path

import numpy as np
import torch

from vgen.video_write import write

COLOURS = np.array(  # of the faces +x, +y, +z, -x, -y, -z; black is the background
    [(230, 40, 40), (40, 200, 40), (40, 80, 230), (230, 210, 40), (40, 210, 210), (210, 40, 210)], np.uint8
)
HALF = 0.5  # of an edge; a frame shows from -1 to 1


def axes(azimuth: float, elevation: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where a camera at these degrees looks, and what is right and up for it; it stands at azimuth 0 on +x, z is up."""
    a, e = radians(azimuth), radians(elevation)
    ahead = -np.array([cos(e) * cos(a), cos(e) * sin(a), sin(e)])
    return ahead, np.array([-sin(a), cos(a), 0.0]), np.array([-sin(e) * cos(a), -sin(e) * sin(a), cos(e)])


def view(azimuth: float, elevation: float, size: int = 32) -> np.ndarray:
    """A picture (size, size, 3) of 8 bits of the cube, in parallel perspective."""
    ahead, right, up = axes(azimuth, elevation)
    place = (2 * np.arange(size) + 1) / size - 1
    start = place[None, :, None] * right - place[:, None, None] * up - 9 * ahead
    slope = np.where(abs(ahead) < 1e-9, 1e-9, ahead)
    near, far = np.sort(np.stack([(-HALF - start) / slope, (HALF - start) / slope]), 0)
    face = near.argmax(-1)
    picture = COLOURS[face + 3 * (ahead[face] > 0)]
    return np.where((near.max(-1) < far.min(-1))[..., None], picture, 0).astype(np.uint8)


def turn(elevation: float, count: int = 21, size: int = 32, start: float = 0.0) -> np.ndarray:
    """Frames (count, size, size, 3) of a camera that goes once around: view k is turned by 360 k / count degrees."""
    return np.stack([view(start + 360 * k / count, elevation, size) for k in range(count)])


def clip(path: Path, elevation: float, *, start: float = 0.0) -> Path:
    """An orbit of 21 views as a file, at 7 frames a second."""
    write(path, torch.from_numpy(turn(elevation, start=start)), Fraction(7))
    return path
