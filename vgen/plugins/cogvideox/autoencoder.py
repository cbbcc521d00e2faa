"""The causal 3D autoencoder of CogVideoX (AutoencoderKLCogVideoX): streams and pixels."""

from __future__ import annotations

from typing import Any

from torch import Tensor

OVERLAP = 0.25  # of tiles, as a share of their side


def encode(vae: Any, pixels: Tensor) -> dict[str, Tensor]:
    """Pixels (B, 3, T, H, W) in [-1, 1] to the posterior's mean and logvar (B, C, T', H', W'), unscaled."""
    posterior = vae.encode(pixels.to(vae.dtype)).latent_dist
    return {"mean": posterior.mean, "logvar": posterior.logvar}


def decode(vae: Any, latents: Tensor) -> Tensor:
    """Unscaled latents (B, C, T', H', W') to pixels (B, 3, T, H, W)."""
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
