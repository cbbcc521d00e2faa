"""Stable Diffusion's image autoencoder (AutoencoderKL) on clips, frame by frame, and the loss that trains it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def encode(vae: Any, pixels: Tensor) -> dict[str, Tensor]:
    """Pixels (B, 3, T, H, W) in [-1, 1] to the posterior's mean and logvar (B, C, T, H', W'), unscaled."""
    posterior = vae.encode(_images(pixels).to(vae.dtype)).latent_dist
    return {"mean": _clips(posterior.mean, pixels), "logvar": _clips(posterior.logvar, pixels)}


def decode(vae: Any, latents: Tensor) -> Tensor:
    """Unscaled latents (B, C, T, H', W') to pixels (B, 3, T, H, W)."""
    return _clips(vae.decode(_images(latents).to(vae.dtype)).sample, latents)


def _images(clips: Tensor) -> Tensor:
    """(B, C, T, H, W) to (B * T, C, H, W)."""
    return clips.transpose(1, 2).flatten(0, 1)


def _clips(images: Tensor, like: Tensor) -> Tensor:
    """(B * T, C, H, W) to (B, C, T, H, W), with B and T those of `like`."""
    return images.unflatten(0, (len(like), like.shape[2])).transpose(1, 2)


def save_memory(vae: Any, *, slicing: bool, tiling: bool) -> None:
    """Have the autoencoder work image by image, and in overlapping tiles of its native size."""
    for asked, on, off in (
        (slicing, vae.enable_slicing, vae.disable_slicing),
        (tiling, vae.enable_tiling, vae.disable_tiling),
    ):
        (on if asked else off)()


class Autoencoder:
    """The part 'autoencoder': squared and absolute error on pixels, and a KL term."""

    name = "autoencoder"

    def __init__(self, vae: Any, *, l1_weight: float, kl_weight: float) -> None:
        self.vae, self.l1_weight, self.kl_weight = vae, l1_weight, kl_weight
        self.modules: Mapping[str, nn.Module] = {"vae": vae}
        self.state = {"spread": torch.full((50,), torch.nan, dtype=torch.float64)}  # of the last batches

    def loss(self, batch: Mapping[str, Any], generator: torch.Generator) -> Tensor:
        """The loss of a batch of pixels (B, 3, T, H, W) in [-1, 1]."""
        streams = encode(self.vae, batch["pixels"])
        mean, logvar = streams["mean"].float(), streams["logvar"].float()
        noise = torch.randn(mean.shape, generator=generator).to(mean)
        error = decode(self.vae, mean + torch.exp(0.5 * logvar) * noise).float() - batch["pixels"]
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        spread = self.state["spread"]
        spread.copy_(spread.roll(-1))
        spread[-1] = mean.detach().square().mean().sqrt()
        return error.square().mean() + self.l1_weight * error.abs().mean() + self.kl_weight * kl

    def settle(self) -> None:
        """Store the one factor that brings the latents to unit size, as measured over the last batches."""
        spread = self.state["spread"].nanmean().item()
        if spread > 0:
            self.vae.register_to_config(scaling_factor=round(1 / spread, 6))
