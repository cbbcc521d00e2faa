"""Cuts: what each level of the cascade finds, hard cuts to the frame, fades, key frames, copies without encoding."""

import itertools
from fractions import Fraction
from pathlib import Path

import barcode
import numpy as np
import pytest
from scenedetect import FrameTimecode
from scenedetect.detectors import ContentDetector

from vgen import video
from vgen.clipping import copy, keyframes, snap
from vgen.cuts import CASCADE, SLOW, Level, Shot, Transition, detect, pieces, shots

FPS, HEIGHT, WIDTH = 30, 48, 64


def scene(seed: int, count: int, start: int = 0) -> np.ndarray:
    """A shot (T, H, W, 3) float: coarse blocks of one dominant colour that drift slowly."""
    rng = np.random.default_rng(seed)
    blocks = rng.uniform(0, 80, (7, 16, 3)) + rng.uniform(20, 120, 3)
    ground = np.kron(blocks, np.ones((8, 8, 1)))
    return np.stack([np.roll(ground, (start + k) // 6, 1)[:HEIGHT, :WIDTH] for k in range(count)])


def film(dissolve: int) -> np.ndarray:
    """A hard cut at 60, a dissolve of so many frames from 120 on, and a fade through black from 200."""
    a, b = scene(1, 60), scene(2, 60 + dissolve)
    c = scene(3, dissolve + 80 + dissolve)
    w = ((np.arange(dissolve) + 1) / (dissolve + 1))[:, None, None, None]
    mixed = b[60:] * (1 - w) + c[:dissolve] * w
    down = c[dissolve + 80 :] * (1 - w)
    d = scene(4, dissolve + 60)
    up = d[:dissolve] * w
    black = np.zeros((5, HEIGHT, WIDTH, 3))
    return np.concatenate([a, b[:60], mixed, c[dissolve : dissolve + 80], down, black, up, d[dissolve:]]).astype(
        np.uint8
    )


def found(dissolve: int, level: Level) -> bool:
    """Whether one level by itself finds the dissolve."""
    _, transitions = detect(film(dissolve), FPS, [level], fades=False)
    assert any(t.end == t.start == 60 or t.end <= 60 < t.start for t in transitions), "the hard cut is always found"
    return any(t.end < 120 + dissolve and t.start > 120 for t in transitions)


@pytest.mark.parametrize(
    ("dissolve", "seen"), [(5, (False, True, True)), (10, (False, False, True)), (20, (False, False, True))]
)
def test_each_level_finds_the_dissolves_that_the_one_before_misses(dissolve, seen):
    assert tuple(found(dissolve, level) for level in CASCADE) == seen


@pytest.mark.parametrize("dissolve", [5, 10, 20])
def test_the_cascade_leaves_shots_without_a_trace_of_another(dissolve):
    clip = film(dissolve)
    count, transitions = detect(clip, FPS)
    assert count == len(clip)
    assert transitions[0] == Transition(60, 60, 1)
    fade = 200 + dissolve
    assert len(transitions) == 3
    dissolved, faded = transitions[1:]
    assert dissolved.end <= 120 + dissolve // 4
    assert dissolved.start >= 120 + dissolve - dissolve // 4
    assert 190 < faded.end <= fade + dissolve
    assert fade + dissolve + 5 <= faded.start < fade + 2 * dissolve + 5 + 15


def test_a_dissolve_of_more_than_a_second_needs_the_slow_level():
    clip = film(40)[:230]
    assert [t.end for t in detect(clip, FPS, fades=False)[1]] == [60]
    assert len(detect(clip, FPS, [*CASCADE, SLOW], fades=False)[1]) == 2


def test_hard_cuts_are_exact_at_every_offset_and_rate():
    for cut, fps in itertools.product((61, 62, 63), (8, 25, Fraction(30000, 1001), 60)):
        clip = np.concatenate([scene(1, cut), scene(2, 60)]).astype(np.uint8)
        assert detect(clip, fps)[1] == [Transition(cut, cut, 1)], (cut, fps)


def test_one_shot_has_no_transition_and_a_flash_is_cut_out():
    clip = scene(5, 90).astype(np.uint8)
    assert detect(clip, FPS) == (90, [])
    clip[40] = 255
    assert detect(clip, FPS)[1] == [Transition(39, 43, 1)]


def test_fast_motion_is_no_cut_though_it_exceeds_the_threshold():
    """A coarse pattern that moves so fast that each level's threshold but the first is passed in most frames."""
    ground = np.tile(scene(5, 1)[0], (1, 4, 1))
    clip = np.stack([np.roll(ground, 2 * k, 1)[:, :96] for k in range(90)]).astype(np.uint8)
    plain = ContentDetector(CASCADE[2].threshold, min_scene_len=0)
    assert sum(bool(plain.process_frame(FrameTimecode(k, float(FPS)), clip[k])) for k in range(0, 90, 4)) > 15
    assert detect(clip, FPS) == (90, [])


def test_black_ends_are_no_shot():
    clip = np.concatenate([np.zeros((20, HEIGHT, WIDTH, 3)), scene(5, 60), np.zeros((20, HEIGHT, WIDTH, 3))])
    count, transitions = detect(clip.astype(np.uint8), FPS)
    (shot,) = shots(count, transitions)
    assert 20 <= shot.start <= 22
    assert 78 <= shot.stop <= 80
    assert shots(*detect(np.zeros((30, HEIGHT, WIDTH, 3), np.uint8), FPS)) == []


def test_shots_and_their_pieces():
    told = shots(100, [Transition(20, 20, 1), Transition(50, 57, 3)])
    assert told == [Shot(0, 20, -1), Shot(20, 50, 1), Shot(57, 100, 3)]
    assert pieces(told, 20) == [Shot(0, 20, -1), Shot(20, 35, 1), Shot(35, 50, 1), *pieces(told[2:], 20)]
    assert [s.stop - s.start for s in pieces(told[2:], 20)] == [14, 14, 15]


def test_a_clip_begins_at_the_first_key_frame_that_does_not_cross_the_cut(tmp_path: Path):
    """Groups of 12 pictures: a cut at 60 begins there, one at 61 at 72."""
    path = barcode.make(tmp_path / "a.mp4", 100, options={"sc_threshold": "0"}, bframes=0)
    keys = keyframes(video.probe(path))
    assert keys == tuple(range(0, 100, 12))
    assert (snap(60, keys), snap(61, keys), snap(97, keys)) == (60, 72, None)


@pytest.mark.parametrize("kind", ["mp4", "mkv", "turned.mp4", "avi", "webm"])
def test_copies_hold_the_same_frames(tmp_path: Path, kind: str):
    codec = {"webm": "libvpx-vp9", "avi": "mpeg4"}.get(kind, "libx264")
    size = (128, 48) if kind == "turned.mp4" else (barcode.HEIGHT, barcode.WIDTH)
    options = {"sc_threshold": "0"} if codec == "libx264" else {"b": "2M"}
    rotation = 90 if kind == "turned.mp4" else 0
    path = barcode.make(tmp_path / f"a.{kind}", 60, codec=codec, size=size, rotation=rotation, options=options)
    told = video.probe(path)
    keys = keyframes(told)
    start = snap(20, keys)
    assert start is not None
    assert start < 40
    copied = tmp_path / f"b.{kind}"
    count = copy(told, start, 50, copied)
    assert 50 - start - 4 <= count <= 50 - start
    assert barcode.numbers(video.read(copied).frames) == list(range(start, start + count))
