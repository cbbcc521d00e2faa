"""Training batches as a pure function of (seed, step), so that every resume sees the same data."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from vgen.errors import VgenError
from vgen.latents import Space, sample_posterior, scale
from vgen.machine import seeded
from vgen.store import Store

Item = TypeVar("Item")
Batch = dict[str, Any]
Shape = tuple[int, ...]
KEPT = 1 << 29  # a data set of at most so many numbers (2 GiB in fp32) stays in memory once it has been read


@dataclass(frozen=True)
class Clip:
    """A clip of a store, and the shape (C, T, H, W) of its latents."""

    store: Store
    key: str
    shape: Shape


class Order(Protocol):
    """Which items make up each batch."""

    def of(self, step: int) -> Sequence[Any]:
        """The items of batch number `step`, counted from the start of training."""
        ...


Arrange = Callable[[Sequence[Clip]], Order]


class Batches(Generic[Item]):
    """Which items make up each batch. Items of one group (one shape) are batched together.

    In every epoch each group is shuffled and cut into batches, the last of which is filled up from the group's
    start, and then the batches of all groups are shuffled: `of(step)` depends on the seed and the step alone.
    """

    def __init__(self, groups: Mapping[Hashable, Sequence[Item]], size: int, seed: int) -> None:
        self.groups = [list(group) for group in groups.values() if group]
        if not self.groups:
            raise VgenError("There is nothing to train on: no clip was found.", "Check --data.")
        self.size, self.seed = size, seed
        self.epoch = lru_cache(maxsize=2)(self._epoch)

    @property
    def per_epoch(self) -> int:
        """Batches in one pass over the data."""
        return sum(-(-len(group) // self.size) for group in self.groups)

    def _epoch(self, epoch: int) -> list[list[Item]]:
        batches = []
        for g, group in enumerate(self.groups):
            order = torch.randperm(len(group), generator=seeded(self.seed, "order", epoch, g)).tolist()
            for start in range(0, len(group), self.size):
                batches.append([group[order[(start + k) % len(group)]] for k in range(self.size)])
        mixed = torch.randperm(len(batches), generator=seeded(self.seed, "mix", epoch)).tolist()
        return [batches[i] for i in mixed]

    def of(self, step: int) -> list[Item]:
        """The items of batch number `step`, counted from the start of training."""
        epoch, i = divmod(step, self.per_epoch)
        return self.epoch(epoch)[i]


def by_shape(clips: Sequence[Clip], size: int, seed: int) -> Batches[Clip]:
    """Batches of `size` clips of one shape each."""
    groups: dict[Hashable, list[Clip]] = {}
    for clip in clips:
        groups.setdefault(clip.shape, []).append(clip)
    return Batches(groups, size, seed)


def ahead(make: Callable[[int], Batch], steps: range) -> Iterator[Batch]:
    """make(step) for every step, each one prepared by a thread while the one before is used."""
    with ThreadPoolExecutor(1) as worker:
        waiting = worker.submit(make, steps[0]) if steps else None
        for step in steps:
            assert waiting is not None
            ready = waiting.result()
            waiting = worker.submit(make, step + 1) if step + 1 in steps else None
            yield ready


def choose(captions: Sequence[str], dropout: float, generator: torch.Generator) -> str:
    """One caption of a clip by a seeded draw; none, the empty text, with probability `dropout`."""
    u, v = torch.rand(2, generator=generator).tolist()
    return "" if u < dropout or not captions else captions[int(v * len(captions))]


def stack(tensors: Sequence[Tensor]) -> Tensor:
    """Clips of one shape to a batch, float32."""
    return torch.stack([t.float() for t in tensors])


def together(tensors: Sequence[Tensor]) -> Tensor | list[Tensor]:
    """Clips of one shape to a batch, of several to a list of batches of one; float32."""
    return stack(tensors) if len({t.shape for t in tensors}) == 1 else [t.float()[None] for t in tensors]


def pixel_batches(
    items: Sequence[Any], size: tuple[int, int, int], batch_size: int, seed: int
) -> Callable[[int], Batch]:
    """Batches of pixels (B, 3, T, H, W) in [-1, 1] of `size` (T, H, W), read from clips when they are needed."""
    from vgen.clips import load

    batches = Batches({size: items}, batch_size, seed)

    def make(step: int) -> Batch:
        chosen = batches.of(step)
        return {
            "pixels": stack([load(item, *size, fps=None)[0] for item in chosen]),
            "keys": [str(item.path) for item in chosen],
        }

    return make


def latent_batches(
    stores: Sequence[Store], space: Space, arrange: Arrange, seed: int, *, dropout: float, texts: bool
) -> Callable[[int], Batch]:
    """Batches of scaled latents from stores, with 'captions', and 'text' (B, L, D) where `texts`.

    `arrange` says which clips go together. Those of one shape are (B, C, T, H, W), of several a list of
    (1, C, T, H, W). The draw from the posterior, the choice among captions and their dropout (the empty text, whose
    embedding every store holds) depend on (seed, step) alone.
    """
    found: list[Clip] = []
    numbers = 0
    for store in stores:
        for record in store.records():
            shapes = [tuple(tensor["shape"]) for tensor in record["tensors"].values()]
            numbers += sum(map(math.prod, shapes))
            found.append(Clip(store, record["key"], shapes[0]))
    batches = arrange(found)
    read = lru_cache(None if numbers <= KEPT else 0)(lambda store, key: store.get(key))

    def make(step: int) -> Batch:
        chosen = batches.of(step)
        made: dict[str, list[Any]] = {"latents": [], "captions": [], "keys": [], "text": [], "mask": []}
        for i, clip in enumerate(chosen):
            generator = seeded(seed, "clip", step, i)
            streams, record = read(clip.store, clip.key)
            caption = choose(record.get("captions", ()), dropout, generator)
            made["latents"].append(scale(space, sample_posterior(streams, generator).float()))
            made["captions"].append(caption)
            made["keys"].append(record.get("source", {}).get("uri", clip.key))
            if texts:
                made["text"].append(clip.store.text(caption)["text"])
            if "mask" in streams:
                made["mask"].append(streams["mask"])
        stacked = {name: together(made[name]) for name in ("latents", "text", "mask") if len(made[name]) == len(chosen)}
        return {"captions": made["captions"], "keys": made["keys"], **stacked}

    return make
