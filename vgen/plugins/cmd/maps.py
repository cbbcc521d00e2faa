"""Motion as the motion model sees it: one map of all rows beside all columns, and back."""

from __future__ import annotations

import torch
from torch import Tensor


def joined(motion_x: Tensor, motion_y: Tensor) -> Tensor:
    """Motion of rows (B, D, T, H, 1) and of columns (B, D, T, 1, W) as a map (B, D, T, H + W, 1)."""
    return torch.cat([motion_x, motion_y.transpose(3, 4)], 3)


def parted(made: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """The inverse of `joined`; `rows` is H."""
    return made[:, :, :, :rows], made[:, :, :, rows:].transpose(3, 4)
