"""Placing: which frames a clip of another rate shows, and when, from the times of the frames that are given.

Time runs from the first given frame, in seconds. Between two given frames lies a grid: the new frames of a gap are
named by their place on it, 0 for the frame before, `density` for the one behind.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

from vgen.probe import Probe
from vgen.remux import Clock

FINE = 32  # places on the grid for each wanted frame, where any time can be made


@dataclass(frozen=True)
class Gap:
    """What is shown from one given frame up to the next: places on a grid of `density` steps."""

    density: int
    places: tuple[int, ...]


@dataclass(frozen=True)
class Placing:
    """The frames of `told` shown `factor` times as often, or at the constant `rate`.

    `steps` is how many frames the model makes between two, and again between those; None where it makes any.
    """

    told: Probe
    factor: int
    rate: Fraction | None
    steps: int | None

    @property
    def gaps(self) -> int:
        """Gaps between given frames."""
        return len(self.told.pts) - 1

    @property
    def fps(self) -> Fraction:
        """The rate of the result; the mean one, where the given frames come at a varying rate and keep it."""
        return self.rate or self.told.fps * self.factor

    @property
    def count(self) -> int:
        """Frames of the result: factor * gaps + 1, or as many as fill the duration at the constant rate."""
        if self.rate is None:
            return self.factor * self.gaps + 1
        return max(round(self.told.duration * self.rate), self.start(self.gaps))

    def time(self, index: int) -> Fraction:
        """When a given frame is shown. Stamps are rounded to the file's ticks; at a constant rate they need not be."""
        return self.told.pts[index] - self.told.pts[0] if self.told.vfr else index / self.told.fps

    def start(self, index: int) -> int:
        """The number, in the result, of the first frame that is shown at or after the given frame `index`."""
        return self.factor * index if self.rate is None else math.ceil(self.time(index) * self.rate)

    def gap(self, index: int) -> Gap:
        """What is shown from the given frame `index` up to the next."""
        if self.rate is None:
            density = dense(self.steps, Fraction(self.factor))
            return Gap(density, tuple(round(Fraction(density * k, self.factor)) for k in range(self.factor)))
        begin, end = self.time(index), self.time(index + 1)
        density = dense(self.steps, self.rate * (end - begin))
        scale = density / (end - begin)
        shown = range(self.start(index), self.start(index + 1))
        return Gap(density, tuple(round((k / self.rate - begin) * scale) for k in shown))

    @property
    def behind(self) -> int:
        """How many frames of the result show the last given frame."""
        return self.count - self.start(self.gaps)

    def clock(self) -> Clock:
        """When the frames of the result are shown. At a factor, the last one stays as long as in the given clip."""
        if self.rate is not None:
            return Clock(1 / self.rate, iter(range(self.count)), 1, self.rate)
        if not self.told.vfr:
            tick = 1 / self.fps
            rest = self.told.duration - self.time(self.gaps)
            return Clock(tick, iter(range(self.count)), max(round(rest / tick), 1), self.fps)
        tick = self.told.time_base / self.factor
        rest = self.told.pts[0] + self.told.duration - self.told.pts[-1]
        return Clock(tick, self._varying(), max(round(rest / tick), 1))

    def _varying(self) -> Iterator[int]:
        """Stamps of a varying rate: each gap in equal parts."""
        base = self.told.time_base
        for index in range(self.gaps):
            begin, end = round(self.time(index) / base), round(self.time(index + 1) / base)
            yield from (begin * self.factor + (end - begin) * k for k in range(self.factor))
        yield round(self.time(self.gaps) / base) * self.factor


def dense(steps: int | None, factor: Fraction | int) -> int:
    """How fine a grid between two frames has to be for `factor` frames in the time of one.

    It is exact where it can be: a multiple of the factor. Else no frame lies off its time by more than a quarter of
    the new rate's interval. A model of 3 steps makes grids of 4, 16, 64 ...
    """
    if steps is None:
        return int(factor) if Fraction(factor).denominator == 1 else FINE * math.ceil(factor)
    grid = steps + 1
    while grid % factor and grid < 2 * factor:
        grid *= steps + 1
    return grid
