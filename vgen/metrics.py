"""Figures of merit that need no learned network."""

from __future__ import annotations

import math

from torch import Tensor


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio in dB between pixels in [-1, 1] of any shape; infinite where they are equal."""
    error = float(((a.float().clamp(-1, 1) - b.float().clamp(-1, 1)) / 2).square().mean())
    return -10 * math.log10(error) if error > 0 else math.inf


def flicker(before: Tensor, frame: Tensor, after: Tensor) -> float:
    """How far a frame lies from the mean of its two neighbours, in levels of 255; frames are uint8 of one shape.

    Steady motion and a still give little; what jumps to and fro, or is sharp and blurred in turn, gives much.
    """
    mean = (before.float() + after.float()) / 2
    return float((frame.float() - mean).abs().mean())
