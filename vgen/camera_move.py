"""Camera moves that are made: a window that pans, tilts, zooms or rolls over larger pictures and never leaves them."""

from __future__ import annotations

import math
from collections.abc import Iterator

import cv2
import numpy as np
from numpy.typing import NDArray

from vgen.camera import SIGNS

ROOM = 1.5  # how many times the frame's size the pictures have that a window moves over
AMOUNTS = {"pan": (0.08, 0.3), "tilt": (0.08, 0.3), "zoom": (0.15, 0.37), "roll": (0.12, 0.4)}  # units of camera.Motion


def moved(pictures: NDArray[np.uint8], word: str, size: tuple[int, int, int], seed: int) -> NDArray[np.uint8]:
    """Frames (T, H, W, 3) of `size` (T, H, W) that a window shows which moves the way of a word of `camera`.

    `pictures` are one for each frame, or one for all, ROOM times as high and as wide. How far, where, and how softly
    it starts and ends is drawn from `seed`.
    """
    count, height, width = size
    frames = np.empty((count, height, width, 3), np.uint8)
    for k, pose in enumerate(_poses(word, size, np.random.default_rng(seed))):
        frames[k] = cv2.warpAffine(
            pictures[min(k, len(pictures) - 1)],
            pose,
            (width, height),
            flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
            borderMode=cv2.BORDER_REFLECT_101,  # of the half pixel at the very edge
        )
    return frames


def _poses(word: str, size: tuple[int, int, int], rng: np.random.Generator) -> Iterator[NDArray[np.float64]]:
    """For each frame the map (2, 3) from its pixels to those of the picture."""
    count, height, width = size
    axis, sign = SIGNS.get(word, ("", 0))
    amount = sign * rng.uniform(*AMOUNTS[axis]) if axis else 0.0
    ease, aside = rng.uniform(), rng.uniform(-1, 1, 2)
    u = np.linspace(0, 1, count) if count > 1 else np.zeros(1)
    u = (1 - ease) * u + ease * u * u * (3 - 2 * u) - 0.5
    way = {one: amount * u if one == axis else 0 * u for one in AMOUNTS}
    bound = _bound(abs(amount) / 2, height / width) if axis == "roll" else 1.0
    scale = math.exp(abs(amount) / 2) if axis == "zoom" else min(1.0, ROOM / bound)  # enlarges only for want of room
    scales = scale * np.exp(-way["zoom"])
    free = [max(ROOM - scales.max() * bound - np.ptp(way[one]), 0.0) / 2 for one in ("pan", "tilt")]
    xs = (ROOM / 2 + aside[0] * free[0] + way["pan"]) * width - 0.5
    ys = (ROOM / 2 + aside[1] * free[1] - way["tilt"]) * height - 0.5
    across, down = (width - 1) / 2, (height - 1) / 2
    for x, y, scale, turn in zip(xs, ys, scales, way["roll"], strict=True):
        cos, sin = scale * math.cos(turn), scale * math.sin(turn)
        yield np.array([[cos, -sin, x - cos * across + sin * down], [sin, cos, y - sin * across - cos * down]])


def _bound(angle: float, aspect: float) -> float:
    """How many times larger the upright box around a turned frame is; `aspect` is height over width."""
    return math.cos(angle) + math.sin(angle) * max(aspect, 1 / aspect)
