"""A family that interpolates by a formula, three frames at a time, in sizes of 16k: as a learned one is asked."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vgen.family import Checkpoint, Family
from vgen.machine import Machine
from vgen.options import InterpolateOptions


class Between:
    """Fades from one end to the other."""

    steps, multiple = 3, 16

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def between(self, ends: Tensor, options: Any, seeds: Sequence[int]) -> Tensor:
        """New frames (B, 3, 3, H, W) of pairs (B, 3, 2, H, W)."""
        assert ends.shape[1:3] == (3, 2)
        assert len(set(seeds)) == len(ends) <= options.batch_size
        assert all(side % 16 == 0 for side in ends.shape[-2:])
        time.sleep(float(os.environ.get("BETWEEN_SECONDS", "0")))
        return torch.stack([torch.lerp(ends[:, :, 0], ends[:, :, 1], k / 4) for k in (1, 2, 3)], 2)


def load(folder: Path | None, checkpoint: Checkpoint, machine: Machine) -> Between:
    """There is nothing to load."""
    return Between(machine)


family = Family(
    name="between",
    summary="A formula.",
    paper="an example",
    verbs={"interpolate": InterpolateOptions},
    load="between_family:load",
    checkpoints=(),
    examples={"interpolate": ("vgen interpolate between clip.mp4", "vgen interpolate between clip.mp4 --factor 16")},
)
