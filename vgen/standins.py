"""Scorers that need no weights: motion, camera and sharpness are measured; the rest stand in for learned ones.

Stand-ins tell nothing of what people would say; the manifest marks them. Captions and their agreement with a clip are
read in closed form, and only where a clip shows a scene of the procedural world.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np
import torch

from vgen.scorers import Card, Scorer, View

SIDE = 256  # pixels of the shorter side at which sharpness is measured
TEXT_SIDE = 480  # pixels of the shorter side in which text is looked for
COLOURFUL = 109.0  # Hasler and Suesstrunk's "extremely colourful"
SHARP = 2000.0  # variance of the Laplacian of a very sharp picture
GLYPHS = 4  # in a row that make text


class Box(NamedTuple):
    """A rectangle in pixels: left, top, right and bottom, the last two outside of it."""

    left: int
    top: int
    right: int
    bottom: int


def union_area(boxes: Sequence[Box], height: int, width: int) -> float:
    """The share of a frame of that size that boxes cover, what lies in several of them counted once."""
    covered = np.zeros((height, width), bool)
    for box in boxes:
        covered[max(box.top, 0) : max(box.bottom, 0), max(box.left, 0) : max(box.right, 0)] = True
    return float(covered.mean())


def sharpness_of(image: Any) -> float:
    """The variance of the Laplacian of a picture (H, W, 3) uint8, at a shorter side of at most 256 pixels."""
    import cv2

    return float(cv2.Laplacian(_gray(image, SIDE), cv2.CV_64F).var())


def colourfulness(image: Any) -> float:
    """Hasler and Suesstrunk's measure (2003) of a picture (H, W, 3) uint8: 0 gray to about 109."""
    red, green, blue = np.moveaxis(np.asarray(image, np.float32), -1, 0)
    across, down = red - green, (red + green) / 2 - blue
    return float(math.hypot(across.std(), down.std()) + 0.3 * math.hypot(across.mean(), down.mean()))


def glyphs(image: Any) -> list[Box]:
    """Lines of text in a picture (H, W, 3) uint8, in its pixels: rows of small solid marks of one height.

    Marks are the connected parts that are darker or lighter than what is around them.
    """
    import cv2

    gray = _gray(image, TEXT_SIDE)
    scale = image.shape[0] / gray.shape[0]
    size = max(3, round(gray.shape[0] / 12) * 2 + 1)
    around = cv2.GaussianBlur(gray, (size, size), 0).astype(np.int16)
    found: list[Box] = []
    for sense in (1, -1):
        marks = ((gray.astype(np.int16) - around) * sense > 30).astype(np.uint8)
        _, _, stats, _ = cv2.connectedComponentsWithStats(marks, connectivity=8)
        boxes = [Box(x, y, x + w, y + h) for x, y, w, h, n in stats[1:].tolist() if _glyph(w, h, n, gray.shape[0])]
        found += _lines(boxes)
    return [Box(*(round(edge * scale) for edge in box)) for box in found]


def _glyph(width: int, height: int, pixels: int, frame: int) -> bool:
    """Whether a mark has the size and the weight of a letter."""
    return 6 <= height <= frame / 3 and 0.08 <= width / height <= 3 and 0.15 <= pixels / (width * height) <= 0.95


def _lines(boxes: list[Box]) -> list[Box]:
    """Boxes around rows of at least four marks that are level, alike in height and close."""
    lines: list[list[Box]] = []
    for box in sorted(boxes):
        home = next((line for line in lines if _follows(line[-1], box)), None)
        if home is None:
            lines.append([box])
        else:
            home.append(box)
    rows = [line for line in lines if len(line) >= GLYPHS]
    return [
        Box(line[0].left, min(b.top for b in line), max(b.right for b in line), max(b.bottom for b in line))
        for line in rows
    ]


def _follows(last: Box, box: Box) -> bool:
    """Whether a mark is the next of a line."""
    tall = max(last.bottom - last.top, box.bottom - box.top)
    small = min(last.bottom - last.top, box.bottom - box.top)
    near = -0.5 * tall <= box.left - last.right <= 1.2 * tall
    shared = min(last.bottom, box.bottom) - max(last.top, box.top)
    return near and tall <= 2 * small and shared >= 0.8 * small


def _gray(image: Any, side: int) -> Any:
    """A picture as gray (h, w) uint8 with a shorter side of at most `side` pixels."""
    import cv2

    gray = cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2GRAY)
    small = side / min(gray.shape)
    if small >= 1:
        return gray
    size = (round(gray.shape[1] * small), round(gray.shape[0] * small))
    return cv2.resize(gray, size, interpolation=cv2.INTER_AREA)


