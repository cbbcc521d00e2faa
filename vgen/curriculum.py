"""A curriculum: stages of a training run, each with clips, sizes and settings of its own, read from a TOML file."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

from vgen.dataset import Arrange, Clip, Order
from vgen.errors import UsageError, did_you_mean
from vgen.settings import toml

BUCKET = re.compile(r"(\d+)x(\d+)x(\d+)")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """So many optimizer steps on the clips that fit. What is None or empty is as the run's own options say.

    `data` are stores, `buckets` the sizes FRAMESxHEIGHTxWIDTH that are taken, `max_pixels` bounds HEIGHT * WIDTH.
    """

    steps: int
    data: tuple[str, ...] = ()
    buckets: tuple[str, ...] = ()
    max_frames: int | None = None
    max_pixels: int | None = None
    learning_rate: float | None = None
    train_batch_size: int | None = None
    pack: int | None = None

    def takes(self, frames: int, height: int, width: int) -> bool:
        """Whether clips of this size are trained on."""
        if self.buckets and f"{frames}x{height}x{width}" not in self.buckets:
            return False
        return frames <= (self.max_frames or frames) and height * width <= (self.max_pixels or height * width)


@dataclass(frozen=True)
class Curriculum:
    """The stages of a run, one after the other."""

    path: Path
    stages: tuple[Stage, ...]

    @property
    def steps(self) -> int:
        """Steps of all stages together."""
        return sum(stage.steps for stage in self.stages)

    def at(self, step: int) -> tuple[int, int]:
        """The number of the stage that a step belongs to, and the step that the stage began with."""
        first = 0
        for i, stage in enumerate(self.stages):
            if step < first + stage.steps:
                return i, first
            first += stage.steps
        raise IndexError(step)

    @property
    def data(self) -> list[str]:
        """The stores that the stages name."""
        return [folder for stage in self.stages for folder in stage.data]

    def require(self, max_train_steps: int) -> None:
        """Raises UsageError where the run is longer than its stages."""
        if max_train_steps > self.steps:
            raise UsageError(
                f"The stages of {self.path} last {self.steps} steps, and --max-train-steps is {max_train_steps}.",
                f"Set --max-train-steps {self.steps}.",
            )


@dataclass(frozen=True)
class Staged:
    """Batches of one stage after the other; `micro` of them make a step."""

    curriculum: Curriculum
    orders: tuple[Order, ...]
    micro: int

    def of(self, step: int) -> Sequence[Any]:
        """The items of batch number `step`, counted from the start of training."""
        i, first = self.curriculum.at(step // self.micro)
        return self.orders[i].of(step - first * self.micro)


def staged(
    curriculum: Curriculum,
    data: Sequence[str],
    strides: tuple[int, int, int],
    micro: int,
    order: Callable[[int, Stage, Sequence[Clip]], Order],
) -> Arrange:
    """How clips go together under a curriculum: order(i, stage, clips) arranges those that fit stage i.

    `data` are the stores of stages that name none, `strides` those of the latents, in frames, rows and columns. The
    arranging raises UsageError for a stage that no clip fits.
    """

    def arrange(clips: Sequence[Clip]) -> Order:
        orders = []
        for i, stage in enumerate(curriculum.stages):
            folders = {Path(one).resolve() for one in stage.data or data}
            found = [(clip, pixels(clip.shape, strides)) for clip in clips if clip.store.folder.resolve() in folders]
            fit = [clip for clip, size in found if stage.takes(*size)]
            if not fit:
                sizes = sorted({size for _, size in found})
                there = ", ".join("x".join(map(str, size)) for size in sizes[:8])
                raise UsageError(
                    f"{curriculum.path}: no clip fits stage {i + 1}.", f"Its data hold: {there or 'no clips'}."
                )
            orders.append(order(i, stage, fit))
        return Staged(curriculum, tuple(orders), micro)

    return arrange


def pixels(shape: Sequence[int], strides: tuple[int, int, int]) -> tuple[int, int, int]:
    """Frames, height and width of the clip whose latents have the shape (C, T, H, W)."""
    t, h, w = strides
    return (shape[1] - 1) * t + 1, shape[2] * h, shape[3] * w


def read(path: Path) -> Curriculum:
    """The curriculum in a TOML file: an array of tables [[stage]] with the fields of `Stage`. Raises UsageError."""
    table = toml(path, "--curriculum")
    for key in table:
        if key != "stage":
            raise UsageError(f"{path}: no setting '{key}'.", "It is an array of tables, each headed [[stage]].")
    told = table.get("stage", [])
    if not isinstance(told, list) or not told or not all(isinstance(one, dict) for one in told):
        raise UsageError(f"{path} has no stages.", "Write one or more tables, each headed [[stage]].")
    return Curriculum(path, tuple(_stage(one, f"{path}: stage {i + 1}") for i, one in enumerate(told)))


def _stage(told: Mapping[str, Any], where: str) -> Stage:
    hints = get_type_hints(Stage)
    for key in told:
        if key not in hints:
            raise UsageError(f"{where}: no setting '{key}'.", did_you_mean(key, hints))
    if "steps" not in told:
        raise UsageError(f"{where} does not say how long it is.", "Write steps = NUMBER.")
    values = {f.name: _value(f.name, told[f.name], where) for f in fields(Stage) if f.name in told}
    return Stage(**values)


def _value(name: str, raw: Any, where: str) -> Any:
    """A setting in its type. Raises UsageError."""
    if name in ("data", "buckets"):
        if not isinstance(raw, list) or not all(isinstance(one, str) for one in raw):
            raise UsageError(f"{where}: {name} is not a list of texts.", f'Write {name} = ["..."].')
        return _buckets(raw, where) if name == "buckets" else tuple(raw)
    whole = name != "learning_rate"
    number = isinstance(raw, int) or (isinstance(raw, float) and not whole)
    if not number or isinstance(raw, bool) or not raw > 0:
        raise UsageError(f"{where}: {name} = {raw!r} is not a {'whole ' if whole else ''}number above 0.")
    return raw


def _buckets(raw: Sequence[str], where: str) -> tuple[str, ...]:
    for one in raw:
        if not BUCKET.fullmatch(one):
            raise UsageError(f"{where}: the bucket '{one}' is not FRAMESxHEIGHTxWIDTH.", "For example: 49x256x384")
    return tuple(raw)
