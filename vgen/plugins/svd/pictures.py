"""The picture that a clip starts from, as SVD is told of it: a CLIP embedding, and latents of it with some noise."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vgen.machine import seeded

DRAWS = 4  # noisy versions of a clip's first frame that are stored for training
LOG_MEAN, LOG_STD = -3.0, 0.5  # of the noise's strength in training: ln sigma ~ N(-3, .5^2) (arXiv:2311.15127)
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


def strengths(picture: Tensor) -> tuple[Tensor, Tensor]:
    """Strengths (K,) and noise (K, 3, H, W) of the noisy versions of a picture (3, H, W), drawn from its content."""
    content = picture.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).cpu().numpy().tobytes()
    generator = seeded("conditioning", hashlib.sha256(content).hexdigest())
    sigma = torch.exp(LOG_MEAN + LOG_STD * torch.randn(DRAWS, generator=generator))
    return sigma, torch.randn(DRAWS, *picture.shape, generator=generator)


def noisy(pictures: Tensor) -> tuple[Tensor, Tensor]:
    """The noisy versions (B, K, 3, H, W) of pictures (B, 3, H, W), and how strong their noise is, (B, K)."""
    drawn = [strengths(picture) for picture in pictures]
    sigma, noise = torch.stack([one[0] for one in drawn]), torch.stack([one[1] for one in drawn])
    return pictures[:, None] + (sigma[..., None, None, None] * noise).to(pictures), sigma