def _motion(view: View) -> Mapping[str, Any]:
    from vgen.motion import score

    return {"motion_score": round(score(view.frames, view.fps), 4)}


def _camera(view: View) -> Mapping[str, Any]:
    from vgen.camera import estimate, name

    found = estimate(view.frames)
    told = {key: round(value, 5) if isinstance(value, float) else value for key, value in asdict(found).items()}
    return {"camera": {**told, "word": name(found)}}


def _sharpness(view: View) -> Mapping[str, Any]:
    return {"sharpness": round(float(np.mean([sharpness_of(still) for still in view.stills])), 2)}


def _aesthetic(view: View) -> Mapping[str, Any]:
    """Half colour, half sharpness, 0 to 10, the mean of the stills."""
    marks = [
        5 * min(1, colourfulness(still) / COLOURFUL) + 5 * min(1, math.log1p(sharpness_of(still)) / math.log1p(SHARP))
        for still in view.stills
    ]
    return {"aesthetic": round(float(np.mean(marks)), 4)}


def _text(view: View) -> Mapping[str, Any]:
    """The largest of the three areas."""
    return {"text_area": round(max(union_area(glyphs(still), *still.shape[:2]) for still in view.stills), 5)}


def _reading(frames: Any) -> Any:
    """What `vgen.world_check` reads from frames (T, H, W, 3) uint8, of those the world's 17 at most."""
    from vgen.world_check import read

    pixels = torch.from_numpy(np.ascontiguousarray(frames[:17])).permute(3, 0, 1, 2).float() / 127.5 - 1
    return read(pixels)


def _thing(seen: Any) -> str | None:
    """The object of a reading with its colour; None where there is none."""
    if "none" in (seen.object, seen.colour):
        return None
    return f"a {seen.object}" if seen.object == "teddy bear" else f"a {seen.colour} {seen.object}"


def _image_caption(view: View) -> Mapping[str, Any]:
    return {"captions.image": _thing(_reading(view.frames[len(view.frames) // 2][None]))}


def _video_caption(view: View) -> Mapping[str, Any]:
    seen = _reading(view.frames)
    thing = _thing(seen)
    return {"captions.video": f"{thing} {seen.motion}" if thing and seen.motion != "none" else None}


def fuse(image: str, video: str) -> str:
    """The caption of a picture with what happens according to the caption of its clip: from the first "-ing" on."""
    words = video.split()
    start = next((i for i, word in enumerate(words) if word.endswith("ing") and len(word) > 4), None)
    return f"{image.rstrip('. ')} {' '.join(words[start:])}" if start is not None else f"{image.rstrip('. ')}, {video}"


def _fused(view: View) -> Mapping[str, Any]:
    both = [view.captions.get(name) for name in ("image", "video")]
    return {"captions.fused": fuse(both[0], both[1]) if both[0] and both[1] else None}


def agreement(caption: str, words: Sequence[str]) -> float:
    """The cosine of two bags of words, 0 to 1."""
    said, seen = set(caption.lower().replace(",", " ").replace(".", " ").split()), set(words)
    return len(said & seen) / math.sqrt(len(said) * len(seen)) if said and seen else 0.0


def _similarity(view: View) -> Mapping[str, Any]:
    """Mean agreement of the captions with the words for what is read from the clip; None where nothing is."""
    seen = _reading(view.frames)
    thing = _thing(seen)
    if thing is None or not view.captions:
        return {"clip_sim": None}
    words = f"{thing} {seen.motion}".split()
    return {"clip_sim": round(float(np.mean([agreement(text, words) for text in view.captions.values()])), 4)}


def _plain(function: Callable[[View], Mapping[str, Any]]) -> Callable[[str, str], Scorer]:
    return lambda reference, device: function


motion = Card(("motion_score",), "Farneback flow at 2 fps, px per half second", _plain(_motion))
camera = Card(("camera",), "pan, tilt, zoom, roll and residual of the camera", _plain(_camera))
sharpness = Card(("sharpness",), "variance of the Laplacian", _plain(_sharpness))
aesthetic = Card(("aesthetic",), "colourfulness and sharpness, 0 to 10", _plain(_aesthetic), standin=True)
text = Card(("text_area",), "share of the frame in rows of glyphs", _plain(_text), standin=True)
image_caption = Card(("captions.image",), "the world's object", _plain(_image_caption), standin=True)
video_caption = Card(("captions.video",), "the world's object and motion", _plain(_video_caption), standin=True)
fused_caption = Card(
    ("captions.fused",), "image and video caption in one", _plain(_fused), needs_captions=True, standin=True
)
similarity = Card(
    ("clip_sim",),
    "shared words of captions and the world's labels",
    _plain(_similarity),
    needs_captions=True,
    standin=True,
)
