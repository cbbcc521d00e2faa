"""CMD's content model: an image U-Net as it is (UNet2DConditionModel), over content frames."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vgen import diffusion
from vgen.diffusion import Conditions, Kind, Process
from vgen.emphasis import emphasis
from vgen.latents import Space, scale
from vgen.plugins.cmd.labels import Labels


class Content:
    """The part 'content'. Content frames are clips of one frame, (B, C, 1, H, W), scaled.

    `cond` of a call: 'text' (B, L, D), or 'label' (B,), a class; the number of classes stands for none.
    """

    name = stream = "content"

    def __init__(self, network: Any, process: Process, output: Kind, space: Space, labels: Labels) -> None:
        self.network, self.process, self.output = network, process, output
        self.space, self.labels = space, labels
        self.modules: Mapping[str, nn.Module] = {"unet": network}
        self.mask_weight, self.mask_steps = 0.0, 0

    def predict(self, x: Tensor, t: Tensor, cond: Conditions) -> Tensor:
        """The network's output, as `output` says, for x (B, C, 1, H, W) at times t (B,)."""
        dtype = self.network.dtype
        text = cond["text"].to(dtype) if "text" in cond else None
        call = partial(self.network, class_labels=cond.get("label"), return_dict=False)
        out: Tensor = call(x[:, :, 0].to(dtype), t, text)[0]
        return out.to(x.dtype)[:, :, None]

    def loss(self, batch: Mapping[str, Any], generator: torch.Generator) -> Tensor:
        """Mean square error of a batch: 'content' (B, C, 1, H, W) as stored, 'text' (B, L, D) or 'label', 'mask'."""
        cond = {"text": batch["text"]} if not self.labels.count else self.labels.of(batch, generator)
        weight = emphasis(batch, self.mask_weight, self.mask_steps)
        x, share = scale(self.space, batch["content"]), batch.get("share", (0, 1))
        return diffusion.loss(self.predict, self.process, self.output, x, cond, generator, weight=weight, share=share)
