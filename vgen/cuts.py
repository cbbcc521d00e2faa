"""Cuts: where one shot ends and the next begins, found by a cascade of PySceneDetect's detectors.

One detector at the rate of the clip finds hard cuts and misses dissolves, whose steps are small. The same detector at
lower rates and thresholds sees larger steps and finds them (Stable Video Diffusion, arXiv 2311.15127, appendix C).
At those it also hits fast motion, so that its hits count only where they stand out and two different pictures meet.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise
from statistics import median
from typing import Any, NamedTuple

import numpy as np

WIDTH = 256  # pixels across at which frames are compared
THUMB = 32  # pixels across at which the pictures before and after a transition are compared
DIFFERENT = 20.0  # mean change of H, S and V between those, 0 to 255, that makes them two
AROUND = 2.0  # seconds to either side that a hit of a low threshold has to stand out from ...
OUTSTANDING = 1.6  # ... by so many times their median change
DARK = 12  # mean brightness (V), 0 to 255, below which a frame is black
NEAR = 0.5  # seconds: hits that are closer are one transition, and the longest reach of one beyond its hits
FADE = 0  # the level of a fade through black


class Level(NamedTuple):
    """A detector: frames a second that it looks at (None: all), and the mean change of H, S and V that is a hit."""

    fps: float | None
    threshold: float


CASCADE = (Level(None, 27), Level(15, 20), Level(8, 14))
SLOW = Level(4, 10)  # finds dissolves of more than a second, and more that is none


class Transition(NamedTuple):
    """From one shot to the next: the former ends before frame `end`, the latter begins at `start`.

    A hard cut has the two the same; what lies between belongs to neither. `level` is the number of the first detector
    that saw it, from 1, or 0 for a fade through black.
    """

    end: int
    start: int
    level: int


class Shot(NamedTuple):
    """Frames `start` to `stop` - 1 of a clip; `level` is that of the transition before it, -1 at the beginning."""

    start: int
    stop: int
    level: int


class _Span(NamedTuple):
    """Frames that belong to a transition; a hard cut is the first frame of the new shot alone."""

    first: int
    last: int
    level: int
    hard: bool = False


@dataclass
class _Watch:
    """One detector at work: it looks at every `stride`-th frame."""

    level: Level
    number: int
    stride: int
    scores: list[float] = field(default_factory=list)  # of the frames looked at
    hits: list[int] = field(default_factory=list)  # their places in `scores`
    thumbs: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        from scenedetect.detectors import ContentDetector
        from scenedetect.stats_manager import StatsManager

        self.detector = ContentDetector(self.level.threshold, min_scene_len=0)
        self.detector.stats_manager = StatsManager()

    def see(self, index: int, time: Any, image: Any, thumb: Any) -> None:
        """Look at a frame (h, w, 3), BGR, and its small picture in HSV, if this detector is to see it."""
        if index % self.stride:
            return
        hit = self.detector.process_frame(time, image)
        told = self.detector.stats_manager.get_metrics(time, ["content_val"])[0] if index else 0.0
        self.scores.append(float(told))
        self.thumbs.append(thumb)
        if hit:
            self.hits.append(len(self.scores) - 1)

    def spans(self, reach: int, around: int) -> list[_Span]:
        """What was found, each hit drawn out, for at most `reach` frames, while as much changes as half the threshold.

        Hits of all detectors but the first have to stand out from the `around` frames to either side.
        """
        found = []
        for hit in self.hits:
            usual = self._around(hit, max(2, around // self.stride))
            if self.number > 1 and self.scores[hit] < OUTSTANDING * usual:
                continue
            least = max(self.level.threshold / 2, OUTSTANDING * usual)
            first = last = hit
            while first > 1 and (hit - first) * self.stride < reach and self.scores[first - 1] >= least:
                first -= 1
            while last + 1 < len(self.scores) and (last - hit) * self.stride < reach and self.scores[last + 1] >= least:
                last += 1
            hard = self.stride == 1 and first == last
            if self.number > 1 and _change(self.thumbs[first - 1], self.thumbs[last]) < DIFFERENT:
                continue
            room = self.stride - 1  # a step more on either side: what changes less than a hit begins between looks
            found.append(_Span((first - 1) * self.stride + 1 - room, last * self.stride + room, self.number, hard))
        return found

    def _around(self, hit: int, reach: int) -> float:
        """The median score of the neighbours of a hit."""
        others = self.scores[max(1, hit - reach) : hit] + self.scores[hit + 1 : hit + 1 + reach]
        return median(others) if others else 0.0


def _change(a: Any, b: Any) -> float:
    """Mean difference of two pictures in HSV, of hue around its circle."""
    apart = np.abs(a.astype(np.int16) - b)
    apart[..., 0] = np.minimum(apart[..., 0], 180 - apart[..., 0])
    return float(apart.mean())


def detect(
    frames: Iterable[Any], fps: Fraction | float, levels: Sequence[Level] = CASCADE, *, fades: bool = True
) -> tuple[int, list[Transition]]:
    """How many frames (H, W, 3) uint8 RGB there are, and the transitions among them, in order.

    Hits of all levels that are less than half a second apart are one transition; it takes one frame more on either
    side than changes. A coarse hit that a finer one explains adds nothing, so hard cuts stay exact.
    """
    from scenedetect import FrameTimecode

    rate = float(fps)
    strides = [1 if level.fps is None else max(1, round(rate / level.fps)) for level in levels]
    watches = [_Watch(*told) for told in zip(levels, range(1, len(levels) + 1), strides, strict=True)]
    black: list[bool] = []
    for index, frame in enumerate(frames):
        image, thumb = _small(frame)
        black.append(float(thumb[..., 2].mean()) < DARK)
        for watch in watches:
            watch.see(index, FrameTimecode(index, rate), image, thumb)
    near = max(1, round(NEAR * rate))
    spans: list[_Span] = []
    for watch in watches:
        new = watch.spans(near, round(AROUND * rate))
        spans += [span for span in new if not any(_meet(span, old) for old in spans if old.level < span.level)]
    spans += _fades(black) if fades else []
    return len(black), _transitions(spans, near, len(black))


def _small(frame: Any) -> tuple[Any, Any]:
    """A frame (H, W, 3) RGB as BGR of at most `WIDTH` pixels across, and as HSV of `THUMB`; uint8."""
    import cv2

    image = cv2.cvtColor(np.ascontiguousarray(frame), cv2.COLOR_RGB2BGR)
    ratio = image.shape[0] / image.shape[1]
    if image.shape[1] > WIDTH:
        image = cv2.resize(image, (WIDTH, max(1, round(WIDTH * ratio))), interpolation=cv2.INTER_AREA)
    thumb = cv2.resize(image, (THUMB, max(1, round(THUMB * ratio))), interpolation=cv2.INTER_AREA)
    return image, cv2.cvtColor(thumb, cv2.COLOR_BGR2HSV)


def _meet(a: _Span, b: _Span) -> bool:
    return a.first <= b.last and b.first <= a.last


def _fades(black: Sequence[bool]) -> list[_Span]:
    """The runs of black frames."""
    edges = [i for i, (a, b) in enumerate(pairwise([False, *black, False])) if a != b]
    return [_Span(first, past - 1, FADE) for first, past in zip(edges[::2], edges[1::2], strict=True)]


def _transitions(spans: Iterable[_Span], near: int, count: int) -> list[Transition]:
    """Spans that are near each other joined, each with a frame more on either side unless it is a hard cut."""
    joined: list[_Span] = []
    for span in sorted(spans):
        if joined and span.first - joined[-1].last < near:
            old = joined.pop()
            level = min(old.level, span.level)
            hard = old.hard and span.hard and (old.first, old.last) == (span.first, span.last)
            span = _Span(old.first, max(old.last, span.last), level, hard)
        joined.append(span)
    return [
        Transition(s.first, s.last, s.level)
        if s.hard
        else Transition(max(s.first - 1, 0), min(s.last + 2, count), s.level)
        for s in joined
    ]


def shots(count: int, transitions: Sequence[Transition]) -> list[Shot]:
    """The shots of a clip of `count` frames between its transitions, those without a frame left out."""
    starts = [(0, -1), *((t.start, t.level) for t in transitions)]
    stops = [*(t.end for t in transitions), count]
    return [Shot(start, stop, level) for (start, level), stop in zip(starts, stops, strict=True) if start < stop]


def pieces(shots: Iterable[Shot], most: int) -> list[Shot]:
    """Shots of more than `most` frames in parts as equal as can be."""
    parts = []
    for shot in shots:
        length = shot.stop - shot.start
        number = -(-length // most)
        edges = [shot.start + length * k // number for k in range(number + 1)]
        parts += [Shot(start, stop, shot.level) for start, stop in pairwise(edges)]
    return parts
