"""Stable Diffusion's U-Net (UNet2DConditionModel) as a denoiser, and the loss that trains it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vgen import diffusion
from vgen.diffusion import Kind, Process
from vgen.emphasis import emphasis

Embed = Callable[[list[str]], Tensor]


class UNet:
    """The part 'unet'. Latents are (B, C, T, H, W), scaled; each frame is an image of its own to the network."""

    name = "unet"
    stream = "latents"

    def __init__(self, network: Any, process: Process, output: Kind) -> None:
        self.network, self.process, self.output = network, process, output
        self.modules: Mapping[str, nn.Module] = {"unet": network}
        self.embed: Embed | None = None  # set where a text encoder trains along
        self.mask_weight, self.mask_steps = 0.0, 0

    def predict(self, x: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        """The network's output, as `output` says, for x (B, C, T, H, W) at times t (B,). `cond`: text (B, L, D)."""
        batch, frames = len(x), x.shape[2]
        out: Tensor = self.network(
            x.transpose(1, 2).flatten(0, 1).to(self.network.dtype),
            t.repeat_interleave(frames),
            cond["text"].to(self.network.dtype).repeat_interleave(frames, 0),
            return_dict=False,
        )[0]
        return out.to(x.dtype).unflatten(0, (batch, frames)).transpose(1, 2)

    def loss(self, batch: Mapping[str, Any], generator: torch.Generator) -> Tensor:
        """Mean square error of a batch: 'latents' (B, C, T, H, W) scaled, 'text' (B, L, D) or 'captions', 'mask'."""
        text = self.embed(batch["captions"]) if self.embed is not None else batch["text"]
        weight = emphasis(batch, self.mask_weight, self.mask_steps)
        x, share = batch["latents"], batch.get("share", (0, 1))
        return diffusion.loss(
            self.predict, self.process, self.output, x, {"text": text}, generator, weight=weight, share=share
        )
