"""Packs: clips of any shapes in one sequence of tokens, filled up to a budget, and the training loss over them.

After "Patch n' Pack" (Dehghani et al. 2023, arXiv:2307.06304), as CogVideoX mixes sizes and lengths of clips in one
batch (arXiv:2408.06072, section 3): no clip is cut or dropped for its shape.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, Generic, TypeVar

import torch
from torch import Generator, Tensor

from vgen.diffusion import Kind, Process, add_noise, levels, sample_times, target
from vgen.errors import UsageError, VgenError
from vgen.machine import seeded

Item = TypeVar("Item")
PredictPack = Callable[[list[Tensor], Tensor, Mapping[str, Any]], Sequence[Tensor]]


class Packs(Generic[Item]):
    """Which items make up each pack of at most `budget` tokens; every item comes once in every epoch.

    How many items of which lengths lie together is settled once, by best fit, longest first; every epoch draws anew
    which item of a length takes which place, and in which order the packs come. So `of(step)` depends on the seed and
    the step alone, and all epochs have as many packs.
    """

    def __init__(self, items: Sequence[Item], tokens: Callable[[Item], int], budget: int, seed: int) -> None:
        """Raises VgenError where there is nothing to pack, UsageError for an item longer than the budget."""
        self.by_length: dict[int, list[Item]] = defaultdict(list)
        for item in items:
            self.by_length[tokens(item)].append(item)
        if not self.by_length:
            raise VgenError("There is nothing to train on: no clip was found.", "Check --data.")
        longest = max(self.by_length)
        if longest > budget:
            raise UsageError(
                f"A clip of {longest} tokens does not fit into --pack {budget}.", f"Set --pack {longest} or more."
            )
        self.budget, self.seed = budget, seed
        self.plan = fill({n: len(some) for n, some in self.by_length.items()}, budget)
        self.epoch = lru_cache(maxsize=2)(self._epoch)

    @property
    def utilisation(self) -> float:
        """The share of all packs' room that holds tokens."""
        return sum(map(sum, self.plan)) / (self.budget * len(self.plan))

    def _epoch(self, epoch: int) -> list[list[Item]]:
        queues: dict[int, Iterator[Item]] = {}
        for n, some in self.by_length.items():
            order = torch.randperm(len(some), generator=seeded(self.seed, "pack", epoch, n)).tolist()
            queues[n] = iter([some[i] for i in order])
        packs = [[next(queues[n]) for n in lengths] for lengths in self.plan]
        mixed = torch.randperm(len(packs), generator=seeded(self.seed, "mix", epoch)).tolist()
        return [packs[i] for i in mixed]

    def of(self, step: int) -> list[Item]:
        """The items of pack number `step`, counted from the start of training."""
        epoch, i = divmod(step, len(self.plan))
        return self.epoch(epoch)[i]


def fill(counts: Mapping[int, int], budget: int) -> list[list[int]]:
    """The lengths in each pack, for so many items of each length: best fit, longest first.

    An item goes where it leaves the least room, else into a new pack. No length may exceed the budget.
    """
    packs: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, pack), ascending
    for length in sorted(counts, reverse=True):
        for _ in range(counts[length]):
            place = bisect_left(room, (length, 0))
            left, pack = room.pop(place) if place < len(room) else (budget, len(packs))
            if pack == len(packs):
                packs.append([])
            packs[pack].append(length)
            insort(room, (left - length, pack))
    return packs


def loss(
    predict: PredictPack,
    process: Process,
    kind: Kind,
    clips: Sequence[Tensor],
    cond: Mapping[str, Any],
    generator: Generator,
    *,
    weights: Sequence[Tensor] | None = None,
    share: tuple[int, int] | None = (0, 1),
) -> Tensor:
    """Mean square error of each clip (1, C, T, H, W), then the mean over clips: long clips weigh no more than short.

    Each clip has a time and noise of its own, from `generator`; times are stratified over the pack, `share` as in
    `diffusion.sample_times`. `weights`, one for each clip, multiply the error of its elements. A pack of clips of one
    shape has the loss that `diffusion.loss` gives their batch.
    """
    t = sample_times(process, len(clips), generator, share)
    noise = torch.randn(sum(clip.numel() for clip in clips), generator=generator)
    parts = noise.split([clip.numel() for clip in clips])
    e = [part.view(clip.shape).to(clip.device) for part, clip in zip(parts, clips, strict=True)]
    wide = [process.input_scale(one).item() for one in t]
    z = [w * add_noise(process, x, n, one) for w, x, n, one in zip(wide, clips, e, t, strict=True)]
    told = process.network_time(t).to(torch.float32).to(clips[0].device)
    errors = []
    for i, output in enumerate(predict(z, told, cond)):
        a, s = levels(process, t[i], clips[i])
        error = (output - target(kind, clips[i], e[i], a, s)) ** 2
        errors.append((error if weights is None else error * weights[i]).mean())
    return torch.stack(errors).mean()
