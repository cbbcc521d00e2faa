"""Training an autoencoder on pixels: squared and absolute error, a KL term, and the scale of its latents."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


class Spread:
    """How large latents are: the root mean square of each of the last 50 batches, kept as state of a run."""

    def __init__(self) -> None:
        self.seen = torch.full((50,), torch.nan, dtype=torch.float64)

    def note(self, latents: Tensor) -> None:
        """Take in a batch."""
        self.seen.copy_(self.seen.roll(-1))
        self.seen[-1] = latents.detach().square().mean().sqrt()

    def factor(self) -> float | None:
        """The one factor that brings the latents to unit size; None before any were seen."""
        size = self.seen.nanmean().item()
        return round(1 / size, 6) if size > 0 else None


class Autoencoder:
    """The part 'autoencoder'.

    `encode(vae, pixels)` gives 'mean' and 'logvar' (B, C, T', H', W'), `decode(vae, latents)` pixels (B, 3, T, H, W);
    both with gradients. Where the encoder does not train, it does not compute its gradients, and the scale of the
    latents stays as it is (`scaled` is False). `flicker_weight` is that of the absolute error in what
    changes from frame to frame.
    """

    name = "autoencoder"

    def __init__(
        self,
        vae: Any,
        encode: Callable[[Any, Tensor], Mapping[str, Tensor]],
        decode: Callable[[Any, Tensor], Tensor],
        *,
        l1_weight: float,
        kl_weight: float,
        scaled: bool = True,
        flicker_weight: float = 0.0,
    ) -> None:
        self.vae, self.encode, self.decode = vae, encode, decode
        self.l1_weight, self.kl_weight, self.scaled = l1_weight, kl_weight, scaled
        self.flicker_weight = flicker_weight
        self.modules: Mapping[str, nn.Module] = {"vae": vae}
        self.spread = Spread()
        self.state = {"spread": self.spread.seen}

    def loss(self, batch: Mapping[str, Any], generator: torch.Generator) -> Tensor:
        """The loss of a batch of pixels (B, 3, T, H, W) in [-1, 1]."""
        with torch.set_grad_enabled(self.scaled and torch.is_grad_enabled()):
            streams = self.encode(self.vae, batch["pixels"])
        mean, logvar = streams["mean"].float(), streams["logvar"].float()
        noise = torch.randn(mean.shape, generator=generator).to(mean)
        error = self.decode(self.vae, mean + torch.exp(0.5 * logvar) * noise).float() - batch["pixels"]
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        self.spread.note(mean)
        loss: Tensor = error.square().mean() + self.l1_weight * error.abs().mean() + self.kl_weight * kl
        if self.flicker_weight:
            loss = loss + self.flicker_weight * error.diff(dim=2).abs().sum() / error.numel()
        return loss

    def settle(self) -> None:
        """Store the one factor that brings the latents to unit size, as measured over the last batches."""
        factor = self.spread.factor()
        if factor and self.scaled:
            self.vae.register_to_config(scaling_factor=factor)
