"""Camera motion: the pan, tilt, zoom and roll of a clip from optical flow, and the words for them.

Points of texture, one in each cell of a grid, are tracked from frame to frame (pyramidal Lucas and Kanade), and a
similarity (shift, scale, turn) is fitted to their paths by RANSAC (Fischler and Bolles, 1981), so that what moves by
itself does not count. The camera goes where the picture's content comes from: content that moves left is a pan right.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from vgen.errors import UsageError, did_you_mean

Frames = Tensor | NDArray[np.uint8]
Array = NDArray[np.float32]

SIGNS: Mapping[str, tuple[str, int]] = {  # of each word, the figure it means, and in which sense
    "pan-left": ("pan", -1),
    "pan-right": ("pan", 1),
    "tilt-up": ("tilt", 1),
    "tilt-down": ("tilt", -1),
    "zoom-in": ("zoom", 1),
    "zoom-out": ("zoom", -1),
    "roll-left": ("roll", -1),
    "roll-right": ("roll", 1),
}
WORDS = (*SIGNS, "static")
BOTH = {axis: tuple(word for word in SIGNS if word.startswith(axis)) for axis in ("pan", "tilt", "zoom", "roll")}

SIDE = 256  # the shorter side that every clip is measured at
CELLS = 16  # cells of the grid along each side
SPREAD, LEAST = 40.0, 5.0  # standard deviation of lightness that clips are brought to, from at least so much
WINDOW = 31  # pixels of SIDE that a point is known by
TEXTURE = 2e-6  # least eigenvalue of the gradients around a point from which on it can be tracked
RETURN = 0.7  # pixels of SIDE by which a point may miss its start when it is tracked back
AGREE = 1.0  # pixels of SIDE by which a point may miss the fit
POINTS = 12  # that have to agree
EXTENT = 0.7  # share of the width or of the height that they have to span: less may be an object
REACH = 0.3826  # mean distance from the centre of a unit square: what turns zoom and roll into mean shifts
MOVES = 0.03  # mean shift over the clip, in shares of the frame, from which on a camera moves
STILL = 0.015  # below which it stands
CLEAR = 1.5  # how many times larger than all others the motion that a word names has to be


@dataclass(frozen=True)
class Motion:
    """How the camera moved over a clip; all 0 where `known` is False.

    `pan` is in shares of the frame's width, to the right; `tilt` in shares of its height, up; `zoom` is the logarithm
    of the magnification, in; `roll` is in radians, to the right: the camera turns clockwise as seen from behind, the
    content the other way. `residual` is the mean motion per frame that the camera does not explain, in shares of the
    shorter side; `support` the share of the tracked points that it explains. `known` is False for clips of one frame
    and where texture to track is missing, or only on something small.
    """

    pan: float = 0.0
    tilt: float = 0.0
    zoom: float = 0.0
    roll: float = 0.0
    residual: float = 0.0
    support: float = 0.0
    known: bool = False

    @property
    def shifts(self) -> dict[str, float]:
        """Pan, tilt, zoom and roll as the mean shift of the picture's points, in shares of the frame, with signs."""
        return {"pan": self.pan, "tilt": self.tilt, "zoom": REACH * self.zoom, "roll": REACH * self.roll}


class _Fit(NamedTuple):
    """The content's motion between two frames: shift (x, y) at the centre, growth, turn; pixels of SIDE, radians."""

    x: float
    y: float
    growth: float
    turn: float
    residual: float
    support: float


def estimate(frames: Frames) -> Motion:
    """The camera motion of a clip, frames (T, H, W, 3) uint8 of any size: the sum over its pairs of frames.

    Pairs that cannot be measured count as the mean of the others, up to half of them.
    """
    grey = _greys(np.asarray(frames))
    fits = [fit for a, b in pairwise(grey) if (fit := _fit(a, b) or _fit(a, _lit_as(a, b)))]
    pairs = len(grey) - 1
    if not fits or 2 * len(fits) < pairs:
        return Motion()
    height, width = grey[0].shape
    x, y, growth, turn, residual, support = np.mean(fits, axis=0).tolist()
    return Motion(
        -x * pairs / width, y * pairs / height, growth * pairs, -turn * pairs, residual / SIDE, support, known=True
    )


def along(motion: Motion, word: str) -> float:
    """How far a clip moves the way of a word: mean shift, in shares of the frame; negative is the other way.

    For "static", the largest of all shifts, as a negative number. Raises UsageError for an unknown word.
    """
    if word == "static":
        return -max(map(abs, motion.shifts.values()))
    if word not in SIGNS:
        raise UsageError(f"'{word}' is no camera motion.", did_you_mean(word, WORDS))
    axis, sign = SIGNS[word]
    return sign * motion.shifts[axis]


