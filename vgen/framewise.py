"""An image autoencoder (AutoencoderKL) on clips, frame by frame."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def encode(vae: Any, pixels: Tensor) -> dict[str, Tensor]:
    """Pixels (B, 3, T, H, W) in [-1, 1] to the posterior's mean and logvar (B, C, T, H', W'), unscaled."""
    posterior = vae.encode(images(pixels).to(vae.dtype)).latent_dist
    return {"mean": clips(posterior.mean, pixels), "logvar": clips(posterior.logvar, pixels)}


def decode(vae: Any, latents: Tensor) -> Tensor:
    """Unscaled latents (B, C, T, H', W') to pixels (B, 3, T, H, W)."""
    return clips(vae.decode(images(latents).to(vae.dtype)).sample, latents)


def images(x: Tensor) -> Tensor:
    """(B, C, T, H, W) to (B * T, C, H, W)."""
    return x.transpose(1, 2).flatten(0, 1)


def clips(x: Tensor, like: Tensor) -> Tensor:
    """(B * T, C, H, W) to (B, C, T, H, W), with B and T those of `like`."""
    return x.unflatten(0, (len(like), like.shape[2])).transpose(1, 2)


def save_memory(vae: Any, *, slicing: bool, tiling: bool) -> None:
    """Have the autoencoder work image by image, and in overlapping tiles of its native size."""
    for asked, on, off in (
        (slicing, vae.enable_slicing, vae.disable_slicing),
        (tiling, vae.enable_tiling, vae.disable_tiling),
    ):
        (on if asked else off)()
