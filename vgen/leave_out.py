"""How good made frames are: given frames left out and made again, beside simple methods; and flicker."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from vgen import video
from vgen.hard_cuts import marked
from vgen.interpolate import Pair, between
from vgen.metrics import flicker, psnr
from vgen.model import Interpolator, OnStep
from vgen.placing import FINE, Gap, Placing, dense

TRIED = 32  # frames at most that are left out
Three = tuple[Tensor, Tensor, Tensor]


@torch.inference_mode()
def measure(
    model: Interpolator, placing: Placing, result: Iterable[Tensor], options: Any, on_step: OnStep
) -> dict[str, Any]:
    """Flicker of the given frames and of the `result`, and the PSNR of given frames made again from their neighbours.

    Every second frame is left out, at most TRIED of them, evenly spread, none beside a cut; 'linear' and 'duplicate'
    are what fading and showing the frame before give instead. Errors are averaged before they become dB; a figure
    that nothing tells of is left out.
    """
    told = placing.told
    every = 2 * max(1, -(-placing.gaps // 2 // TRIED))
    tried: list[dict[str, float]] = []
    levels = []
    for index, three in _threes(video.frames(told.path, seen=told)):
        levels.append(flicker(*three))
        if index % every == 1:
            tried.append(_tried(model, placing, index, three, options))
        on_step("measure", index, placing.gaps - 1)
    after = [flicker(*three) for _, three in _threes(result)]
    figures: dict[str, Any] = {"left_out": len(tried)}
    for name in tried[0] if tried else ():
        figures[f"psnr_{name}"] = _mean([one[name] for one in tried])
    if levels and after:
        figures |= {"flicker_before": round(fmean(levels), 3), "flicker_after": round(fmean(after), 3)}
    return figures


def _threes(frames: Iterable[Tensor]) -> Iterator[tuple[int, Three]]:
    """Three neighbours (H, W, 3) uint8 without a cut between them, and the number of the middle one."""
    shot: list[Tensor] = []
    for index, (frame, cut) in enumerate(marked(frames)):
        shot = [frame] if cut else [*shot[-2:], frame]
        if len(shot) == 3:
            yield index - 1, (shot[0], shot[1], shot[2])


def _tried(model: Interpolator, placing: Placing, index: int, three: Three, options: Any) -> dict[str, float]:
    """The PSNR in dB of the middle frame, made by the model and by the simple methods."""
    before, frame, after = three
    begin, end = placing.time(index - 1), placing.time(index + 1)
    share = (placing.time(index) - begin) / (end - begin)
    steps = getattr(model, "steps", None)
    density = 2 * FINE if steps is None else dense(steps, 2)
    place = min(max(round(share * density), 1), density - 1)
    made = between(model, [Pair(index - 1, before, after)], [Gap(density, (place,))], options)[0].get(place, before)
    linear = torch.lerp(before.float(), after.float(), float(share))
    named = {"made": made, "linear": linear, "duplicate": before}
    return {name: psnr(one.float() / 127.5 - 1, frame.float() / 127.5 - 1) for name, one in named.items()}


def _mean(decibels: list[float]) -> float:
    """The PSNR of the mean error; 99 stands for no error at all."""
    error = fmean(10 ** (-one / 10) for one in decibels)
    return round(-10 * math.log10(error), 2) if error > 0 else 99.0
