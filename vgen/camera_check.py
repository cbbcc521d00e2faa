"""The check of a camera adapter: samples with it and without it, and how the camera moves in both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from statistics import fmean
from typing import Any

from vgen import camera, family, lora
from vgen.adapter_file import WEIGHTS
from vgen.camera import Motion, along, matches
from vgen.clips import Item, Size
from vgen.family import Checkpoint, Family
from vgen.generate import decode, generate
from vgen.lora_source import Source
from vgen.model import Model, OnStep

ENOUGH = 0.75  # share of the samples that have to show the motion


def wanted(card: Family, checkpoint: Checkpoint, pictures: Sequence[Item], size: Size, seed: int) -> list[Any]:
    """The options of `sample` for a sample from each picture, or from its caption where a family takes text alone.

    Raises UsageError where the checkpoint cannot be sampled so.
    """
    kind: Any = card.options("sample")
    known = {f.name for f in fields(kind)}
    asked = []
    for i, one in enumerate(pictures):
        told: dict[str, Any] = {"seed": seed + i, "num_frames": size[0], "height": size[1], "width": size[2]}
        if "image" in known and "image" in checkpoint.modes:
            told["image"] = one.path
        else:
            told["prompt"] = one.captions[0] if one.captions else ""
        asked.append(family.resolve(card, kind(**{k: v for k, v in told.items() if k in known}), checkpoint))
    return asked


def check(
    card: Family, load: Callable[[], Model], base: Path, adapter: Path, word: str, asked: Sequence[Any], on_step: OnStep
) -> dict[str, Any]:
    """Sample as `asked` without the adapter in the folder `adapter` and with it, and `judge` the camera of both."""
    model = load()
    motions: dict[str, list[Motion]] = {"without": [], "with": []}
    for i, (name, seen) in enumerate(motions.items()):
        if name == "with":
            lora.use(card, model, base, [Source(str(adapter), adapter / WEIGHTS, 1.0)])
        for k, one in enumerate(asked):
            frames = decode(model, generate(model, one, lambda name, i, n: None))[0]
            seen.append(camera.estimate(frames))
            on_step(f"check {word}", i * len(asked) + k + 1, 2 * len(asked))
    return judge(word, motions["without"], motions["with"])


def judge(word: str, without: Sequence[Motion], with_: Sequence[Motion]) -> dict[str, Any]:
    """What vgen.json keeps as "camera": the word, the figures of both kinds of samples, and whether that is good.

    Figures: the number `of` samples, how many `show` the motion, in how many it is `known`, the mean `shift` that way
    in shares of the frame. It is `good` where at least ENOUGH show it, and the mean shift is larger than without.
    """
    before, after = _figures(without, word), _figures(with_, word)
    good = after["show"] >= ENOUGH * after["of"] and after["shift"] > before["shift"]
    return {"word": word, "with": after, "without": before, "good": good}


def _figures(motions: Sequence[Motion], word: str) -> dict[str, Any]:
    known = [one for one in motions if one.known]
    shift = fmean(along(one, word) for one in known) if known else 0.0
    show = sum(matches(one, word) for one in motions)
    return {"of": len(motions), "show": show, "known": len(known), "shift": round(shift, 4)}


def told(figures: dict[str, Any]) -> str:
    """The figures of a check in a sentence."""
    after, before = figures["with"], figures["without"]
    return (
        f"Camera '{figures['word']}': {after['show']} of {after['of']} samples show it with the adapter"
        f" (mean shift {100 * after['shift']:+.1f} % of the frame), {before['show']} of {before['of']} without"
        f" ({100 * before['shift']:+.1f} %)."
    )


def mend(figures: dict[str, Any]) -> str:
    """What to do about an adapter that is not good."""
    after = figures["with"]
    if 2 * after["known"] < after["of"]:
        return "Most samples have too little texture to measure: check with other clips, or look at samples."
    if after["shift"] <= figures["without"]["shift"]:
        return "It learnt nothing of it: look at kept.png, then raise --learning-rate or --max-train-steps."
    return "It goes the right way, but not far enough: train on from it with --init-lora, to another folder."
