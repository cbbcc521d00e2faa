"""The loss on clips that are not trained on, with the same noise and the same times whenever it is asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar

import torch

from vgen.machine import seeded
from vgen.model import Part

Item = TypeVar("Item")
BANDS = 4  # equal parts of the distribution of training times, from little noise to much
LEAST = 16  # a smaller data set is trained on whole
MOST = 6  # clips: their 24 forward passes are some 2 % of 500 steps on one clip each


def hold_out(
    groups: Mapping[Hashable, Sequence[Item]], share: float, seed: int | None
) -> tuple[dict[Hashable, list[Item]], dict[Hashable, list[Item]]]:
    """(what is trained on, what is held out), by group: a seeded draw of `share` of the items, of 1 to `MOST`.

    A group keeps at least one item to train on. Nothing is held out of fewer than `LEAST` items.
    """
    train = {name: list(group) for name, group in groups.items()}
    held: dict[Hashable, list[Item]] = {}
    places = [(name, i) for name, group in train.items() for i in range(len(group))]
    count = min(MOST, max(1, round(share * len(places)))) if share and len(places) >= LEAST else 0
    taken: set[tuple[Hashable, int]] = set()
    for k in torch.randperm(len(places), generator=seeded(seed, "held out")).tolist():
        name, _ = places[k]
        if len(taken) < count and len(held.get(name, ())) + 1 < len(train[name]):
            taken.add(places[k])
            held.setdefault(name, []).append(train[name][places[k][1]])
    return {n: [one for i, one in enumerate(g) if (n, i) not in taken] for n, g in train.items()}, held


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
