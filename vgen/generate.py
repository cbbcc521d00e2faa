"""Sampling: the denoisers of any family, run in order, from noise to streams of latents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vgen.latents import unscale
from vgen.model import Denoiser, Draw, Model, OnStep
from vgen.samplers import guided, windowed


def draw(part: Denoiser, asked: Draw, on_step: OnStep) -> Tensor:
    """Scaled latents (B, C, T, H, W) as `asked`."""
    denoise = guided(
        part.predict,
        part.process,
        part.output,
        asked.cond,
        asked.uncond,
        asked.guidance,
        batched=asked.batched,
    )
    if asked.window:
        denoise = windowed(denoise, *asked.window)
    x = asked.sampler(
        denoise,
        asked.x,
        asked.times,
        part.process,
        on_step=lambda step: on_step("denoise", step.index + 1, step.steps),
    )
    return x[:, :, asked.skip :]


@torch.inference_mode()
def generate(model: Model, options: Any, on_step: OnStep) -> dict[str, Tensor]:
    """The streams of the clips that `options` ask for, unscaled, on the CPU: one (B, C, T, H, W) for each base part."""
    streams: dict[str, Tensor] = {}
    for name in model.base:
        asked = model.draw(name, options, streams)
        part = model.denoiser(name, options)
        with model.machine.holding(*part.modules.values()):
            streams[part.stream] = unscale(model.space, draw(part, asked, on_step)).cpu()
    return streams


@torch.inference_mode()
def decode(model: Model, streams: Mapping[str, Tensor]) -> list[Tensor]:
    """Each clip of `streams` as frames of 8 bits, (T, H, W, 3)."""
    clips = []
    for i in range(len(next(iter(streams.values())))):
        pixels = model.decode({name: stream[i : i + 1] for name, stream in streams.items()})[0]
        clips.append(to_frames(pixels))
    return clips


def to_frames(pixels: Tensor) -> Tensor:
    """Pixels (3, T, H, W) in [-1, 1] to frames of 8 bits, (T, H, W, 3)."""
    frames = pixels.float().permute(1, 2, 3, 0).add(1).mul(127.5).round().clamp(0, 255)
    return frames.to(torch.uint8).cpu()
