"""Classic: methods without weights, which stand beside the learned ones. This file is the card; it imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from vgen.family import Family
from vgen.options import Dtype, InterpolateOptions, opt


@dataclass(kw_only=True)
class Interpolate(InterpolateOptions):
    """Options of `vgen interpolate classic`: nothing is loaded or drawn, and all runs on the CPU."""

    checkpoint: ClassVar[None] = None  # type: ignore[misc]
    device: ClassVar[str] = "cpu"  # type: ignore[misc]
    dtype: ClassVar[Dtype] = "fp32"  # type: ignore[misc]
    seed: ClassVar[int] = 0  # type: ignore[misc]
    batch_size: ClassVar[int] = 1  # type: ignore[misc]
    method: Literal["flow", "linear", "duplicate"] = opt(
        "flow", help="Move pixels along the optical flow, fade from frame to frame, or show each frame again."
    )


family = Family(
    name="classic",
    summary="Methods without weights: optical flow, fading, repeating.",
    paper="DIS flow: arXiv 1603.03590",
    verbs={"interpolate": Interpolate},
    load="vgen.plugins.classic.model:load",
    checkpoints=(),
    examples={
        "interpolate": (
            "vgen interpolate classic clip.mp4 --factor 4 -o slow.mp4",
            "vgen interpolate classic clip.mp4 --fps 60000/1001 --measure -o smooth.mp4",
        )
    },
)
