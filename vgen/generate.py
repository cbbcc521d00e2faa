"""Sampling: the denoisers of any family, run in order, from noise to streams of latents."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vgen.latents import Space, unscale
from vgen.model import Chain, Denoiser, Draw, Model, OnStep
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
    """The streams of the clips that `options` ask for, unscaled, on the CPU: (B, C, T, H, W), of each base part."""
    chain = getattr(model, "chain", None)
    windows = chain(options) if chain else Chain(1, 0, 0, 0)
    streams: dict[str, Tensor] = {}
    for k in range(windows.count):
        told = partial(_window, on_step, k, windows.count)
        made = _pass(model, options, _before(streams), told)
        streams = {name: joined(streams[name], s, windows.overlap) for name, s in made.items()} if streams else made
    return {name: s[:, :, : windows.frames or None] for name, s in streams.items()}


def _pass(model: Model, options: Any, given: Mapping[str, Tensor], on_step: OnStep) -> dict[str, Tensor]:
    """The streams of one window: those that the user gives, and of every base part that runs, in order."""
    start = getattr(model, "start", None)
    streams, names = start(options) if start else ({}, model.base)
    for name in names:
        asked = model.draw(name, options, {**given, **streams})
        part = model.denoiser(name, options)
        with model.machine.holding(*part.modules.values()):
            streams |= streams_of(part, model.space, draw(part, asked, on_step))
    return dict(streams)


def streams_of(part: Denoiser, space: Space, made: Tensor) -> dict[str, Tensor]:
    """What a denoiser has made, as streams, unscaled, on the CPU: one of its name, or what it takes it apart to."""
    apart = getattr(part, "apart", None)
    streams = apart(made) if apart else {part.stream: unscale(space, made)}
    return {name: stream.cpu() for name, stream in streams.items()}


def _before(streams: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The windows so far as the next one is given them: the first stream as 'before', all as 'before_' and the name."""
    every = {f"before_{name}": stream for name, stream in streams.items()}
    return {"before": next(iter(streams.values())), **every} if streams else {}


def _window(on_step: OnStep, k: int, count: int, name: str, i: int, n: int) -> None:
    """Progress of one window of several as progress of all."""
    on_step(name, k * n + i, count * n)


def joined(before: Tensor, after: Tensor, overlap: int) -> Tensor:
    """Two clips (B, C, T, H, W) that share `overlap` frames, faded from one to the other; the first of them stays."""
    if not overlap:
        return torch.cat([before, after], 2)
    share = (torch.arange(overlap) / overlap).view(1, 1, -1, 1, 1).to(before)
    both = before[:, :, -overlap:] * (1 - share) + after[:, :, :overlap] * share
    return torch.cat([before[:, :, :-overlap], both, after[:, :, overlap:]], 2)


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
