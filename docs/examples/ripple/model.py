"""The model of ripple: data are normal around one clip of waves, so the best denoiser is a formula."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ripple import COLOURS
from vgen.diffusion import Flow
from vgen.family import Checkpoint
from vgen.latents import Space
from vgen.machine import Machine
from vgen.model import Draw
from vgen.samplers import clip_noise, ddim


def load(folder: Path, checkpoint: Checkpoint, machine: Machine) -> Ripple:
    """The model of a checkpoint folder."""
    return Ripple(checkpoint.facts["spread"], machine)


@dataclass
class Waves:
    """The part 'waves'. Latents are pixels (B, 3, T, H, W)."""

    spread: float
    name, stream, output, process = "waves", "latents", "x0", Flow()
    modules: ClassVar[dict[str, torch.nn.Module]] = {}  # a formula has no networks

    def predict(self, x: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        """E[x0 | x] for x0 ~ N(waves, spread^2) and x = (1 - t) x0 + t e."""
        s = (t / 1000).view(-1, 1, 1, 1, 1)  # Flow tells 1000 t
        a = 1 - s
        gain = a * self.spread**2 / ((a * self.spread) ** 2 + s**2)
        return cond["waves"] + gain * (x - a * cond["waves"])


@dataclass
class Ripple:
    """What the core asks of a model; see vgen/model.py."""

    spread: float
    machine: Machine
    space, base = Space("ripple-pixels", channels=3, strides=(1, 1, 1)), ("waves",)

    def decode(self, streams: Mapping[str, Tensor]) -> Tensor:
        return streams["latents"].clamp(-1, 1)

    def denoiser(self, name: str, options: Any) -> Waves:
        return Waves(self.spread)

    def notes(self, options: Any) -> list[str]:
        return []  # nothing to warn of

    def draw(self, name: str, options: Any, streams: Mapping[str, Tensor]) -> Draw:
        seeds, device = range(options.seed, options.seed + options.num_videos_per_prompt), self.machine.device
        shape = (3, options.num_frames, options.height, options.width)
        cond = {"waves": self.waves(options).expand(len(seeds), *shape).to(device)}
        x, times = clip_noise(shape, seeds, device)(), Waves.process.times(options.num_inference_steps)
        return Draw(x=x, times=times, cond=cond, uncond=cond, guidance=1.0, sampler=ddim)

    def waves(self, options: Any) -> Tensor:
        """The clip (3, T, H, W) that all samples are near, in [-1, 1]."""
        colour = next(COLOURS[word] for word in options.prompt.lower().split() if word in COLOURS)
        across, passed = torch.linspace(0, options.crests, options.width), torch.arange(options.num_frames)
        height = (torch.cos(2 * torch.pi * (across - passed[:, None] / options.num_frames)) + 1) / 2
        return height[None, :, None] * (torch.tensor(colour).view(3, 1, 1, 1) + 1) - 1
