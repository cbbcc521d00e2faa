"""MagicVideo's decoder: that of an image autoencoder, with attention along time against flicker."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vgen import framewise, lean
from vgen.temporal import Inflated, Temporal

with lean.imports():
    from diffusers import AutoencoderKL
    from diffusers.configuration_utils import ConfigMixin, register_to_config
    from diffusers.models.modeling_utils import ModelMixin


class VideoDecoder(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Latents of clips to pixels. `vae` is the configuration of the image autoencoder, of which it has the decoder."""

    _supports_gradient_checkpointing = True

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, vae: dict[str, Any], plan: list[dict[str, Any]]) -> None:
        super().__init__()
        image = AutoencoderKL.from_config({name: value for name, value in vae.items() if not name.startswith("_")})
        del image.encoder, image.quant_conv
        self.inflated = Inflated(image, Temporal(plan))

    @torch.no_grad()
    def copy_of(self, vae: Any) -> VideoDecoder:
        """Take the weights of an image autoencoder: the same pixels then, frame by frame."""
        own = self.inflated.image.state_dict()
        weights: Mapping[str, Tensor] = vae.state_dict()
        self.inflated.image.load_state_dict({name: weights[name] for name in own})
        return self

    def forward(self, latents: Tensor) -> Tensor:
        """Unscaled latents (B, C, T, H', W') to pixels (B, 3, T, H, W)."""
        self.inflated.begin(latents.shape[2])
        images = framewise.images(latents).to(self.dtype)
        return framewise.clips(self.inflated.image.decode(images).sample, latents)


def decode(network: VideoDecoder, latents: Tensor, *, slicing: bool, tiling: bool) -> Tensor:
    """Unscaled latents (B, C, T, H', W') to pixels (B, 3, T, H, W), clip by clip, in overlapping tiles, or both."""
    framewise.save_memory(network.inflated.image, slicing=False, tiling=tiling)
    return torch.cat([network(one) for one in latents.split(1 if slicing else len(latents))])
