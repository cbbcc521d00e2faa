"""Ripple: waves of one colour, as an example of a family. This file is its card; it imports no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vgen.errors import UsageError, did_you_mean
from vgen.family import Checkpoint, Family, Rule
from vgen.options import SampleOptions, opt

COLOURS = {"red": (1.0, -1.0, -1.0), "green": (-1.0, 1.0, -1.0), "blue": (-1.0, -1.0, 1.0)}


@dataclass(kw_only=True)
class Sample(SampleOptions):
    """Options of `vgen sample ripple`."""

    crests: int = opt(3, help="Waves across the frame.", low=1, high=16)


def describe(folder: Path) -> Checkpoint:
    """What a checkpoint was made for."""
    told = json.loads((folder / "model_index.json").read_text())
    return Checkpoint(folder.name, defaults=told["defaults"], rules={"num_frames": Rule(4, 1)}, facts=told)


def check(options: Any, checkpoint: Checkpoint) -> None:
    """Refuse what cannot be drawn, before anything loads. Raises UsageError."""
    if not COLOURS.keys() & set(options.prompt.lower().split()):
        raise UsageError("The prompt names no colour.", did_you_mean(options.prompt, COLOURS))


family = Family(
    name="ripple",
    summary="Waves of one colour, from a denoiser that is known in closed form.",
    paper="an example",
    verbs={"sample": Sample},
    load="ripple.model:load",
    checkpoints=(),
    demo=Path(__file__).parent / "demo",
    check=check,
    describe=describe,
    examples={"sample": ('vgen sample ripple "red waves"', 'vgen sample ripple "blue waves" --crests 5 -o blue.gif')},
)
