"""Camera motion is read back: signs, words, objects that move by themselves, clips that tell nothing."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from filmed import POSES, filmed, wallpaper

from vgen import camera, video, world, world_check
from vgen.camera import Motion, along, estimate, matches, name
from vgen.errors import UsageError
from vgen.generate import to_frames
from vgen.video_write import write


@pytest.mark.parametrize("word", camera.WORDS)
def test_a_camera_is_read_back_with_its_sign_and_its_size(word):
    motion = estimate(filmed(**POSES[word]))
    assert motion.known
    for axis in ("pan", "tilt", "zoom", "roll"):
        assert getattr(motion, axis) == pytest.approx(POSES[word].get(axis, 0.0), abs=0.012), axis
    assert name(motion) == word
    assert [one for one in camera.WORDS if matches(motion, one)] == [word]
    assert motion.support > 0.9
    assert motion.residual < 0.002


def test_a_pan_to_the_right_is_content_that_moves_to_the_left():
    """Without any formula of poses: cut windows that go right, up, closer out of one picture."""
    wall = wallpaper(64, 64)
    right = np.stack([wall[64:128, 40 + 2 * k : 104 + 2 * k] for k in range(9)])
    up = np.stack([wall[90 - 2 * k : 154 - 2 * k, 64:128] for k in range(9)])
    closer = np.stack([cv2.resize(wall[2 * k : 128 - 2 * k, 2 * k : 128 - 2 * k], (64, 64)) for k in range(9)])
    assert estimate(right).pan == pytest.approx(16 / 64, abs=0.01)
    assert estimate(up).tilt == pytest.approx(16 / 64, abs=0.01)
    assert estimate(closer).zoom == pytest.approx(math.log(128 / 96), abs=0.01)
    assert [name(estimate(clip)) for clip in (right, up, closer)] == ["pan-right", "tilt-up", "zoom-in"]


def test_a_camera_that_rolls_to_the_right_turns_the_picture_to_the_left():
    wall = wallpaper(64, 64)[:128, :128]
    turned = [cv2.warpAffine(wall, cv2.getRotationMatrix2D((64, 64), 3 * k, 1), (128, 128)) for k in range(7)]
    motion = estimate(np.stack(turned)[:, 32:96, 32:96])  # OpenCV's positive angles turn the picture left
    assert motion.roll == pytest.approx(math.radians(18), abs=0.02)
    assert name(motion) == "roll-right"


def test_two_motions_at_once_match_no_word_but_are_measured():
    motion = estimate(filmed(pan=0.15, tilt=0.15))
    assert motion.pan == pytest.approx(0.15, abs=0.01)
    assert motion.tilt == pytest.approx(0.15, abs=0.01)
    assert name(motion) == ""
    assert not matches(motion, "static")


@pytest.mark.parametrize("word", ["static", "pan-left", "zoom-in"])
def test_an_object_that_moves_by_itself_does_not_count(word):
    """A checkered box over a sixth of the frame, which crosses it against the camera."""
    frames = filmed(height=96, width=96, **POSES[word])
    alone = estimate(frames)
    box = np.kron(np.indices((5, 5)).sum(0) % 2, np.ones((8, 8))).astype(np.uint8)[..., None] * 255
    for k, frame in enumerate(frames):
        frame[28:68, 4 + 5 * k : 44 + 5 * k] = box
    motion = estimate(frames)
    assert name(motion) == word
    assert motion.residual > 3 * alone.residual
    assert motion.support < alone.support


@pytest.mark.parametrize("shape", [(8, 64, 64), (3, 51, 77), (14, 33, 32), (2, 300, 90)])
def test_small_and_odd_sizes(shape):
    assert name(estimate(filmed(*shape, pan=0.06))) == "pan-right"


def test_what_cannot_be_told_is_not_known_and_matches_nothing():
    grain = np.random.default_rng(0).integers(0, 255, (6, 64, 64, 3)).astype(np.uint8)
    slope = np.broadcast_to(np.arange(64, dtype=np.uint8)[:, None, None] * 2, (6, 64, 64, 3))
    for frames in (np.full((6, 64, 64, 3), 90, np.uint8), slope, grain, filmed(count=1)):
        motion = estimate(frames)
        assert motion == Motion()
        assert not any(matches(motion, word) for word in camera.WORDS)
        assert name(motion) == ""


def test_a_small_object_before_a_bare_wall_says_nothing_of_the_camera():
    frames = np.full((6, 64, 64, 3), 90, np.uint8)
    for k, frame in enumerate(frames):
        frame[20:40, 10 + 3 * k : 30 + 3 * k] = wallpaper(20, 20)[:20, :20]
    assert not estimate(frames).known


def test_words_that_are_none():
    with pytest.raises(UsageError, match="no camera motion") as caught:
        matches(Motion(), "pan-rigth")
    assert "Did you mean 'pan-right'?" in str(caught.value)


def test_along_is_the_mean_shift_the_way_of_a_word():
    motion = Motion(pan=0.1, tilt=-0.02, zoom=-0.3, known=True)
    assert along(motion, "pan-right") == pytest.approx(0.1)
    assert along(motion, "pan-left") == pytest.approx(-0.1)
    assert along(motion, "tilt-down") == pytest.approx(0.02)
    assert along(motion, "zoom-out") == pytest.approx(0.3 * camera.REACH)
    assert along(motion, "static") == pytest.approx(-0.3 * camera.REACH)


def test_cameras_of_the_world_agree_with_truth_and_with_its_own_reading():
    """Where the background has texture; elsewhere nothing can be told, and nothing is claimed."""
    told = []
    for index in range(60):
        pixels, _, _, scene = world.clip(7, index, 9, variety="full")
        found = name(estimate(to_frames(pixels)))
        if scene.background == "textured":
            other = world_check.read(pixels).camera
            told.append((scene.camera.replace(" ", "-"), other.replace(" ", "-"), found))
        else:
            assert found in ("", "static")
    assert len(told) > 20
    assert len({truth for truth, _, _ in told}) >= 6
    right = sum(truth == found for truth, _, found in told)
    agreed = sum(other == found for _, other, found in told)
    assert min(right, agreed) >= 0.95 * len(told)


def test_a_written_clip_is_read_the_same(tmp_path: Path):
    frames = torch.from_numpy(filmed(height=64, width=64, pan=-0.2))
    read = video.read(write(tmp_path / "clip.mp4", frames, Fraction(8))).frames
    assert estimate(read).pan == pytest.approx(-0.2, abs=0.012)


@pytest.mark.parametrize("word", ["static", "tilt-up", "zoom-out"])
def test_light_that_changes_little_contrast_and_grain_do_no_harm(word):
    frames = filmed(height=64, width=64, **POSES[word]).astype(np.float32)
    brighter = frames * np.linspace(0.6, 1.1, len(frames))[:, None, None, None]
    grain = np.random.default_rng(1).normal(0, 12, frames.shape)
    for changed in (brighter, 0.15 * frames, 128 + 0.1 * (frames - 128), frames + grain):
        assert name(estimate(changed.clip(0, 255).astype(np.uint8))) == word
