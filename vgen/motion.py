"""How much a clip moves: the Farneback motion score of Stable Video Diffusion, and the bucket that stands for it.

The score is the mean length of the optical flow between frames half a second apart (arXiv 2311.15127, appendix C; the
parameters of the flow are not published, those here are OpenCV's usual ones). Frames are uint8 RGB.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np

from vgen.errors import UsageError

RATE = 2  # samples a second
SIDE = 96  # pixels of the shorter side at which flow is measured: at 256 it finds a third of a slow pan
UNIT = 256  # pixels of the shorter side for which scores are told
GRID = 16  # pixels of the shorter side to which flow is averaged
BUCKETS = 256
MEDIAN = 6.0  # px per half second: about that of ordinary clips, for checkpoints that bring no table


def score(frames: Iterable[Any], fps: Fraction | float) -> float:
    """Mean motion of a clip, in pixels per half second for a frame whose shorter side is 256 pixels.

    `frames` are (T, H, W, 3) uint8, or anything that gives (H, W, 3) one by one; all but the samples are let go. They
    are sampled at 2 a second. A clip with fewer than two samples is measured between its first frame and its last;
    flow between frames that are not just half a second apart is scaled to that. One frame does not move: 0.

    Flow is measured at a shorter side of 96 pixels, or that of a smaller clip, and its pixels are counted as if there
    were 256: measured at 256, Farneback's flow loses slow motion in all that is blurred or was small.
    The score saturates: with three levels of pyramid and a window of 15 pixels, motion of more than about a tenth of
    the shorter side in half a second (25 px) comes out too small. Raises UsageError where there is no frame.
    """
    if fps <= 0:
        raise UsageError(f"A clip cannot have {fps} frames a second.")
    step = float(fps) / RATE
    total, pairs = 0.0, 0
    before: Any = None
    at = last = -1
    frame: Any = None
    for last, frame in enumerate(frames):
        if math.floor((last + 0.5) / step) == math.floor((last - 0.5) / step):
            continue  # no multiple of half a second is nearest to this frame
        gray = _gray(frame)
        if before is not None:
            total, pairs = total + _between(before, gray) * step / (last - at), pairs + 1
        before, at = gray, last
    if last < 0:
        raise UsageError("Motion cannot be measured in a clip without frames.")
    if pairs == 0 and last > 0:
        return _between(before, _gray(frame)) * step / last
    return total / max(pairs, 1)


def _gray(frame: Any) -> Any:
    """A frame (H, W, 3) as luma (h, w) uint8 with a shorter side of at most 96 pixels."""
    import cv2

    image = np.ascontiguousarray(frame)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise UsageError(f"Motion is measured in frames (H, W, 3) of uint8, not {image.shape} of {image.dtype}.")
    gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    small = SIDE / min(gray.shape)
    return gray if small >= 1 else cv2.resize(gray, _shape(gray, small), interpolation=cv2.INTER_AREA)


def _shape(image: Any, factor: float) -> tuple[int, int]:
    """Width and height of an image (h, w, ...) that is made smaller by `factor`."""
    return max(1, round(image.shape[1] * factor)), max(1, round(image.shape[0] * factor))


def _between(before: Any, after: Any) -> float:
    """Mean length of the flow between two gray frames, over a map of 16 pixels on the shorter side, in units."""
    import cv2

    flow = cv2.calcOpticalFlowFarneback(
        before, after, np.zeros((*before.shape, 2), np.float32), 0.5, 3, 15, 3, 5, 1.2, 0
    )
    shorter = min(before.shape)
    flow = cv2.resize(flow, _shape(flow, min(1, GRID / shorter)), interpolation=cv2.INTER_AREA)
    return float(np.hypot(flow[..., 0], flow[..., 1]).mean()) * UNIT / shorter


def ecdf(scores: Sequence[float]) -> tuple[float, ...]:
    """The distribution of the scores of a set of clips as 256 quantiles, rising: number i is not exceeded by i / 255.

    Raises UsageError for no scores.
    """
    if not len(scores):
        raise UsageError("A distribution of motion needs at least one score.")
    return tuple(float(q) for q in np.quantile(np.asarray(scores, np.float64), np.linspace(0, 1, BUCKETS)))


def default_table() -> tuple[float, ...]:
    """A table for checkpoints that have none: an exponential distribution with a median of 6 px per half second.

    The table of the released checkpoints is not published; they take 127, the median, by default.
    """
    return tuple(-MEDIAN * math.log2(1 - i / BUCKETS) for i in range(BUCKETS))


def bucket(score: float, table: Sequence[float]) -> int:
    """The motion bucket, 0 to 255, of a score: 255 times the share of clips that move no more. 127 is the median.

    `table` is made by `ecdf`. Raises UsageError where it does not hold 256 rising numbers.
    """
    if len(table) != BUCKETS or any(a > b for a, b in pairwise(table)):
        raise UsageError(f"A table of motion holds {BUCKETS} rising quantiles; this one holds {len(table)} numbers.")
    above = bisect_right(table, score)
    if above in (0, BUCKETS):
        return min(above, BUCKETS - 1)
    low, high = table[above - 1], table[above]
    return round(above - 1 + (score - low) / (high - low))
