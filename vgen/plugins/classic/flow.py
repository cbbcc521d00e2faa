"""Frames between two by optical flow: both ends are read along it, and what only one end shows is taken from that one.

The flow is OpenCV's dense inverse search (Kroeger et al., arXiv 1603.03590), each way. Both flows together tell how a
pixel of the new frame moves to either end, as in Jiang et al., arXiv 1712.00080, equation 4. An end is trusted less
where the way there and back does not end where it began: there something is hidden.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

SMALLEST = 64  # pixels of a side that the flow needs
SURE = 4.0  # pixels by which the ways there and back may differ before trust falls
LEAST = 0.05  # of trust


class Motion:
    """The motion between two frames (3, H, W) in [-1, 1]."""

    def __init__(self, first: Tensor, last: Tensor) -> None:
        self.ends = torch.stack([first, last])
        grey = [_grey(end) for end in self.ends]
        self.flows = torch.stack([_flow(grey[0], grey[1]), _flow(grey[1], grey[0])])  # (2, 2, H, W), x before y
        self.grid = _grid(*first.shape[1:])
        back = _sample(self.flows.flip(0), self.grid + self.flows)
        apart = (self.flows + back).square().sum(1, keepdim=True)
        self.trust = torch.exp(apart / (-2 * SURE**2)) + LEAST  # (2, 1, H, W)

    def at(self, time: float) -> Tensor:
        """The frame (3, H, W) at a time from 0 to 1."""
        there, back = self.flows
        moves = (time * time * back - (1 - time) * time * there, (1 - time) ** 2 * there - time * (1 - time) * back)
        places = self.grid + torch.stack(moves)
        weights = _sample(self.trust, places) * torch.tensor([1 - time, time]).view(2, 1, 1, 1)
        return (_sample(self.ends, places) * weights).sum(0) / weights.sum(0)


def _grey(pixels: Tensor) -> np.ndarray:
    """(3, H, W) in [-1, 1] as (H, W) uint8 luma."""
    weights = pixels.new_tensor((0.299, 0.587, 0.114)).view(3, 1, 1)
    return ((pixels * weights).sum(0).add(1) * 127.5).round().clamp(0, 255).byte().numpy()


def _flow(first: np.ndarray, last: np.ndarray) -> Tensor:
    """The move of each pixel from the first frame to the last, (2, H, W)."""
    height, width = first.shape
    below, right = max(0, SMALLEST - height), max(0, SMALLEST - width)
    first, last = (cv2.copyMakeBorder(one, 0, below, 0, right, cv2.BORDER_REPLICATE) for one in (first, last))
    search: Any = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    flow = search.calc(first, last, None)
    return torch.from_numpy(flow[:height, :width].transpose(2, 0, 1).copy())


def _grid(height: int, width: int) -> Tensor:
    """The place of each pixel, (2, H, W)."""
    y, x = torch.meshgrid(torch.arange(height).float(), torch.arange(width).float(), indexing="ij")
    return torch.stack([x, y])


def _sample(images: Tensor, places: Tensor) -> Tensor:
    """Images (N, C, H, W) read at places (N, 2, H, W) in pixels, between four of them; their edges go on outside."""
    height, width = images.shape[-2:]
    sides = places.new_tensor((width, height)).view(1, 2, 1, 1)
    grid = ((places * 2 + 1) / sides - 1).permute(0, 2, 3, 1)
    return F.grid_sample(images, grid, "bilinear", "border", align_corners=False)
