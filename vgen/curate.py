"""Curation: videos to a manifest of clips, each one shot, scored, captioned, and kept or dropped with reasons.

The procedure is that of Stable Video Diffusion (arXiv 2311.15127, section 3 and appendix C). Two passes: first every
clip gets its scores, which are kept in a journal as they are made, so that a killed run goes on where it was; then
thresholds, some of which depend on all scores, decide. The manifest depends on the inputs and the settings alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vgen import clipping, clips, cuts, motion, scorers, video, world
from vgen.clips import Item, Seen
from vgen.errors import VgenError
from vgen.files import replacing
from vgen.journal import Journal
from vgen.probe import BadClip, Probe
from vgen.scorers import CAPTION, Chosen, Scorer, View
from vgen.thresholds import Thresholds, judge

OnStep = Callable[[str, int, int], None]
Row = dict[str, Any]
RATE, SIDE = 8.0, 256  # frames a second, and pixels of the shorter side, of what scorers see
WORLD_SIDE = 256  # pixels at which clips of the world are looked at
CAPTION_SHARES = {"given": 0.5, "image": 0.5, "video": 0.25, "fused": 0.25}  # the published shares of three captions
OTHER_CAPTION = 0.25


@dataclass(frozen=True)
class Settings:
    """What decides on the clips of a set. Lengths in seconds, `min_side` in pixels.

    `limits` replace those of filters by field: a number, a share such as "25%", or "off".
    """

    levels: tuple[cuts.Level, ...] = cuts.CASCADE
    snap: bool = True
    min_seconds: float = 2.0
    max_seconds: float = 60.0
    min_side: int = 256
    thresholds: Thresholds = "auto"
    limits: Mapping[str, str] = field(default_factory=dict)


class Aside(NamedTuple):
    """An input that gives no clips, and why."""

    source: str
    reason: str


@dataclass(frozen=True)
class Curated:
    """The rows of a manifest, what was set aside, what scorers failed at, and the distribution of motion.

    `passed` is the share of the scored clips that each filter by itself lets through, and `joint` that of all together.
    """

    rows: list[Row]
    aside: list[Aside]
    problems: list[str]
    passed: dict[str, float]
    joint: float
    table: tuple[float, ...]
    items: Mapping[str, Item]  # by source


def curate(
    items: Sequence[Item], chosen: Sequence[Chosen], settings: Settings, journal: Journal, device: str, on_step: OnStep
) -> Curated:
    """Find, score and judge the clips of `items`. Broken inputs are set aside, failing scorers leave fields empty."""
    rows: list[Row] = []
    aside: list[Aside] = []
    problems: list[str] = []
    team = _Team(chosen, journal, device)
    first: dict[str, str] = {}
    for done, item in enumerate(items):
        on_step("clips", done, len(items))
        try:
            if item.kind == "image":
                raise BadClip(item.path, "it is a picture, not a clip")
            seen = clips.look(item)
            if seen.sha256 in first:
                raise BadClip(item.path, f"it has the content of {first[seen.sha256]}")
            first[seen.sha256] = item.name
            found = [_scored(team, item, seen, row, problems) for row in _clips(item, seen, settings, journal)]
        except BadClip as error:
            aside.append(Aside(item.name, error.reason))
            continue
        rows += found
    on_step("clips", len(items), len(items))
    passed, joint = judge(rows, settings.thresholds, settings.limits)
    kept = [row["motion_score"] for row in rows if row["decision"] == "keep" and row["motion_score"] is not None]
    table = motion.ecdf(kept) if kept else ()
    for row in rows:
        if table and row["motion_score"] is not None:
            row["motion_bucket"] = motion.bucket(row["motion_score"], table)
    return Curated(rows, aside, problems, passed, joint, table, {str(item.path): item for item in items})


def write(rows: Iterable[Row], path: Path) -> None:
    """Write a manifest, whole or not at all, a line of JSON for each clip."""
    with replacing(path) as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")


# Shots


def _clips(item: Item, seen: Seen, settings: Settings, journal: Journal) -> Iterator[Row]:
    """A row for each shot of an input, those too short or too small already dropped. Raises BadClip."""
    if item.world:
        yield _row(item, seen, cuts.Shot(0, world.FRAMES, -1), 0, clips.WORLD_FPS, (WORLD_SIDE, WORLD_SIDE), settings)
        return
    told = seen.probe
    assert told is not None
    identity = ["cuts 1", seen.sha256, [list(level) for level in settings.levels]]
    found = journal.once(identity, lambda: _shots(item, told, settings.levels))
    keys = found["keys"] if settings.snap else range(len(told.pts))
    shots = [cuts.Shot(*shot) for shot in found["shots"]]
    for shot in cuts.pieces(shots, max(1, int(settings.max_seconds * told.fps))):
        start = clipping.snap(shot.start, keys)
        size = (told.height, round(told.width * told.pixel_aspect))
        yield _row(item, seen, shot, start, told.fps, size, settings)


def _shots(item: Item, told: Probe, levels: Sequence[cuts.Level]) -> dict[str, Any]:
    """Shots and key frames of a video, every frame of which is decoded on the way. Raises BadClip."""
    start, stop = item.frames or (0, len(told.pts))
    count, transitions = cuts.detect(video.frames(item.path, seen=told, start=start, stop=stop), told.fps, levels)
    shots = [[s.start + start, s.stop + start, s.level] for s in cuts.shots(count, transitions)]
    return {"shots": shots, "keys": list(clipping.keyframes(told))}


def _row(
    item: Item, seen: Seen, shot: cuts.Shot, start: int | None, fps: Fraction, size: tuple[int, int], settings: Settings
) -> Row:
    """A line of the manifest before it is scored. `start` is the first frame that a copy can begin at."""
    reasons = []
    if start is None or start >= shot.stop:
        start, reasons = shot.start, ["no key frame in it"]
    count = shot.stop - start
    if count / fps < settings.min_seconds:
        reasons.append(f"{float(count / fps):.2f} s < {settings.min_seconds:g} s")
    if min(size) < settings.min_side:
        reasons.append(f"{min(size)} pixels < {settings.min_side}")
    return {
        "clip_id": f"{seen.sha256[:16]}-{start}-{shot.stop}",
        "source": str(item.path),
        "sha256": seen.file or seen.sha256,
        "start_frame": start,
        "end_frame": shot.stop,
        "fps": str(fps),
        "n_frames": count,
        "seconds": round(float(count / fps), 4),
        "height": size[0],
        "width": size[1],
        "cut_level": shot.level,
        "keyframe_snapped": start != shot.start,
        "motion_score": None,
        "motion_scale": {"fps": motion.RATE, "side": motion.UNIT, "unit": "px per half second"},
        "motion_bucket": None,
        "captions": {},
        "caption_probs": {},
        "scorer": {},
        "decision": "drop" if reasons else "keep",
        "reasons": reasons,
    }


# Scores


@dataclass
class _Team:
    """The scorers of a run, each loaded when a clip first needs it."""

    chosen: Sequence[Chosen]
    journal: Journal
    device: str
    loaded: dict[str, Scorer] = field(default_factory=dict)

    def ask(self, one: Chosen, seen: Seen, row: Row, look: Callable[[], View], captions: dict[str, str]) -> Row:
        """The fields of one clip, from the journal where they are there. Raises VgenError."""
        told = captions if one.card.needs_captions else {}
        clip = [seen.sha256, row["start_frame"], row["end_frame"]]
        found = self.journal.once(["score 1", clip, one.identity, told], partial(self._run, one, look, captions))
        return dict(found)

    def _run(self, one: Chosen, look: Callable[[], View], captions: dict[str, str]) -> Row:
        if one.name not in self.loaded:
            self.loaded[one.name] = scorers.load(one, self.device)
        return scorers.score(one, self.loaded[one.name], replace(look(), captions=dict(captions)))


def _scored(team: _Team, item: Item, seen: Seen, row: Row, problems: list[str]) -> Row:
    """A row with the scores of its clip, unless it is dropped already. Raises BadClip."""
    if row["decision"] == "drop":
        return row
    look = cache(partial(_view, item, seen.probe, row["start_frame"], row["end_frame"]))
    captions = {f"given-{n}" if n else "given": text for n, text in enumerate(item.captions)}
    for one in team.chosen:
        if one.card.standin and item.captions and one.card.captions:
            continue  # what people wrote needs no stand-in
        try:
            found = team.ask(one, seen, row, look, captions)
        except BadClip:
            raise
        except VgenError as error:
            problems.append(f"{row['clip_id']}: {error.message}")
            found = dict.fromkeys(one.card.fields)
        row["scorer"] |= dict.fromkeys(found, one.told)
        row |= {name: value for name, value in found.items() if not name.startswith(CAPTION)}
        captions |= {n.removeprefix(CAPTION): text for n, text in found.items() if n.startswith(CAPTION) and text}
    row["captions"] = captions
    row["caption_probs"] = shares(captions)
    return row


def shares(captions: Mapping[str, str]) -> dict[str, float]:
    """How likely each caption is to be drawn: the published shares, made to add up to 1 where some are missing.

    Several captions that were given have the share of one together.
    """
    kinds = {name: "given" if name.startswith("given") else name for name in captions}
    among = {kind: list(kinds.values()).count(kind) for kind in kinds.values()}
    weights = {name: CAPTION_SHARES.get(kind, OTHER_CAPTION) / among[kind] for name, kind in kinds.items()}
    return {name: round(weight / sum(weights.values()), 6) for name, weight in weights.items()}


def _view(item: Item, told: Probe | None, start: int, stop: int) -> View:
    """What scorers see of a clip, in one pass over its frames. Raises BadClip."""
    if item.world:
        pixels = world.clip(
            item.world.seed, item.world.index, world.FRAMES, WORLD_SIDE, WORLD_SIDE, variety=item.world.variety
        )[0]
        drawn = pixels.add(1).mul(127.5).round().byte().permute(1, 2, 3, 0).numpy()
        return View(drawn, float(clips.WORLD_FPS), [drawn[i] for i in (0, len(drawn) // 2, len(drawn) - 1)])
    assert told is not None
    count, stride = stop - start, max(1.0, float(told.fps) / RATE)
    wanted = {round(k * stride) for k in range(int(count / stride) + 1)}
    places = (0, count // 2, count - 1)
    samples, stills = [], dict[int, Any]()
    for index, frame in enumerate(video.frames(item.path, seen=told, start=start, stop=stop)):
        if index in places:
            stills[index] = frame.numpy().copy()
        if index in wanted:
            samples.append(_small(frame.numpy()))
    return View(np.stack(samples), float(told.fps) / stride, [stills[place] for place in places])


def _small(frame: Any) -> Any:
    """A frame with a shorter side of at most `SIDE` pixels."""
    import cv2

    factor = SIDE / min(frame.shape[:2])
    if factor >= 1:
        return np.array(frame)
    size = (max(1, round(frame.shape[1] * factor)), max(1, round(frame.shape[0] * factor)))
    return cv2.resize(frame, size, interpolation=cv2.INTER_AREA)


def still(item: Item, row: Row) -> Any:
    """The middle frame of a clip, small, (h, w, 3) uint8, for a contact sheet. Raises BadClip."""
    if item.world:
        return _view(item, None, 0, world.FRAMES).stills[1]
    middle = (row["start_frame"] + row["end_frame"]) // 2
    return _small(next(iter(video.frames(item.path, start=middle, stop=middle + 1))).numpy())


def totals(rows: Sequence[Row]) -> dict[str, float]:
    """The columns by which sets are compared: clips, mean length and frames, total time, clips of a source."""
    seconds, frames = sum(row["seconds"] for row in rows), sum(row["n_frames"] for row in rows)
    count = max(1, len(rows))
    return {
        "clips": len(rows),
        "mean_seconds": round(seconds / count, 2),
        "mean_frames": round(frames / count, 1),
        "total_seconds": round(seconds, 1),
        "clips_per_source": round(len(rows) / max(1, len({row["sha256"] for row in rows})), 2),
    }


def copies(rows: Sequence[Row], folder: Path) -> Iterator[tuple[Path, int, str]]:
    """Copy the kept clips to files CLIP_ID.EXT as they are; gives each file, its frames, or why it was not written."""
    for row in (row for row in rows if row["decision"] == "keep"):
        source = Path(row["source"])
        path = folder / f"{row['clip_id']}{source.suffix}"
        try:
            told = clips.look(Item(source)).probe
            assert told is not None
            yield path, clipping.copy(told, row["start_frame"], row["end_frame"], path), ""
        except VgenError as error:
            yield path, 0, error.message
