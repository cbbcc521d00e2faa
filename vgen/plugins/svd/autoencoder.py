"""SVD's autoencoder (AutoencoderKLTemporalDecoder): an image encoder, and a decoder that sees frames in time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vgen import framewise


def mode(vae: Any, pictures: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) to the posterior's mode (B, C, H', W'), unscaled: what conditions the U-Net."""
    made: Tensor = vae.encode(pictures.to(vae.dtype)).latent_dist.mode()
    return made


def decode(vae: Any, latents: Tensor, chunk: int | None = None) -> Tensor:
    """Unscaled latents (B, C, T, H', W') to pixels (B, 3, T, H, W), `chunk` frames at a time; all when None.

    Frames of different chunks do not see each other.
    """
    parts = latents.split(chunk or latents.shape[2], 2)
    return torch.cat([_decoded(vae, part) for part in parts], 2)


def _decoded(vae: Any, latents: Tensor) -> Tensor:
    frames = framewise.images(latents).to(vae.dtype)
    return framewise.clips(vae.decode(frames, num_frames=latents.shape[2]).sample, latents)
