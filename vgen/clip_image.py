"""CLIP's embedding of pictures, made as the released models that take it were trained."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def embedding(encoder: Any, pictures: Tensor) -> Tensor:
    """CLIP's embedding (B, 1, D) of pictures (B, 3, H, W) in [-1, 1]."""
    size = encoder.config.image_size
    small = (shrunk(pictures.float(), size) + 1) / 2
    mean, std = (torch.tensor(values).view(3, 1, 1).to(small) for values in (CLIP_MEAN, CLIP_STD))
    made: Tensor = encoder(((small - mean) / std).to(encoder.dtype)).image_embeds
    return made[:, None]


def shrunk(pictures: Tensor, size: int) -> Tensor:
    """Pictures (B, 3, H, W) brought to size x size as the released model was: blurred first, bicubic to the corners.

    The blur is Gaussian with sigma (factor - 1) / 2, cut at two sigma on either side.
    """
    factors = pictures.shape[-2] / size, pictures.shape[-1] / size
    for dim, factor in ((-1, factors[1]), (-2, factors[0])):
        pictures = _blurred(pictures, max((factor - 1) / 2, 0.001), dim)
    return F.interpolate(pictures, (size, size), mode="bicubic", align_corners=True)


def _blurred(x: Tensor, sigma: float, dim: int) -> Tensor:
    width = int(max(4 * sigma, 3)) // 2 * 2 + 1
    places = torch.arange(width, dtype=torch.float32) - width // 2
    kernel = torch.exp(-(places**2) / (2 * sigma**2)).to(x)
    kernel = (kernel / kernel.sum()).expand(x.shape[1], 1, width)
    side = width // 2
    padding = (side, side, 0, 0) if dim == -1 else (0, 0, side, side)
    padded = F.pad(x, padding, mode="reflect" if x.shape[dim] > side else "replicate")
    return F.conv2d(padded, kernel[:, :, None] if dim == -1 else kernel[..., None], groups=x.shape[1])
