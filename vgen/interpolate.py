"""Interpolating: more frames between those of a video of any length, by any model that makes frames between two.

The video goes by frame by frame and the result is kept in parts, so memory does not grow with its length.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice, pairwise, repeat
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vgen import video
from vgen.generate import to_frames
from vgen.hard_cuts import marked
from vgen.machine import seeded
from vgen.model import Interpolator, OnStep
from vgen.parts import Parts
from vgen.placing import Gap, Placing

LENGTH = 120  # frames in a part, about; each begins with a key frame


@dataclass(frozen=True, eq=False)
class Pair:
    """Two neighbours (H, W, 3) uint8, the number of the first, and whether a cut lies between them."""

    index: int
    before: Tensor
    after: Tensor
    cut: bool = False


@dataclass
class Told:
    """What was met on the way: the first frames after cuts, gaps in which nothing moved, and how many frames were made.

    Of the parts that were found no frame was made.
    """

    cuts: list[int] = field(default_factory=list)
    still: int = 0
    made: int = 0


Made = dict[int, Tensor]  # frames (H, W, 3) uint8 by their place on the grid of a gap


@torch.inference_mode()
def interpolate(model: Interpolator, placing: Placing, parts: Parts, options: Any, on_step: OnStep) -> Told:
    """Make what is missing of the `parts` of the result; where a part was found, the video is only read past it.

    The given frames are shown as they are. Raises BadClip for a damaged video.
    """
    told = Told()
    frames = marked(video.frames(placing.told.path, seen=placing.told))
    size = max(1, LENGTH // max(1, round(placing.fps / placing.told.fps)))
    end: deque[Tensor] = deque(maxlen=1)

    def passed(count: int) -> None:  # under two names, for the time left is that of making
        found = max(count - 1, 0) // size in parts.found
        on_step("read" if found else "interpolate", count, placing.gaps)

    pairs = _watched(frames, told, end, passed)
    number = 0
    for number, first in enumerate(range(0, placing.gaps, size)):
        some = islice(pairs, size)
        shown = placing.start(min(first + size, placing.gaps)) - placing.start(first)
        if shown and number not in parts.found:
            parts.write(number, _shown(model, placing, some, options, told))
        deque(some, maxlen=0)
    deque(pairs, maxlen=0)  # there are no more, but the decoder may tell of damage at the end
    if placing.behind and number + 1 not in parts.found:
        parts.write(number + 1, repeat(end[0], placing.behind))
    return told


def _watched(
    frames: Iterable[tuple[Tensor, bool]], told: Told, end: deque[Tensor], passed: Callable[[int], None]
) -> Iterator[Pair]:
    """The pairs of neighbours, noted in `told` as they go by; `end` holds the frame that went by last."""
    passed(0)
    for index, ((before, _), (after, cut)) in enumerate(pairwise(frames)):
        told.cuts += [index + 1] * cut
        told.still += torch.equal(before, after)
        end.append(after)
        yield Pair(index, before, after, cut)
        passed(index + 1)


def _shown(model: Interpolator, placing: Placing, pairs: Iterator[Pair], options: Any, told: Told) -> Iterator[Tensor]:
    """The frames of the result from the first of `pairs` to the last, which are made `batch_size` pairs at a time."""
    while group := list(islice(pairs, options.batch_size)):
        gaps = [placing.gap(pair.index) for pair in group]
        for pair, gap, made in zip(group, gaps, between(model, group, gaps, options), strict=True):
            told.made += len(made)
            for place in gap.places:
                yield _at(place, pair, gap, made)


def _at(place: int, pair: Pair, gap: Gap, made: Made) -> Tensor:
    """The frame of a place: a made one, or a given one; the one before a cut stays up to the one behind it."""
    if place in made:
        return made[place]
    return pair.after if place == gap.density and not pair.cut else pair.before


def between(model: Interpolator, pairs: Sequence[Pair], gaps: Sequence[Gap], options: Any) -> list[Made]:
    """The frames to be made for each pair: none across a cut or between equal frames."""
    wanted = []
    for pair, gap in zip(pairs, gaps, strict=True):
        held = pair.cut or torch.equal(pair.before, pair.after)
        wanted.append(set() if held else {place for place in gap.places if 0 < place < gap.density})
    if hasattr(model, "at"):
        each = zip(pairs, gaps, map(sorted, wanted), strict=True)
        return [_any(model, pair, gap, places, options) for pair, gap, places in each]
    known = [{0: pair.before, gap.density: pair.after} for pair, gap in zip(pairs, gaps, strict=True)]
    jobs = [(i, 0, gap.density) for i, gap in enumerate(gaps)]
    while jobs := [job for job in jobs if any(job[1] < place < job[2] for place in wanted[job[0]])]:
        jobs = _halved(model, pairs, known, jobs, options)
    return [{place: k[place] for place in places} for k, places in zip(known, wanted, strict=True)]


def _any(model: Any, pair: Pair, gap: Gap, places: list[int], options: Any) -> Made:
    """The frames of a pair by a model that makes those of any time."""
    if not places:
        return {}
    pixels = model.at(_pixels([(pair.before, pair.after)], 1), [place / gap.density for place in places], options)
    return dict(zip(places, to_frames(pixels[0]), strict=True))


def _halved(
    model: Interpolator, pairs: Sequence[Pair], known: list[Made], jobs: list[tuple[int, int, int]], options: Any
) -> list[tuple[int, int, int]]:
    """Make the frames between two known places, (pair, from, to) for each job, and return the jobs between those."""
    deeper = []
    for some in (jobs[k : k + options.batch_size] for k in range(0, len(jobs), options.batch_size)):
        ends = _pixels([(known[i][low], known[i][high]) for i, low, high in some], model.multiple)
        height, width, _ = pairs[0].before.shape
        seeds = [seeded(options.seed, pairs[i].index, low, high).initial_seed() for i, low, high in some]
        pixels = model.between(ends, options, seeds)[..., :height, :width]
        for (i, low, high), clip in zip(some, pixels, strict=True):
            step = (high - low) // (model.steps + 1)
            known[i].update(zip(range(low + step, high, step), to_frames(clip), strict=True))
            deeper += [(i, place, place + step) for place in range(low, high, step)]
    return deeper


def _pixels(ends: Sequence[tuple[Tensor, Tensor]], multiple: int) -> Tensor:
    """Pairs of frames as pixels (B, 3, 2, H, W) in [-1, 1], mirrored at the far edges up to whole multiples."""
    frames = torch.stack([torch.stack(pair) for pair in ends]).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    height, width = frames.shape[-2:]
    below, right = -height % multiple, -width % multiple
    mode = "reflect" if below < height and right < width else "replicate"
    return F.pad(frames.flatten(0, 1), (0, right, 0, below), mode).unflatten(0, (-1, 3))
