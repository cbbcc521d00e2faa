"""CMD's motion model as a denoiser of maps of motion, given the content frame, and the loss that trains it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vgen import diffusion
from vgen.diffusion import Conditions, Discrete, Kind
from vgen.latents import Space, scale
from vgen.plugins.cmd.labels import Labels
from vgen.plugins.cmd.maps import joined, parted
from vgen.plugins.cmd.variance import bound


class Motion:
    """The part 'motion'. Maps are (B, D, T, S, 1), multiplied by `factor`.

    `cond` of a call: 'content' (B, C, h, w), the scaled content frame; 'text' (B, D'), the mean over a text's tokens,
    or 'label' (B,). `rows` is how much of S is rows, where maps are sampled.
    """

    name = stream = "motion"

    def __init__(
        self,
        network: Any,
        process: Discrete,
        output: Kind,
        space: Space,
        factor: float,
        labels: Labels,
        rows: int = 0,
    ) -> None:
        self.network, self.process, self.output = network, process, output
        self.space, self.factor, self.labels, self.rows = space, factor, labels, rows
        self.modules: Mapping[str, nn.Module] = {"motion": network}

    def _call(self, x: Tensor, t: Tensor, cond: Conditions) -> tuple[Tensor, Tensor | None]:
        """What the network says of a map, and of its variance."""
        dtype = self.network.dtype
        out: Tensor = self.network(
            x[..., 0].to(dtype),
            t,
            cond["content"].to(dtype) if self.network.content_in is not None else None,
            cond.get("text"),
            cond.get("label"),
        )
        made, *variance = out.to(x.dtype)[..., None].split(x.shape[1], 1)
        return made, variance[0] if variance else None

    def predict(self, x: Tensor, t: Tensor, cond: Conditions) -> Tensor:
        """The network's output, as `output` says, for x (B, D, T, S, 1) at times t (B,)."""
        return self._call(x, t, cond)[0]

    def apart(self, made: Tensor) -> dict[str, Tensor]:
        """The streams of a map."""
        motion_x, motion_y = parted(made / self.factor, self.rows)
        return {"motion_x": motion_x, "motion_y": motion_y}

    def loss(self, batch: Mapping[str, Any], generator: torch.Generator) -> Tensor:
        """Mean square error of a batch, and the bound of the variance where that is learned.

        'motion_x', 'motion_y' and 'content' as stored; 'text' (B, L, D') or 'label'.
        """
        x = joined(batch["motion_x"], batch["motion_y"]) * self.factor
        cond = {"content": scale(self.space, batch["content"])[:, :, 0]}
        cond |= self.labels.of(batch, generator) if self.labels.count else {"text": batch["text"].mean(1)}
        bounds: list[Tensor] = []

        def predict(z: Tensor, t: Tensor, cond: Conditions) -> Tensor:
            made, variance = self._call(z, t, cond)
            if variance is not None:
                bounds.append(bound(self.process, x, z, t, made.detach(), variance))
            return made

        share = batch.get("share", (0, 1))
        error = diffusion.loss(predict, self.process, self.output, x, cond, generator, share=share)
        return error + sum(bounds)
