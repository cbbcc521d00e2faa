"""Data of a camera motion: clips that show it are found once, divided, and joined by clips that are made."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import filmed
import numpy as np
import pytest
import svd_tiny
import tiny
import torch
from PIL import Image

from vgen import camera, camera_data, clips
from vgen.camera import Motion, estimate
from vgen.camera_check import judge, wanted
from vgen.camera_data import Found, choose, make, survey
from vgen.camera_move import ROOM, moved
from vgen.clips import Item
from vgen.errors import UsageError
from vgen.plugins.svd import family
from vgen.video_write import write

SIZE = (9, 48, 64)


def picture(path: Path, seed: int = 0) -> Path:
    Image.fromarray(filmed.wallpaper(48, 64, seed)).save(path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ordinary clips: two of each of three motions, a bare one, a short one, a damaged one, two images."""
    place = tmp_path_factory.mktemp("clips")
    for word in ("pan-left", "pan-right", "static"):
        for seed in (1, 2):
            filmed.clip(place / f"{word}-{seed}.mp4", word, seed)
    write(place / "bare.mp4", torch.full((9, 48, 64, 3), 90, dtype=torch.uint8), clips.WORLD_FPS)
    filmed.clip(place / "short.mp4", "pan-left", count=4)
    (place / "damaged.mp4").write_bytes((place / "pan-left-1.mp4").read_bytes()[:2000])
    picture(place / "photo.png")
    Image.new("RGB", (64, 48), (90, 90, 90)).save(place / "wall.png")
    return place


def found(folder: Path, cache: Path) -> tuple[list[Found], list[str]]:
    return survey(clips.discover([str(folder)]), SIZE, None, cache, tiny.ignore)


def made_up(**counts: int) -> list[Found]:
    """So many clips of each word (pan_left=3), or images, which nobody reads."""
    told = []
    for name, count in counts.items():
        axis, sign = camera.SIGNS.get(name.replace("_", "-"), ("pan", 0))
        motion = Motion(**{axis: 0.2 * sign}, known=name != "bare")
        kind = "image" if name == "images" else "video"
        told += [Found(Item(Path(f"{name}-{k}"), kind=kind), f"{name}{k}", motion) for k in range(count)]
    return told


def test_clips_are_measured_and_bad_ones_left_out_with_the_reason(folder, tmp_path):
    some, aside = found(folder, tmp_path / "motion.jsonl")
    names = {one.item.path.name: camera.name(one.motion) for one in some}
    for word in ("pan-left", "pan-right", "static"):
        assert names[f"{word}-1.mp4"] == names[f"{word}-2.mp4"] == word
    assert names["bare.mp4"] == names["wall.png"] == ""
    assert {one.item.path.name for one in some if one.still} == {"static-1.mp4", "static-2.mp4", "photo.png"}
    assert len(aside) == 2
    assert any("short.mp4" in text and "9 are needed" in text for text in aside)
    assert any("damaged.mp4" in text for text in aside)


