"""The picture that a clip starts from, as a condition in training (image-to-video checkpoints)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from vgen.plugins.cogvideox.draw import first_frame

SPREAD = 0.5  # standard deviation of ln sigma


@dataclass(frozen=True)
class Pictures:
    """How pictures condition training.

    `noise` is the median of sigma, `dropout` the share of clips without a picture, `scale` what the latents of
    pictures are multiplied by beside those of clips: 1, but for CogVideoX1.5, trained with the inverse factor.

    The paper adds noise of ln sigma ~ N(-3, .5^2) to the pixels of the picture and encodes it (arXiv:2408.06072, image
    to video). A store holds no pixels: here the picture is the first frame of the clip's own latents, and noise of
    that law is added to these, whose standard deviation is about 1. The released autoencoder normalises over several
    frames at once, so this frame is not quite the one that the picture alone would give.
    """

    noise: float
    dropout: float
    scale: float = 1.0

    def of(self, x: Tensor, generator: Generator) -> Tensor:
        """The condition for clean, scaled latents x (1, C, T, H, W), of their shape: its first frame, then zeros."""
        sigma = self.noise * math.exp(SPREAD * torch.randn((), generator=generator).item())
        noise = torch.randn(x[:, :, :1].shape, generator=generator).to(x.device)
        kept = torch.rand((), generator=generator).item() >= self.dropout
        picture = (x[:, :, :1] + sigma * noise) * self.scale
        return first_frame(picture if kept else torch.zeros_like(picture), x.shape[2])
