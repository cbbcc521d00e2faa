"""Clips whose camera is known: frames of a wallpaper, filmed from a moving pose."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from vgen.video_write import write

Frames = np.ndarray[Any, np.dtype[np.uint8]]
POSES: dict[str, dict[str, float]] = {  # a motion of each word, in units of camera.Motion
    "pan-left": {"pan": -0.2},
    "pan-right": {"pan": 0.2},
    "tilt-up": {"tilt": 0.2},
    "tilt-down": {"tilt": -0.2},
    "zoom-in": {"zoom": 0.3},
    "zoom-out": {"zoom": -0.3},
    "roll-left": {"roll": -0.3},
    "roll-right": {"roll": 0.3},
    "static": {},
}


def wallpaper(height: int, width: int, seed: int = 0) -> Frames:
    """A picture of smooth random blobs, three times the frame's size, none of it darker than 40."""
    noise = np.random.default_rng(seed).normal(size=(3 * height, 3 * width, 3)).astype(np.float32)
    soft = cv2.GaussianBlur(noise, (0, 0), min(height, width) / 20)
    return np.clip(140 + 50 * soft / soft.std(), 40, 255).astype(np.uint8)


def filmed(
    count: int = 9,
    height: int = 96,
    width: int = 128,
    pan: float = 0,
    tilt: float = 0,
    zoom: float = 0,
    roll: float = 0,
    *,
    seed: int = 0,
) -> Frames:
    """What a camera sees that moves so over the clip (units of Motion) before a wallpaper: its pose, frame by frame."""
    wall, frames = wallpaper(height, width, seed), []
    for u in np.linspace(0, 1, count):
        scale, turn = math.exp(zoom * u), roll * u
        cos, sin = math.cos(turn) / scale, math.sin(turn) / scale
        x, y = 1.5 * width + pan * u * width, 1.5 * height - tilt * u * height  # up is towards smaller y
        to_wall = np.array([[cos, -sin, x - cos * width / 2 + sin * height / 2], [sin, cos, 0]], np.float64)
        to_wall[1, 2] = y - sin * width / 2 - cos * height / 2
        frames.append(cv2.warpAffine(wall, to_wall, (width, height), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP))
    return np.stack(frames).astype(np.uint8)


def clip(path: Path, word: str, seed: int = 0, count: int = 9, size: tuple[int, int] = (48, 64)) -> Path:
    """Write a clip of that motion, 8 frames a second."""
    frames = filmed(count, *size, **POSES[word], seed=seed)
    return write(path, torch.from_numpy(frames), Fraction(8))