def matches(motion: Motion, word: str) -> bool:
    """Whether a clip shows the motion of a word and hardly any other. Never where it is not known."""
    own = along(motion, word)
    if word == "static":
        return motion.known and own > -STILL
    others = [abs(shift) for axis, shift in motion.shifts.items() if axis != SIGNS[word][0]]
    return motion.known and own >= MOVES and own >= CLEAR * max(others)


def name(motion: Motion) -> str:
    """The word that matches, or nothing where none does."""
    return next((word for word in WORDS if matches(motion, word)), "")


def _greys(frames: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
    """Lightness (h, w) uint8 of frames (T, H, W, 3), their shorter side SIDE, a little blurred against grain.

    Little contrast is raised, by the same for the whole clip; what is nearly bare stays so.
    """
    height, width = frames.shape[1:3]
    scale = SIDE / min(height, width)
    size = (max(SIDE, round(width * scale)), max(SIDE, round(height * scale)))
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    greys: list[Any] = [cv2.cvtColor(np.ascontiguousarray(one), cv2.COLOR_RGB2GRAY) for one in frames]
    greys = [
        cv2.GaussianBlur(cv2.resize(one.astype(np.float32), size, interpolation=how), (0, 0), 1.5) for one in greys
    ]
    gain = max(1.0, SPREAD / max(float(np.mean([one.std() for one in greys])), LEAST))
    middle = float(np.mean([one.mean() for one in greys]))
    return [_bytes((one - middle) * gain + 128) for one in greys]


def _lit_as(other: NDArray[np.uint8], frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A frame (h, w) with the mean and the spread of another: light that changes looks like motion."""
    return _bytes((frame - frame.mean()) * (other.std() / max(float(frame.std()), 1.0)) + other.mean())


def _bytes(grey: Any) -> NDArray[np.uint8]:
    return np.asarray(grey).round().clip(0, 255).astype(np.uint8)


def _points(grey: NDArray[np.uint8]) -> Array:
    """The point with most texture in each cell of the grid (N, 2) as x, y, of cells that have any."""
    texture: Any = cv2.cornerMinEigenVal(grey, 15, ksize=3)
    height, width = grey.shape
    rows, columns = np.linspace(0, height, CELLS + 1).astype(int), np.linspace(0, width, CELLS + 1).astype(int)
    found = []
    for top, bottom in pairwise(rows):
        for left, right in pairwise(columns):
            cell = texture[top:bottom, left:right]
            y, x = divmod(int(cell.argmax()), right - left)
            if cell[y, x] > TEXTURE:
                found.append((left + x, top + y))
    return np.array(found, np.float32).reshape(-1, 2)


def _fit(before: NDArray[np.uint8], after: NDArray[np.uint8]) -> _Fit | None:
    """The motion from one frame to the next; None where too few points agree, or only those of something small."""
    start = _points(before)
    if len(start) < POINTS:
        return None
    start, end = _tracked(before, after, start)
    if len(start) < POINTS:
        return None
    matrix, inside = cv2.estimateAffinePartial2D(start, end, ransacReprojThreshold=AGREE, maxIters=500)
    if matrix is None or not _wide(start[inside.ravel().astype(bool)], before.shape):
        return None
    height, width = before.shape
    centre = np.array([width / 2, height / 2])
    x, y = matrix[:, :2] @ centre + matrix[:, 2] - centre
    miss = np.linalg.norm(start @ matrix[:, :2].T + matrix[:, 2] - end, axis=1)
    growth, turn = math.log(math.hypot(matrix[0, 0], matrix[1, 0])), math.atan2(matrix[1, 0], matrix[0, 0])
    return _Fit(float(x), float(y), growth, turn, float(miss.mean()), float(inside.mean()))


def _tracked(before: NDArray[np.uint8], after: NDArray[np.uint8], start: Array) -> tuple[Array, Array]:
    """Where points (N, 2) of one frame are in the next, both (M, 2): those that are found again on the way back."""
    track: Any = partial(cv2.calcOpticalFlowPyrLK, nextPts=None, winSize=(WINDOW, WINDOW), maxLevel=3)
    end, seen, _ = track(before, after, start)
    back, again, _ = track(after, before, end)
    kept = (seen & again).ravel().astype(bool) & (np.linalg.norm(back - start, axis=1) < RETURN)
    return start[kept], end[kept]


def _wide(points: Array, shape: tuple[int, ...]) -> bool:
    """Whether points (N, 2) are many, and span most of the frame's width or of its height."""
    if len(points) < POINTS:
        return False
    low, high = np.quantile(points, (0.05, 0.95), axis=0)
    return bool(max((high - low) / (shape[1], shape[0])) >= EXTENT)
