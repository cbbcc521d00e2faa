"""The classic methods as a model: frames of any time between two."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vgen.family import Checkpoint
from vgen.machine import Machine
from vgen.plugins.classic.flow import Motion


def load(folder: Path | None, checkpoint: Checkpoint, machine: Machine) -> Classic:
    """The model; there is nothing to load."""
    return Classic(machine)


class Classic:
    """Interpolates by the method that the options name."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def at(self, ends: Tensor, places: Sequence[float], options: Any) -> Tensor:
        """Frames (B, 3, T, H, W) at the T `places` between 0 and 1 of each pair `ends` (B, 3, 2, H, W)."""
        method = {"flow": _flow, "linear": _linear, "duplicate": _duplicate}[options.method]
        return torch.stack([method(pair, places) for pair in ends])


def _linear(pair: Tensor, places: Sequence[float]) -> Tensor:
    return torch.stack([torch.lerp(pair[:, 0], pair[:, 1], place) for place in places], 1)


def _duplicate(pair: Tensor, places: Sequence[float]) -> Tensor:
    return pair[:, :1].expand(-1, len(places), -1, -1)


def _flow(pair: Tensor, places: Sequence[float]) -> Tensor:
    motion = Motion(pair[:, 0], pair[:, 1])
    return torch.stack([motion.at(place) for place in places], 1)
