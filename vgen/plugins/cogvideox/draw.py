"""What CogVideoX's denoiser is asked for: noise, start, conditions, times and sampler, as the released pipelines do it.

Random numbers are drawn in the order and layout of diffusers' pipelines, so that a seed gives the clip it gives there.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor

from vgen import samplers
from vgen.diffusion import Discrete, add_noise
from vgen.errors import UsageError
from vgen.model import Sampler
from vgen.samplers import Guidance, Noise

Encode = Callable[[Tensor, Generator], Tensor]  # pixels (3, T, H, W) to a draw of unscaled latents (C, T', H', W')


def noise_of(shape: tuple[int, ...], generators: list[Generator]) -> Tensor:
    """Standard normal noise (B, C, T, H, W); each clip's from its own generator, drawn as (T, C, H, W)."""
    c, t, h, w = shape
    return torch.stack([torch.randn(t, c, h, w, generator=g).transpose(0, 1) for g in generators])


def steps_noise(shape: tuple[int, ...], generators: list[Generator], device: torch.device) -> Noise:
    """The noise of DPM-Solver++'s steps. From the second on the released scheduler draws twice and keeps the last."""
    drawn = 0

    def draw() -> Tensor:
        nonlocal drawn
        if drawn:
            noise_of(shape, generators)
        drawn += 1
        return noise_of(shape, generators).to(device)

    return draw


def sampler_of(options: Any, noise: Noise) -> Sampler:
    """The sampler that the options name."""
    if options.sampler == "dpm":
        return partial(samplers.dpmpp_2m_sde, noise=noise)
    return partial(samplers.ddim, eta=options.eta, noise=noise)


def guidance_of(options: Any, times: Tensor) -> Guidance:
    """The guidance scale, constant or along the dynamic curve."""
    if not options.use_dynamic_cfg:
        return float(options.guidance_scale)
    if options.dynamic_cfg_quirk:
        return samplers.dynamic_guidance_quirk(options.guidance_scale, options.num_inference_steps)
    return samplers.dynamic_guidance(options.guidance_scale, times)


def times_of(process: Discrete, options: Any) -> Tensor:
    """The times of the sampler; with --video only the last share `strength` of them."""
    times = process.times(options.num_inference_steps)
    if options.video is None:
        return times
    kept = int(options.num_inference_steps * options.strength)
    if kept == 0:
        raise UsageError(
            f"--strength {options.strength} of {options.num_inference_steps} steps leaves none.",
            "Raise --strength or --num-inference-steps.",
        )
    return times[-kept:]


def start(
    process: Discrete, times: Tensor, shape: tuple[int, ...], generators: list[Generator], given: Tensor | None
) -> Tensor:
    """Where sampling starts: noise, or `given` (B, C, T, H, W), scaled, with noise as of times[0] (SDEdit)."""
    noise = noise_of(shape, generators)
    return noise if given is None else add_noise(process, given, noise, times[0])


def first_frame(image: Tensor, num_frames: int) -> Tensor:
    """The image condition (B, C, T, H, W): scaled latents of the picture (B, C, 1, H, W) first, zeros after it."""
    return torch.nn.functional.pad(image, (0, 0, 0, 0, 0, num_frames - 1))
