"""Motion: the flow figures of the published procedure, where the score saturates, and the buckets made from it."""

from fractions import Fraction

import cv2
import numpy as np
import pytest

from vgen import motion, world
from vgen.errors import UsageError


def texture(height: int = 140, width: int = 1600, octaves: int = 4) -> np.ndarray:
    """Smooth noise of several sizes, gray, 0 to 255."""
    rng = np.random.default_rng(0)
    noise = sum(2.0**k * cv2.GaussianBlur(rng.random((height, width)), (0, 0), 2.0**k) * 2.0**k for k in range(octaves))
    return ((noise - noise.min()) / np.ptp(noise) * 255).astype(np.float32)


GROUND = texture()
SCALE = 96 / motion.UNIT


def panned(speed: float, count: int, height: int = 96, width: int = 160) -> np.ndarray:
    """A clip (T, H, W, 3) whose view moves right at `speed` pixels a frame."""
    views = []
    for k in range(count):
        shift = np.array([[1, 0, -20 - speed * k], [0, 1, -20]], np.float32)
        view = cv2.warpAffine(GROUND, shift, (width, height), flags=cv2.INTER_CUBIC).clip(0, 255)
        views.append(np.repeat(view.astype(np.uint8)[..., None], 3, 2))
    return np.stack(views)


@pytest.mark.parametrize("speed", [0.1, 0.25, 0.5, 8 / 15])
def test_motion_of_at_most_8_pixels_a_step_is_measured_within_3_percent(speed):
    """96 x 160 pixels at 30 fps: `speed` pixels a frame are 15 times that in a step of half a second."""
    assert motion.score(panned(speed, 46), 30) * SCALE == pytest.approx(15 * speed, rel=0.03)


def test_a_still_clip_has_no_motion():
    assert motion.score(panned(0, 46), 30) * SCALE < 0.01


def test_faster_motion_than_a_tenth_of_the_height_saturates():
    """15 px a step, 16 % of the height, comes out far too small; 10 % does not."""
    assert motion.score(panned(0.64, 46), 30) * SCALE == pytest.approx(9.6, rel=0.05)
    assert motion.score(panned(1.0, 46), 30) * SCALE < 0.7 * 15


def test_the_score_does_not_depend_on_the_size_or_the_rate_of_the_clip():
    slow = panned(0.2, 61)
    large = np.stack([cv2.resize(frame, (320, 192), interpolation=cv2.INTER_CUBIC) for frame in slow[::15]])
    usual = motion.score(slow, 30)
    assert motion.score(large, 2) == pytest.approx(usual, rel=0.05)
    small = np.stack([cv2.resize(frame, (80, 48), interpolation=cv2.INTER_AREA) for frame in slow])
    assert motion.score(small, 30) == pytest.approx(usual, rel=0.05)
    assert motion.score(slow[::3], 10) == pytest.approx(usual, rel=0.01)
    assert motion.score((frame for frame in slow), Fraction(30)) == usual


def test_between_rates_the_flow_is_scaled_to_half_a_second():
    clip = panned(0.25, 46)
    exact = motion.score(clip, 30) * SCALE
    assert motion.score(clip, Fraction(30000, 1001)) * SCALE == pytest.approx(exact * 0.999, rel=1e-3)


def test_short_clips_are_measured_from_end_to_end():
    clip = panned(0.5, 6)
    assert motion.score(clip, 30) * SCALE == pytest.approx(7.5, rel=0.06)  # 2.5 px in 5 frames
    assert motion.score(clip[:1], 30) == 0.0
    assert motion.score(panned(0.5, 15), 30) * SCALE == pytest.approx(7.5, rel=0.03)  # just too short for two samples


def test_slow_clips_are_measured_between_neighbours():
    assert motion.score(panned(4.0, 4), 1) * SCALE == pytest.approx(2.0, rel=0.03)


def test_still_moving_and_panning_clips_sort_by_score():
    scores = {}
    for index in range(400):
        scene = world.scene(0, index, variety="full")
        kind = scene.camera.split()[0] if scene.camera != "static" else scene.motion
        if kind in ("pan", "moving left", "standing still") and kind not in scores:
            pixels, _ = world.render(scene)
            scores[kind] = motion.score(pixels.add(1).mul(127.5).byte().permute(1, 2, 3, 0), 8)
    assert scores["standing still"] < scores["moving left"] < scores["pan"]


def test_what_is_no_clip_is_refused():
    for frames, fps in (([], 8), (np.zeros((2, 8, 8), np.uint8), 8), (np.zeros((2, 8, 8, 3)), 8), (panned(0, 2), 0)):
        with pytest.raises(UsageError):
            motion.score(frames, fps)


def test_buckets_are_the_share_of_clips_that_move_no_more():
    scores = np.random.default_rng(1).exponential(4.0, 4001).tolist()
    table = motion.ecdf(scores)
    found = np.array([motion.bucket(s, table) for s in scores])
    assert motion.bucket(float(np.median(scores)), table) in (127, 128)
    assert (motion.bucket(0, table), motion.bucket(1e9, table)) == (0, 255)
    shares = np.array([np.mean(np.array(scores) <= s) for s in scores[:200]])
    assert np.abs(found[:200] - 255 * shares).max() <= 1
    assert abs(np.bincount(found // 64, minlength=4) / 4001 - 0.25).max() < 0.01


def test_buckets_of_equal_scores_and_of_the_default_table():
    assert motion.bucket(3.0, motion.ecdf([3.0])) == 255
    assert motion.bucket(2.9, motion.ecdf([3.0])) == 0
    table = motion.default_table()
    assert motion.bucket(motion.MEDIAN, table) == 128
    assert [motion.bucket(q, table) for q in table] == list(range(256))


def test_a_broken_table_is_refused():
    for table in ([0.0] * 255, [1.0, *[0.0] * 255]):
        with pytest.raises(UsageError):
            motion.bucket(1.0, table)
    with pytest.raises(UsageError):
        motion.ecdf([])
