"""MagicVideo's denoisers: an image U-Net with layers in time, given a text or a frame's embedding, and a frame rate."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Generator, Tensor, nn

from vgen import diffusion
from vgen.diffusion import Conditions, Kind, Process
from vgen.emphasis import emphasis
from vgen.errors import UsageError
from vgen.temporal import Inflated

Batch = Mapping[str, Any]
Told = Callable[[Batch, Generator], dict[str, Tensor]]
SPAN = 5  # frames of the interpolation network: the first and the last are known
AGAIN = "Encode the clips anew: vgen encode magicvideo"


class Frames:
    """A part that diffuses clips. Latents are (B, C, T, H, W), scaled.

    `cond` of a call: 'text' (B, L, D), the context of cross-attention; 'fps' (B,); where the network takes more
    channels than latents have, 'concat' (B, C', T, H, W). `told` makes these of a training batch.
    """

    stream = "latents"

    def __init__(self, name: str, network: Inflated, process: Process, output: Kind) -> None:
        self.name, self.network, self.process, self.output = name, network, process, output
        self.modules: Mapping[str, nn.Module] = {}
        self.told: Told = text
        self.mask_weight, self.mask_steps = 0.0, 0

    def predict(self, x: Tensor, t: Tensor, cond: Conditions) -> Tensor:
        """The network's output, as `output` says, for x (B, C, T, H, W) at times t (B,)."""
        dtype = self.network.dtype
        seen = torch.cat([x, cond["concat"].to(x.dtype)], 1) if "concat" in cond else x
        return self.network(seen.to(dtype), t, cond["text"].to(dtype), fps=cond["fps"]).to(x.dtype)

    def loss(self, batch: Batch, generator: Generator) -> Tensor:
        """Mean square error of a batch: 'latents' (B, C, T, H, W) scaled, 'fps' (B, 1), and what `told` reads."""
        cond = self.told(batch, generator)
        weight = emphasis(batch, self.mask_weight, self.mask_steps)
        x, share = batch["latents"], batch.get("share", (0, 1))
        return diffusion.loss(self.predict, self.process, self.output, x, cond, generator, weight=weight, share=share)


def stored(batch: Batch, name: str) -> Tensor:
    """A stream that every clip of the batch carries. Raises UsageError."""
    if name not in batch:
        raise UsageError(f"Clips of --data carry no '{name}'.", AGAIN)
    found: Tensor = batch[name]
    return found


def text(batch: Batch, generator: Generator) -> dict[str, Tensor]:
    """The caption, and the frame rate."""
    return {"text": batch["text"], "fps": stored(batch, "fps")[:, 0]}


def picture(batch: Batch, generator: Generator, dropout: float) -> dict[str, Tensor]:
    """CLIP's embedding of one of the stored frames, drawn, in place of the caption; zero for a share of the clips."""
    embedding = stored(batch, "embedding")
    count, frames, _ = embedding.shape
    k = torch.randint(frames, (count,), generator=generator)
    kept = (torch.rand(count, generator=generator) >= dropout).to(embedding)
    chosen = embedding[torch.arange(count), k.to(embedding.device)][:, None]
    return {"text": chosen * kept.view(-1, 1, 1), "fps": stored(batch, "fps")[:, 0]}


def between(batch: Batch, generator: Generator) -> dict[str, Tensor]:
    """The caption, the frame rate and both ends of a clip."""
    x = batch["latents"]
    if x.shape[2] != SPAN:
        do = f"Encode them anew: vgen encode magicvideo CLIPS --num-frames {SPAN} -o latents/"
        raise UsageError(f"--part interpolate trains on clips of {SPAN} frames, not {x.shape[2]}.", do)
    return {**text(batch, generator), "concat": known(x[:, :, [0, -1]], SPAN)}


def known(ends: Tensor, frames: int) -> Tensor:
    """What the interpolation network sees of a clip (B, C + 1, T, H, W): its ends (B, C, 2, H, W), zeros between.

    The last channel says of each frame whether it is known.
    """
    batch, channels, _, height, width = ends.shape
    seen = ends.new_zeros(batch, channels + 1, frames, height, width)
    seen[:, :channels, [0, -1]] = ends
    seen[:, channels, [0, -1]] = 1
    return seen
