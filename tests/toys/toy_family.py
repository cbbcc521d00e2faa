"""A stranger's family, for tests: found through VGEN_FAMILIES, small, and failing on request."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vgen.errors import VgenError
from vgen.family import Checkpoint, Family, PartCard, Rule
from vgen.options import SampleOptions, TrainOptions, opt


@dataclass(kw_only=True)
class Sample(SampleOptions):
    """Options of `vgen sample toy`."""

    image: Path | None = opt(None, help="A picture.")
    sharpness: float = opt(0.5, help="How sharp.", low=0.0, high=1.0)
    smooth: bool = opt(True, help="Smooth edges.")
    sampler: Literal["slow", "fast"] | None = opt(None, help="Which sampler.")


def describe(folder: Path) -> Checkpoint:
    """What a folder of this family was made for."""
    rules = {"num_frames": Rule(8, 1, high=49), "height": Rule(16, low=16)}
    return Checkpoint("local", defaults={"num_frames": 9, "fps": 8.0, "height": 32, "width": 32}, rules=rules)


def load(folder: Path, checkpoint: Checkpoint, *rest: Any) -> Any:
    """Fail in the way that TOY_FAILS names."""
    kind = os.environ.get("TOY_FAILS", "")
    if kind == "memory":
        import torch

        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
    if kind == "interrupt":
        raise KeyboardInterrupt
    if kind == "mend":
        raise VgenError("The toy is broken.", "Mend it.")
    raise ZeroDivisionError("toys cannot divide")


family = Family(
    name="toy",
    summary="A toy.",
    paper="arXiv:0000.00000",
    verbs={"sample": Sample, "finetune": TrainOptions},
    load="toy_family:load",
    checkpoints=(
        Checkpoint("big", "toys/big", license="mit", defaults={"num_frames": 49, "fps": 8.0}),
        Checkpoint("1.5-xl", "toys/xl", license="mit", summary="larger"),
    ),
    default="big",
    parts=(PartCard("body", "the body"), PartCard("wheels", "the wheels")),
    demo=Path(__file__).parent / "demo",
    describe=describe,
    examples={"sample": ('vgen sample toy "a toy"', 'vgen sample toy "a toy" --seed 1')},
)
