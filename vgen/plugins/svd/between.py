"""Frames between two frames: the five-frame network, to which both ends are known (arXiv:2311.15127, appendix)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Generator, Tensor

from vgen import diffusion, generate, samplers
from vgen.latents import scale, unscale
from vgen.model import Draw
from vgen.plugins.svd.told import BETWEEN, vector
from vgen.plugins.svd.unet import UNet, without

if TYPE_CHECKING:
    from vgen.plugins.svd.model import StableVideoDiffusion

STEPS = BETWEEN - 2  # frames made between two


def between(model: StableVideoDiffusion, ends: Tensor, options: Any, seeds: Sequence[int]) -> Tensor:
    """New frames (B, 3, STEPS, H, W) of pairs of frames (B, 3, 2, H, W), both in [-1, 1]; a seed for each pair."""
    part = UNet("interpolate", model.network("interpolator"), model.process, "interpolator")
    asked = _draw(model, ends.float(), options, seeds)
    with model.machine.holding(*part.modules.values()):
        made = generate.draw(part, asked, lambda name, i, n: None)
    pixels = model.decode({"latents": unscale(model.space, made)})
    return pixels[:, :, 1:-1].float().cpu()


def _draw(model: StableVideoDiffusion, ends: Tensor, options: Any, seeds: Sequence[int]) -> Draw:
    generators = [Generator().manual_seed(seed) for seed in seeds]
    latents = torch.stack([model.conditioning(ends[:, :, k]) for k in range(2)], 2).cpu()
    _, channels, _, height, width = latents.shape
    drawn = torch.stack([torch.randn((channels, 2 + BETWEEN, height, width), generator=g) for g in generators])
    strength = float(options.noise_aug_strength)
    seen = unscale(model.space, scale(model.space, latents) + strength * drawn[:, :, :2])
    count = len(seeds)
    fps, bucket = torch.tensor([float(options.conditioning_fps)]), torch.tensor([float(options.motion_bucket_id)])
    cond = {
        "context": torch.cat([model.embedding(ends[:, :, k]) for k in range(2)], 1).cpu(),
        "vector": vector(fps, bucket, torch.tensor([strength])).expand(count, -1),
        "concat": model.network("blank").cpu()(seen, BETWEEN),
    }
    times = model.process.times(options.num_inference_steps)
    cond = {name: value.to(model.machine.device) for name, value in cond.items()}
    x = diffusion.initial(model.process, times[0], drawn[:, :, 2:].to(model.machine.device))
    return Draw(x, times, cond, without(cond), float(options.guidance_scale), samplers.euler)
