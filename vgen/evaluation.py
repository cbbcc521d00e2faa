"""The loss on clips that are not trained on, with the same noise and the same times whenever it is asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from vgen.machine import seeded
from vgen.model import Part

BANDS = 4  # equal parts of the distribution of training times, from little noise to much


@torch.no_grad()
def evaluate(part: Part, held: Sequence[Callable[[], Mapping[str, Any]]], seed: int | None) -> dict[str, float]:
    """The mean loss over the clips of the batches `held`, and that of each band of times where the part diffuses."""
    bands = BANDS if hasattr(part, "process") else 1
    sums, clips = [0.0] * bands, 0
    for i, make in enumerate(held):
        batch = make()
        count = len(batch["keys"])
        clips += count
        for band in range(bands):
            told = {**batch, "progress": math.inf, "share": (band, bands)}
            sums[band] += count * part.loss(told, seeded(seed, "evaluation", i, band)).item()
    figures = {"eval_loss": sum(sums) / bands / clips}
    return figures | ({f"eval_loss_band_{band}": total / clips for band, total in enumerate(sums)} if bands > 1 else {})