def test_what_is_in_the_cache_is_not_measured_again(folder, tmp_path):
    """The cache's word counts, also after a kill in the middle of a line."""
    cache = tmp_path / "motion.jsonl"
    first, _ = found(folder, cache)
    lines = cache.read_text().splitlines()
    assert len(lines) == len(first)
    told = json.loads(lines[0])
    told["motion"]["pan"] = 12.5
    cache.write_text("\n".join([json.dumps(told), *lines[1:-1], lines[-1][: len(lines[-1]) // 2]]) + "\n")
    again, _ = found(folder, cache)
    assert sum(one.motion.pan == 12.5 for one in again) == 1
    assert len(cache.read_text().splitlines()) == len(lines) + 1
    assert [one.motion.known for one in again] == [one.motion.known for one in first]
    other = survey(clips.discover([str(folder)]), (5, 48, 64), None, cache, tiny.ignore)[0]
    assert all(one.motion.pan != 12.5 for one in other)


def test_a_long_clip_is_measured_in_pieces(tmp_path):
    left, right = (filmed.filmed(20, 48, 64, pan=pan) for pan in (-0.4, 0.4))
    path = write(tmp_path / "long.mp4", torch.from_numpy(np.concatenate([left, right])), clips.WORLD_FPS)
    some, aside = survey([Item(path)], SIZE, None, tmp_path / "motion.jsonl", tiny.ignore)
    assert [one.item.frames for one in some] == [(0, 10), (10, 20), (20, 30), (30, 40)]
    assert [camera.name(one.motion) for one in some] == ["pan-left"] * 2 + ["pan-right"] * 2
    assert not aside
    assert camera_data.cut(Item(path, frames=(3, 39)), 9, None) == [Item(path, frames=(3, 39))]


def test_pictures_to_check_with_are_not_trained_on():
    some = made_up(pan_left=6, pan_right=5, tilt_up=2, static=2, bare=9)
    choice = choose(some, ("pan-left",), synthesize=0, least=4, pictures=8)
    assert len(choice.pictures) == 8
    assert all(one.motion.known and not camera.matches(one.motion, "pan-left") for one in choice.pictures)
    assert len(choice.kept["pan-left"]) == 6
    both = choose(some, ("pan-left", "pan-right"), synthesize=0, least=4, pictures=8)
    held = {one.sha256 for one in both.pictures}
    assert len(held) == 4 + 3  # all others, and what both words can spare
    assert [len(kept) for kept in both.kept.values()] == [4, 4]
    assert not held & {one.sha256 for kept in both.kept.values() for one in kept}


def test_sources_of_made_clips_are_stills_that_are_not_held_out():
    some = made_up(pan_left=2, static=2, images=2, bare=3)
    choice = choose(some, ("pan-left",), synthesize=10, least=12, pictures=3)
    assert len(choice.sources) == 1
    assert len(choice.pictures) == 3
    assert not {one.sha256 for one in choice.sources} & {one.sha256 for one in choice.pictures}
    static = choose(some, ("static",), synthesize=10, least=3, pictures=1)
    assert all(one.item.kind == "video" for one in static.sources)  # an image would teach that nothing moves


def test_too_few_clips_are_refused_with_numbers_and_the_way_out():
    with pytest.raises(UsageError, match="3 of 12 clips show 'pan-left'; 16 are needed") as caught:
        choose(made_up(pan_left=3, pan_right=5, static=1, images=3), ("pan-left",), synthesize=0, least=16, pictures=8)
    do = caught.value.do
    assert "--synthesize 13 (of 1 still clips and 3 images)" in do
    assert "--min-clips 3" in do
    assert "Motions found: pan-left 3, pan-right 5, static 4." in do
    with pytest.raises(UsageError, match="0 of 3 clips show 'tilt-up'; 2 are needed") as caught:
        choose(made_up(pan_left=3), ("tilt-up",), synthesize=0, least=2, pictures=0)
    assert caught.value.do == "Ways out: more --data. Motions found: pan-left 3."
    with pytest.raises(UsageError, match="4 more would be made; 16 are needed"):
        choose(made_up(pan_left=3, images=3), ("pan-left",), synthesize=4, least=16, pictures=0)
    with pytest.raises(UsageError, match="nothing to move a window over"):
        choose(made_up(pan_left=3), ("pan-left",), synthesize=4, least=1, pictures=0)
    with pytest.raises(UsageError, match="No clip is left to check"):
        choose(made_up(pan_left=3), ("pan-left",), synthesize=0, least=3, pictures=2)


@pytest.mark.parametrize("size", [(9, 48, 96), (6, 65, 33)])
def test_a_window_moves_as_asked_and_never_leaves_the_picture(size):
    _, height, width = size
    wall = filmed.wallpaper(height, width)[None, : round(ROOM * height), : round(ROOM * width)]
    for seed, word in enumerate(camera.WORDS):
        frames = moved(wall, word, size, seed)
        assert frames.shape == (*size, 3)
        assert camera.name(estimate(frames)) == word
        assert frames.min() >= 38  # the wallpaper has nothing darker than 40
        assert np.array_equal(frames, moved(wall, word, size, seed))
        assert not np.array_equal(frames, moved(wall, word, size, seed + 100))


def test_what_moves_in_a_still_clip_goes_on_moving():
    grey = filmed.wallpaper(48, 64)[None, :72, :96, :1]
    wall = np.broadcast_to(grey, (9, 72, 96, 3)).copy()
    for k, frame in enumerate(wall):
        frame[30:40, 34 + 2 * k : 44 + 2 * k] = (255, 0, 0)
    frames = moved(wall, "tilt-up", SIZE, 1)
    red = (frames[..., 0] > 200) & (frames[..., 1] < 60)
    places = [np.argwhere(one)[:, 1].mean() for one in red]
    assert np.diff(places) == pytest.approx(2, abs=0.3)


def test_clips_are_made_once_and_the_same(folder, tmp_path):
    sources = [one for one in found(folder, tmp_path / "motion.jsonl")[0] if one.still]
    first = make(sources, "zoom-in", 5, SIZE, None, tmp_path / "made", tiny.ignore)
    assert len(first) == 5
    bytes_of = {one.path: one.path.read_bytes() for one in first}
    first[1].path.unlink()
    times = {one.path: one.path.stat().st_mtime_ns for one in first if one.path.exists()}
    again = make(sources, "zoom-in", 5, SIZE, None, tmp_path / "made", tiny.ignore)
    assert {one.path: one.path.read_bytes() for one in again} == bytes_of
    assert all(path.stat().st_mtime_ns == then for path, then in times.items())
    some, _ = survey(again, SIZE, None, tmp_path / "other.jsonl", tiny.ignore)
    assert [camera.name(one.motion) for one in some] == ["zoom-in"] * 5


def test_no_clip_is_made_of_what_tells_nothing(tmp_path):
    Image.new("RGB", (64, 48), (90, 90, 90)).save(tmp_path / "wall.png")
    bare = Found(Item(tmp_path / "wall.png", kind="image"), "00", Motion(known=True))
    assert make([bare], "pan-left", 2, SIZE, None, tmp_path / "made", tiny.ignore) == []


def test_the_size_of_clips_is_the_checkpoints_or_the_one_asked_for(tmp_path):
    folder = svd_tiny.checkpoint(tmp_path / "base")
    assert family.describe is not None
    base = family.describe(folder)
    options = svd_tiny.asked(folder, "train-lora", data=["x"], camera="pan")
    told = camera_data.encoding(family, options, base)
    assert (told.num_frames, told.height, told.width, told.fps) == (4, 32, 32, 7.0)
    told = camera_data.encoding(family, replace(options, clip_size="6x64x48", clip_fps=4.0), base)
    assert (told.num_frames, told.height, told.width, told.fps) == (6, 64, 48, 4.0)
    for wrong, why in (("6x64", "FRAMESxHEIGHTxWIDTH"), ("6x65x48", "--height 65"), ("1x64x48", "one frame")):
        with pytest.raises(UsageError, match=why):
            camera_data.encoding(family, replace(options, clip_size=wrong), base)


def test_an_adapter_is_good_where_most_samples_turn_and_more_than_before():
    left, still, bare = Motion(pan=-0.2, known=True), Motion(known=True), Motion()
    good = judge("pan-left", [still, left, still, bare], [left, left, left, bare])
    assert good == {
        "word": "pan-left",
        "with": {"of": 4, "show": 3, "known": 3, "shift": 0.2},
        "without": {"of": 4, "show": 1, "known": 3, "shift": 0.0667},
        "good": True,
    }
    assert not judge("pan-left", [still] * 4, [left, left, still, bare])["good"]
    assert not judge("pan-right", [still] * 4, [left] * 4)["good"]
    assert not judge("pan-left", [left] * 4, [left] * 4)["good"]
    assert judge("static", [left] * 4, [still] * 4)["good"]


def test_samples_start_from_pictures_or_where_a_family_takes_text_from_captions(tmp_path):
    folder = svd_tiny.checkpoint(tmp_path / "svd")
    assert family.describe is not None
    item = Item(svd_tiny.picture(tmp_path / "first.png"), ("a red ball rising",), "image")
    (one,) = wanted(family, family.describe(folder), [item], (4, 32, 32), 5)
    assert (one.image, one.prompt, one.seed, one.num_frames) == (item.path, "", 5, 4)
    texts = tiny.checkpoint(tmp_path / "cogvideox")
    (one,) = wanted(tiny.family, tiny.describe(texts), [item], (9, 32, 32), 5)
    assert (one.image, one.prompt, one.height) == (None, "a red ball rising", 32)
    with pytest.raises(UsageError, match="The prompt is empty"):
        wanted(tiny.family, tiny.describe(texts), [replace(item, captions=())], (9, 32, 32), 5)
