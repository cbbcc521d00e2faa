"""Training batches as a pure function of (seed, step), so that every resume sees the same data."""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_right
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import accumulate
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from vgen.errors import UsageError, VgenError
from vgen.latents import Space, sample_posterior, scale
from vgen.machine import seeded
from vgen.store import Store
from vgen.tensorfile import dumps

Item = TypeVar("Item")
Batch = dict[str, Any]
Shape = tuple[int, ...]
LEAST = 16  # a smaller data set is trained on whole
MOST = 4  # clips that are held out: evaluating them twice takes some 2 % of the time of 500 steps of one clip
POSTERIOR = {"latents", "mean", "logvar"}  # the streams of a clip that become a batch's latents
KEPT = 1 << 29  # a data set of at most so many numbers (2 GiB in fp32) stays in memory once it has been read


@dataclass(frozen=True)
class Clip:
    """A clip of a store, and the shape (C, T, H, W) of its latents; without these, the most of its streams in each."""

    store: Store
    key: str
    shape: Shape


@dataclass(frozen=True)
class Data:
    """What a part is trained on: called with a number, it makes that batch, counted from the start of training.

    `held` makes the batches that are not trained on. `notes` say what a user may not expect. `identity` is what a
    resumed run must find unchanged. `sources` has the keys of the clips by the name of what they are from.
    """

    batch: Callable[[int], Batch]
    held: Sequence[Callable[[], Batch]] = ()
    notes: Sequence[str] = ()
    identity: Mapping[str, Any] = field(default_factory=dict)
    sources: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def __call__(self, number: int) -> Batch:
        return self.batch(number)


class Order(Protocol):
    """Which items make up each batch."""

    def of(self, step: int) -> Sequence[Any]:
        """The items of batch number `step`, counted from the start of training."""
        ...


Arrange = Callable[[Sequence[Clip]], Order]


class Batches(Generic[Item]):
    """Which items make up each batch. Items of one group (one shape) are batched together.

    In every epoch each group is shuffled and cut into batches, the last of which is filled up from the group's
    start, and then the batches of all groups are shuffled: `of(step)` depends on the seed and the step alone. No item
    comes twice in a batch: the batches of a group of fewer items than `size` are the whole group.
    """

    def __init__(self, groups: Mapping[Hashable, Sequence[Item]], size: int, seed: int) -> None:
        self.groups = [list(group) for group in groups.values() if group]
        if not self.groups:
            raise VgenError("There is nothing to train on: no clip was found.", "Check --data.")
        self.size, self.seed = size, seed
        self.notes = [_few(name, len(group), size) for name, group in groups.items() if len(group) < size]
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
                batches.append([group[order[(start + k) % len(group)]] for k in range(min(self.size, len(group)))])
        mixed = torch.randperm(len(batches), generator=seeded(self.seed, "mix", epoch)).tolist()
        return [batches[i] for i in mixed]

    def of(self, step: int) -> list[Item]:
        """The items of batch number `step`, counted from the start of training."""
        epoch, i = divmod(step, self.per_epoch)
        return self.epoch(epoch)[i]


def _few(shape: Hashable, count: int, size: int) -> str:
    told = "x".join(map(str, shape)) if isinstance(shape, tuple) else shape
    what, whose = ("clip", "its") if count == 1 else ("clips", "their")
    return f"Only {count} {what} of shape {told}: {whose} batches hold {count}, not {size}."


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


def choose(captions: Sequence[str], dropout: float, generator: torch.Generator, shares: Sequence[float] = ()) -> str:
    """One caption of a clip by a seeded draw; none, the empty text, with probability `dropout`.

    All captions are as likely unless `shares`, one for each, say otherwise.
    """
    u, v = torch.rand(2, generator=generator).tolist()
    if u < dropout or not captions:
        return ""
    if len(shares) != len(captions):
        return captions[int(v * len(captions))]
    place = bisect_right(list(accumulate(shares)), v * sum(shares))
    return captions[min(place, len(captions) - 1)]


def stack(tensors: Sequence[Tensor]) -> Tensor:
    """Clips of one shape to a batch, float32."""
    return torch.stack([t.float() for t in tensors])


def together(tensors: Sequence[Tensor]) -> Tensor | list[Tensor]:
    """Clips of one shape to a batch, of several to a list of batches of one; float32."""
    return stack(tensors) if len({t.shape for t in tensors}) == 1 else [t.float()[None] for t in tensors]


def hold_out(
    groups: Mapping[Hashable, Sequence[Item]], share: float, seed: int
) -> tuple[dict[Hashable, list[Item]], dict[Hashable, list[Item]]]:
    """(what is trained on, what is held out), by group: a seeded draw of `share` of the items, from 1 to `MOST`.

    A group keeps at least one item to train on. Nothing is held out of fewer than `LEAST` items.
    """
    places = [(name, i) for name, group in groups.items() for i in range(len(group))]
    count = min(MOST, max(1, round(share * len(places)))) if share and len(places) >= LEAST else 0
    taken: dict[Hashable, set[int]] = {name: set() for name in groups}
    for k in torch.randperm(len(places), generator=seeded(seed, "held out")).tolist() if count else ():
        name, i = places[k]
        if sum(map(len, taken.values())) < count and len(taken[name]) + 1 < len(groups[name]):
            taken[name].add(i)
    train = {name: [one for i, one in enumerate(group) if i not in taken[name]] for name, group in groups.items()}
    held = {name: [group[i] for i in sorted(taken[name])] for name, group in groups.items() if taken[name]}
    return train, held


