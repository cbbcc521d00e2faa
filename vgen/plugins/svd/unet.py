"""SVD's U-Net (UNetSpatioTemporalConditionModel) as a denoiser, and the loss of each part that is one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Generator, Tensor, nn

from vgen import diffusion, lean
from vgen.diffusion import Conditions, Kind, Process
from vgen.emphasis import emphasis
from vgen.plugins.svd.steering import steered

Told = Callable[[Mapping[str, Any], Generator], dict[str, Tensor]]  # the conditions of a training batch


class UNet:
    """A part that diffuses clips. Latents are (B, C, T, H, W), scaled; the network itself takes (B, T, C, H, W).

    `cond` of a call: 'context' (B, L, D) of cross-attention; 'vector' (B, n), or (B, T, n) for each frame; where the
    network takes more channels than latents have, 'concat' (B, C', T, H, W); maybe 'temporal' (B, L, D), the context of
    the temporal layers alone. `told` makes these of a batch.
    """

    stream = "latents"
    output: Kind = "v"

    def __init__(self, name: str, network: Any, process: Process, folder: str = "unet") -> None:
        self.name, self.network, self.process = name, network, process
        self.modules: Mapping[str, nn.Module] = {folder: network}
        self.told: Told | None = None
        self.dropout = 0.0
        self.mask_weight, self.mask_steps = 0.0, 0

    def predict(self, x: Tensor, t: Tensor, cond: Conditions) -> Tensor:
        """The network's output, v, for x (B, C, T, H, W) at times t (B,)."""
        dtype, vector = self.network.dtype, cond["vector"]
        seen = torch.cat([x, cond["concat"].to(x.dtype)], 1) if "concat" in cond else x
        apart = vector if vector.ndim == 3 else None
        with steered(self.network, cond.get("temporal"), apart):
            out: Tensor = self.network(
                seen.transpose(1, 2).to(dtype),
                t,
                encoder_hidden_states=cond["context"].to(dtype),
                added_time_ids=vector if apart is None else vector[:, 0],
                return_dict=False,
            )[0]
        return out.to(x.dtype).transpose(1, 2)

    def loss(self, batch: Mapping[str, Any], generator: Generator) -> Tensor:
        """The loss of EDM on v, a scalar: lambda |D - x0|^2 with lambda = (1 + sigma^2) / sigma^2."""
        assert self.told is not None
        x, share = batch["latents"], batch.get("share", (0, 1))
        cond = dropped(self.told(batch, generator), self.dropout, generator)
        weight = emphasis(batch, self.mask_weight, self.mask_steps)
        return diffusion.loss(self.predict, self.process, self.output, x, cond, generator, weight=weight, share=share)


def plain_products(network: Any) -> None:
    """Have attention computed as plain matrix products: in bf16 on CPUs torch's fused ones take half as long again."""
    with lean.imports():
        from diffusers.models.attention_processor import AttnProcessor
    network.set_attn_processor(AttnProcessor())


def without(cond: Conditions) -> dict[str, Tensor]:
    """The conditions of the unconditional pass: context and latents of the picture are zero, the vector stays."""
    return {name: value if name == "vector" else torch.zeros_like(value) for name, value in cond.items()}


def dropped(cond: Conditions, share: float, generator: Generator) -> dict[str, Tensor]:
    """Conditions of a batch, of which a share of the clips, drawn, has those of the unconditional pass."""
    kept = torch.rand(len(cond["context"]), generator=generator) >= share
    return {
        name: value if name == "vector" else value * kept.view(-1, *[1] * (value.ndim - 1)).to(value)
        for name, value in cond.items()
    }
