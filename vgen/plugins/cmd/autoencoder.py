"""CMD's autoencoder at work: clips to streams and back, and the part that trains it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vgen.pixels import Spread
from vgen.plugins.cmd.maps import joined

STREAMS = ("content", "motion_x", "motion_y")


def encode(network: Any, clip: Tensor) -> dict[str, Tensor]:
    """A clip (B, C, T, h, w), scaled, to its streams: content (B, C, 1, h, w), scaled, and motion."""
    return dict(zip(STREAMS, network.encoder(clip.to(network.dtype)), strict=True))


def decode(network: Any, streams: Mapping[str, Tensor]) -> Tensor:
    """Streams as `encode` gives them to the clip; with several content frames, of as many clips, one after another."""
    content, *motion = (streams[name].to(network.dtype) for name in STREAMS)
    count = content.shape[2]
    parts = zip(content.split(1, 2), *(one.chunk(count, 2) for one in motion), strict=True)
    return torch.cat([network.decoder(*part) for part in parts], 2)


class Factoring:
    """The part 'autoencoder'. `clips(pixels)` gives what it encodes (B, C, T, h, w): scaled latents of frames, say."""

    name = "autoencoder"

    def __init__(self, network: Any, clips: Callable[[Tensor], Tensor], l1_weight: float) -> None:
        self.network, self.clips, self.l1_weight = network, clips, l1_weight
        self.modules: Mapping[str, nn.Module] = {"autoencoder": network}
        self.spread = Spread()
        self.state = {"spread": self.spread.seen}

    def loss(self, batch: Mapping[str, Any], generator: torch.Generator) -> Tensor:
        """The error of a batch of pixels (B, 3, T, H, W) in [-1, 1], between what is encoded and what comes back."""
        clip = self.clips(batch["pixels"])
        content, motion_x, motion_y = self.network.encoder(clip)
        self.spread.note(joined(motion_x, motion_y))
        error = self.network.decoder(content, motion_x, motion_y).float() - clip
        return error.square().mean() + self.l1_weight * error.abs().mean()

    def settle(self) -> None:
        """Store the one factor that brings motion to unit size, as measured over the last batches."""
        factor = self.spread.factor()
        if factor:
            self.network.register_to_config(scaling_factor=factor)