def _cut(groups: Mapping[Hashable, Sequence[Item]], size: int) -> list[Sequence[Item]]:
    """Batches of at most `size` items of one group."""
    return [group[i : i + size] for group in groups.values() for i in range(0, len(group), size)]


def _digest(told: Any) -> str:
    return hashlib.sha256(dumps(told).encode()).hexdigest()[:16]


def pixel_batches(
    items: Sequence[Any], size: tuple[int, int, int], batch_size: int, seed: int, *, held: float = 0.0
) -> Data:
    """Batches of pixels (B, 3, T, H, W) in [-1, 1] of `size` (T, H, W), read from clips when they are needed.

    The share `held` of the clips is not trained on.
    """
    from vgen.clips import load

    def assemble(chosen: Sequence[Any]) -> Batch:
        pixels = stack([load(item, *size, fps=None)[0] for item in chosen])
        return {"pixels": pixels, "keys": [item.name for item in chosen]}

    train, out = hold_out({size: items}, held, seed)
    order = Batches(train, batch_size, seed)
    told = sorted([item.name, 0 if item.world else item.path.stat().st_size] for item in items)
    return Data(
        lambda step: assemble(order.of(step)),
        [partial(assemble, some) for some in _cut(out, batch_size)],
        order.notes,
        {"clips": len(items), "content": _digest(told)},
        {"clips": [item.name for item in items]},
    )


def latent_batches(
    stores: Sequence[Store],
    space: Space,
    arrange: Arrange,
    seed: int,
    *,
    dropout: float,
    texts: bool,
    captioned: bool = True,
    held: float = 0.0,
    held_size: int = 1,
) -> Data:
    """Batches of scaled latents from stores, with 'captions', 'text' (B, L, D) where `texts`, and every other stream.

    A family that stores no 'latents' scales the streams of its parts by itself: all but latents come as stored.

    `arrange` says which clips go together. Those of one shape are (B, C, T, H, W), of several a list of
    (1, C, T, H, W). The draw from the posterior, the choice among captions and their dropout (the empty text, whose
    embedding every store holds) depend on (seed, step) alone. The share `held` of the clips is not trained on, and
    comes in batches of at most `held_size`. Raises UsageError where captions are missing but are to be learned.
    """
    groups, told, numbers = _survey(stores, captioned and dropout < 1)
    train, out = hold_out(groups, held, seed)
    order = arrange([clip for group in train.values() for clip in group])
    read = lru_cache(None if numbers <= KEPT else 0)(lambda store, key: store.get(key))

    def assemble(chosen: Sequence[Clip], dropout: float, *told: Any) -> Batch:
        made: dict[str, list[Any]] = {"latents": [], "captions": [], "keys": []}
        for i, clip in enumerate(chosen):
            generator = seeded(seed, *told, i)
            streams, record = read(clip.store, clip.key)
            shares = record.get("facts", {}).get("caption_probs", ())
            caption = choose(record.get("captions", ()), dropout, generator, shares)
            if streams.keys() & POSTERIOR:
                made["latents"].append(scale(space, sample_posterior(streams, generator).float()))
            made["captions"].append(caption)
            made["keys"].append(record.get("source", {}).get("uri", clip.key))
            if texts:
                made.setdefault("text", []).append(clip.store.text(caption)["text"])
            for name in streams.keys() - POSTERIOR:
                made.setdefault(name, []).append(streams[name])
        words = {name: made.pop(name) for name in ("captions", "keys")}
        return {**words, **{name: together(found) for name, found in made.items() if len(found) == len(chosen)}}

    return Data(
        lambda step: assemble(order.of(step), dropout, "clip", step),
        [partial(assemble, some, 0.0, "held out", k) for k, some in enumerate(_cut(out, held_size))],
        getattr(order, "notes", ()),
        {"clips": sum(map(len, groups.values())), "content": _digest(sorted(told))},
        {store.folder.name: store.keys() for store in stores},
    )


def _shape(streams: Mapping[str, Shape]) -> Shape:
    """What the clips of a batch have in common: the shape of latents, or the most of all streams along each axis."""
    latents = [streams[name] for name in sorted(POSTERIOR) if name in streams]
    return latents[0] if latents else tuple(map(max, zip(*(s for s in streams.values() if len(s) == 4), strict=True)))


def _survey(stores: Sequence[Store], captioned: bool) -> tuple[dict[Hashable, list[Clip]], list[Any], int]:
    """The clips of stores by shape, what tells them and their captions apart from any others, and their numbers."""
    groups: dict[Hashable, list[Clip]] = {}
    told, bare, numbers = [], [], 0
    for store in stores:
        for record in store.records():
            tensors, captions = record["tensors"], list(record.get("captions", ()))
            numbers += sum(math.prod(tensor["shape"]) for tensor in tensors.values())
            shape = _shape({name: tuple(tensor["shape"]) for name, tensor in tensors.items()})
            groups.setdefault(shape, []).append(Clip(store, record["key"], shape))
            told.append([record["key"], sorted(tensor["sha256"] for tensor in tensors.values()), captions])
            bare += [] if captions else [str(record.get("source", {}).get("uri", record["key"]))]
    if bare and captioned:
        raise UsageError(
            f"{len(bare)} of {len(told)} clips have no caption: {', '.join(bare[:3])}{' ...' if bare[3:] else ''}",
            "Encode them with captions, or train without any: --caption-dropout 1",
        )
    return groups, told, numbers
