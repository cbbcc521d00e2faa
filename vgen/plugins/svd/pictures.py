"""The picture that a clip starts from, as SVD is told of it beside its embedding: with some noise."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from vgen.machine import seeded

DRAWS = 4  # noisy versions of a clip's first frame that are stored for training
LOG_MEAN, LOG_STD = -3.0, 0.5  # of the noise's strength in training: ln sigma ~ N(-3, .5^2) (arXiv:2311.15127)


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
