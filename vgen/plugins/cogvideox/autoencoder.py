"""The causal 3D autoencoder of CogVideoX (AutoencoderKLCogVideoX): streams, pixels, and the loss that trains it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vgen import convolution

OVERLAP = 0.25  # of tiles, as a share of their side


def encode(vae: Any, pixels: Tensor) -> dict[str, Tensor]:
    """Pixels (B, 3, T, H, W) in [-1, 1] to the posterior's mean and logvar (B, C, T', H', W'), unscaled."""
    with convolution.quick():
        posterior = vae.encode(pixels.to(vae.dtype)).latent_dist
    return {"mean": posterior.mean, "logvar": posterior.logvar}


def decode(vae: Any, latents: Tensor) -> Tensor:
    """Unscaled latents (B, C, T', H', W') to pixels (B, 3, T, H, W)."""
    with convolution.quick():
        pixels: Tensor = vae.decode(latents.to(vae.dtype)).sample
    return pixels


def save_memory(vae: Any, *, slicing: bool, tiling: bool) -> None:
    """Have the autoencoder work clip by clip, and in tiles of half the native height and width.

    Tiles overlap by a quarter, and their sides are multiples of four latents: only then do diffusers' crops meet.
    """
    if slicing:
        vae.enable_slicing()
    else:
        vae.disable_slicing()
    if not tiling:
        vae.disable_tiling()
        return
    stride = 2 ** (len(vae.config.block_out_channels) - 1)
    height, width = (
        -(-size // (8 * stride)) * 4 * stride for size in (vae.config.sample_height, vae.config.sample_width)
    )
    vae.enable_tiling(height, width, OVERLAP, OVERLAP)


class Autoencoder:
    """The part 'autoencoder': squared and absolute error on pixels, and a KL term."""

    name = "autoencoder"

    def __init__(self, vae: Any, *, l1_weight: float, kl_weight: float) -> None:
        self.vae, self.l1_weight, self.kl_weight = vae, l1_weight, kl_weight
        self.modules: Mapping[str, nn.Module] = {"vae": vae}
        self.state = {"spread": torch.full((50,), torch.nan, dtype=torch.float64)}  # of the last batches

    def loss(self, batch: Mapping[str, Any], generator: torch.Generator) -> Tensor:
        """The loss of a batch of pixels (B, 3, T, H, W) in [-1, 1]."""
        x = batch["pixels"].to(self.vae.dtype)
        posterior = self.vae.encode(x).latent_dist
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        noise = torch.randn(mean.shape, generator=generator).to(mean)
        z = mean + torch.exp(0.5 * logvar) * noise
        error = self.vae.decode(z.to(x.dtype)).sample.float() - batch["pixels"]
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
