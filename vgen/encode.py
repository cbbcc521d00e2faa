"""Encoding: clips of any source to a store of latents, each one once, bad ones set aside with the reason."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vgen import clips
from vgen.clips import Item, Loaded
from vgen.latents import sample_posterior
from vgen.machine import seeded
from vgen.metrics import psnr
from vgen.model import Model, OnStep
from vgen.probe import BadClip
from vgen.store import Store, key

Size = tuple[int, int, int]  # frames, height, width


@dataclass(frozen=True)
class Encoded:
    """What became of one input. `psnr` is in dB, where it was asked for; `reason` says why it was set aside."""

    source: str
    key: str = ""
    status: str = "encoded"  # or "there already" or "set aside"
    psnr: float | None = None
    reason: str = ""


@dataclass(frozen=True, eq=False)
class _Ready:
    """A clip that waits for the autoencoder."""

    item: Item
    key: str
    clip: Loaded


@torch.inference_mode()
def encode(
    model: Model, store: Store, items: Sequence[Item], sizes: Sequence[Size], options: Any, on_step: OnStep
) -> Iterator[Encoded]:
    """Encode `items` into `store`, each at the one of `sizes` that fits it best, and tell what became of each.

    A key that is there is skipped, so a run goes on where it stopped; `options.overwrite` encodes it again. Content
    that comes twice is encoded once. Clips of one size are encoded together, up to `options.batch_size`, while a thread
    reads the next ones. Bad clips are also listed in set-aside.jsonl.
    """
    model.ready_to_encode()
    waiting: dict[tuple[int, ...], list[_Ready]] = {}
    done = 0
    for outcome in _read_ahead(model, store, items, sizes, options):
        results: list[Encoded] = []
        if isinstance(outcome, Encoded):
            results = [outcome]
        else:
            group = waiting.setdefault(tuple(outcome.clip.pixels.shape), [])
            group.append(outcome)
            if len(group) == options.batch_size:
                results = _put(model, store, group, options)
                group.clear()
        for result in results:
            done += 1
            on_step("encode", done, len(items))
            yield result
    for group in waiting.values():
        for result in _put(model, store, group, options) if group else []:
            done += 1
            on_step("encode", done, len(items))
            yield result


def embed_captions(model: Model, store: Store, items: Sequence[Item], on_step: OnStep) -> None:
    """Store the text embedding of every caption once, and of the empty text, which caption dropout needs.

    Nothing is done for a model without a text encoder.
    """
    if store.text_space is None:
        return
    texts = dict.fromkeys(["", *(caption for item in items for caption in item.captions)])
    missing = [text for text in texts if not store.has_text(text)]
    for i, (text, tensors) in enumerate(zip(missing, model.embed(missing), strict=True)):
        store.put_text(text, tensors)
        on_step("texts", i + 1, len(missing))


def _read_ahead(
    model: Model, store: Store, items: Sequence[Item], sizes: Sequence[Size], options: Any
) -> Iterator[_Ready | Encoded]:
    """Every item read, by a thread that is two clips ahead; or what became of it where it needs no encoding."""
    known: set[str] = set()

    def read(item: Item) -> _Ready | Encoded:
        try:
            seen = clips.look(item)
            size = clips.bucket(item, sizes, options.fps, seen=seen)
            name = key(seen.sha256, _transform(size, options), model.space.id)
            if name in known or (name in store and not options.overwrite):
                return Encoded(item.name, name, "there already")
            loaded = clips.load(item, *size, fps=options.fps, whole=True, seen=seen)
        except BadClip as error:
            return _set_aside(store, item, error)
        known.add(name)
        return _Ready(item, name, loaded)

    worker = ThreadPoolExecutor(1)
    try:
        ahead: deque[Future[_Ready | Encoded]] = deque()
        for item in items:
            ahead.append(worker.submit(read, item))
            if len(ahead) > 2:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        worker.shutdown(cancel_futures=True)


def _transform(size: Size, options: Any) -> dict[str, Any]:
    """What is done to a clip before the autoencoder and kept of what it gives: a part of the clip's key."""
    told = {"size": size, "fps": options.fps, "fit": "cover, centre", "posterior": options.posterior}
    return {**told, "seed": options.seed} if options.posterior == "sample" else told


def _set_aside(store: Store, item: Item, error: BadClip) -> Encoded:
    """Note a bad clip, once for each reason, however often a run is repeated."""
    outcome = Encoded(item.name, status="set aside", reason=error.reason)
    if asdict(outcome) not in set_aside(store.folder):
        with (store.folder / "set-aside.jsonl").open("a") as file:
            file.write(json.dumps(asdict(outcome)) + "\n")
    return outcome


def _put(model: Model, store: Store, group: Sequence[_Ready], options: Any) -> list[Encoded]:
    """Encode a batch of clips of one size and add them to the store."""
    started = time.perf_counter()
    pixels = torch.stack([ready.clip.pixels for ready in group])
    streams = {name: s.cpu() for name, s in model.encode(pixels).items()}
    seconds = (time.perf_counter() - started) / len(group)
    found: list[float | None] = [None] * len(group)
    if options.check:
        found = [psnr(a, b) for a, b in zip(model.decode(as_latents(streams)).float().cpu(), pixels, strict=True)]
    results = []
    for i, ready in enumerate(group):
        one = _posterior({name: s[i] for name, s in streams.items()}, options, ready.key)
        record = {**ready.clip.record, "captions": list(ready.item.captions), "posterior": options.posterior}
        record["encoder_seconds"] = round(seconds, 4)
        if ready.item.facts:
            record["facts"] = dict(ready.item.facts)
        if found[i] is not None:
            record["check"] = {"psnr": round(float(found[i] or 0.0), 3)}
        _, *grid = next(iter(one.values())).shape
        extra = {name: _on_grid(s, (grid[0], grid[1], grid[2])) for name, s in ready.clip.extra.items()}
        if beside := getattr(model, "beside", None):
            extra |= beside(ready.clip.pixels, record)
        if options.overwrite:
            store.remove([ready.key])
        store.put(ready.key, {**one, **extra}, record)
        results.append(Encoded(ready.item.name, ready.key, psnr=found[i]))
    return results


def _on_grid(mask: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """A map (T, H, W) over pixels, averaged onto the grid (T', H', W') of the latents: (1, T', H', W')."""
    return torch.nn.functional.adaptive_avg_pool3d(mask[None, None].float(), grid)[0]


def as_latents(streams: dict[str, Tensor]) -> dict[str, Tensor]:
    """Streams as `decode` takes them: the posterior's mean stands for the latents."""
    rest = {name: s for name, s in streams.items() if name not in ("mean", "logvar")}
    return {**rest, "latents": streams["mean"]} if "mean" in streams else rest


def _posterior(streams: dict[str, Tensor], options: Any, name: str) -> dict[str, Tensor]:
    """What of the posterior is kept: both moments, the mean, or one draw that depends on the clip's key alone."""
    if "mean" not in streams or options.posterior == "moments":
        return streams
    rest = {k: s for k, s in streams.items() if k != "logvar"}
    if options.posterior == "mean":
        return rest
    rest["latents"] = sample_posterior(streams, seeded(options.seed, name))
    del rest["mean"]
    return rest


def set_aside(folder: Path) -> list[dict[str, Any]]:
    """The inputs that were ever set aside, with their reasons."""
    path = folder / "set-aside.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
