"""Hard cuts, found while frames go by: between which neighbours nothing may be made up.

A cut is a change that is large by itself and larger than those around it, so that fast motion is none. Frames are
compared as thumbnails, which small motion leaves as they are. Dissolves are motion here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

from torch import Tensor
from torch.nn import functional as F

SIDE = 32  # thumbnails are so many pixels high and wide
LEVEL = 14.0  # mean change in levels of 255 below which nothing is a cut
ALONE = 34.0  # the same where there are no other changes to compare with
RATIO = 3.0  # how many times the mean change around it
AROUND = 2  # changes on either side that are compared with


def marked(frames: Iterable[Tensor]) -> Iterator[tuple[Tensor, bool]]:
    """Frames (H, W, 3) uint8 in order, each with whether a cut stands in front of it. Runs two frames behind."""
    waiting: deque[tuple[Tensor, float]] = deque()
    past: deque[float] = deque(maxlen=AROUND)  # the changes in front of those that wait
    last: Tensor | None = None
    for frame in frames:
        small = thumbnail(frame)
        waiting.append((frame, -1.0 if last is None else float((small - last).abs().mean())))
        last = small
        if len(waiting) > AROUND:
            yield _next(waiting, past)
    while waiting:
        yield _next(waiting, past)


def _next(waiting: deque[tuple[Tensor, float]], past: deque[float]) -> tuple[Tensor, bool]:
    """The frame that waited longest, judged by the changes before and after it. The first has -1 for a change."""
    frame, change = waiting.popleft()
    around = [one for one in (*past, *(c for _, c in waiting)) if one >= 0]
    past.append(change)
    if not around:
        return frame, change >= ALONE
    return frame, change >= LEVEL and change >= RATIO * sum(around) / len(around)


def thumbnail(frame: Tensor) -> Tensor:
    """(3, h, w) levels of 255, averaged over areas; h and w at most SIDE."""
    height, width, _ = frame.shape
    size = (min(height, SIDE), min(width, SIDE))
    return F.adaptive_avg_pool2d(frame.permute(2, 0, 1).float(), size)
