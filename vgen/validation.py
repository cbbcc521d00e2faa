"""Samples while training: clips of fixed prompts by the weights as they are, in the memory that training leaves."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import fields
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

from vgen import family
from vgen.errors import UsageError
from vgen.family import Checkpoint, Family
from vgen.generate import decode, draw, streams_of
from vgen.model import Model
from vgen.video_write import write


def wanted(card: Family, base: Path, options: Any) -> list[Any]:
    """The options of `sample` for each validation prompt, or for the picture of a family that starts from one.

    Raises UsageError where the checkpoint cannot take them.
    """
    kind: Any = card.options("sample")
    known = {f.name: f.metadata.get("positional", False) for f in fields(kind)}
    alone = options.validation_image and known.get("image")
    if not options.validation_prompt and not alone:
        if options.validation_image:
            raise UsageError(
                "--validation-image is where validation clips start from.", "Give --validation-prompt too."
            )
        return []
    if getattr(options, "train_text_encoder", False):
        raise UsageError(
            "--validation-prompt and --train-text-encoder exclude each other: prompts are embedded before training.",
            "Leave one out.",
        )
    told = {"seed": options.seed, "image": options.validation_image, "vae_tiling": True, "vae_slicing": True}
    if options.validation_image and "image" not in known:
        raise UsageError(f"--validation-image does nothing: '{card.name}' starts from text.", "Leave it out.")
    given = {name: value for name, value in told.items() if name in known}
    checkpoint = card.describe(base) if card.describe else Checkpoint(base.name)
    prompts = options.validation_prompt or [""]
    return [family.resolve(card, kind(prompt=one, **given), checkpoint) for one in prompts]


def prepare(model: Model, asked: Sequence[Any]) -> None:
    """Have the texts embedded, and kept on the disk, while nothing else is in memory."""
    for one in asked if model.text_space else ():
        model.draw(model.base[0], one, {})


def shown(load: Callable[[], Model], model: Model, asked: Sequence[Any], folder: Path) -> Callable[[int], None]:
    """What writes a clip for each of `asked` to folder/STEP-i.mp4 (or .png).

    Networks that train are those of `model`; all others are of a second model that `load` makes for the time being.
    """

    @torch.inference_mode()
    def show(step: int) -> None:
        beside = load()
        for i, one in enumerate(asked):
            start = getattr(beside, "start", None)
            streams, names = start(one) if start else ({}, model.base)
            for name in names:
                told, part = beside.draw(name, one, streams), model.denoiser(name, one)
                made = draw(part, told, lambda name, i, n: None)
                streams |= streams_of(part, beside.space, made)
                del told, made
            frames = decode(beside, streams)[0]
            kind = "png" if len(frames) == 1 else "mp4"
            rate = Fraction(one.fps).limit_denominator(1001)
            write(folder / f"{step:06d}-{i}.{kind}", frames, rate, metadata={"prompt": one.prompt, "step": step})
        del beside
        gc.collect()
        if model.machine.device.type == "cuda":
            torch.cuda.empty_cache()

    return show
