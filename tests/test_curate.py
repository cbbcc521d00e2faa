"""Curation: shots, scores and decisions of real files; runs that are killed go on; the report; what goes wrong."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from shell import environment, vgen

from vgen import clips, motion, video, world
from vgen.curate import Curated, Settings, copies, curate, shares, totals
from vgen.journal import Journal
from vgen.scorers import STANDIN, choose
from vgen.video_write import write

SMALL = Settings(min_side=32)


def save(path: Path, frames: np.ndarray, fps: int = 15) -> Path:
    return write(path, [torch.from_numpy(frame.astype(np.uint8)) for frame in frames], Fraction(fps))


def moving(seed: int, count: int, speed: float = 1.0) -> np.ndarray:
    """A shot (T, 96, 128, 3) that pans over smooth noise."""
    noise = np.random.default_rng(seed).integers(0, 256, (140, 128 + 20 + int(speed * count), 3), np.uint8)
    ground = cv2.GaussianBlur(noise.astype(np.float32), (0, 0), 4)
    ground = (ground - ground.min()) / np.ptp(ground) * 150 + 60 * np.random.default_rng(seed).random(3)
    steps = [np.array([[1, 0, -speed * k], [0, 1, -10]], np.float32) for k in range(count)]
    return np.stack([cv2.warpAffine(ground.astype(np.float32), step, (128, 96)) for step in steps])


def titled(count: int, lines: int) -> np.ndarray:
    """A moving shot with lines of text, each about 4 % of the frame."""
    shots = [cv2.resize(frame * 0.6, (512, 384)).astype(np.uint8) for frame in moving(9, count, 2.0)]
    for frame in shots:
        for line in range(lines):
            spot = (20, 50 + 50 * line)
            cv2.putText(frame, "WORDS OVER A PICTURE", spot, cv2.FONT_HERSHEY_DUPLEX, 1.1, (255, 255, 255), 2)
    return np.stack(shots)


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shots in a file, a still, texts, a clip of the world with a caption, one twice; a broken file, a picture."""
    desk = tmp_path_factory.mktemp("desk")
    save(desk / "a-two.mp4", np.concatenate([moving(1, 40), moving(2, 50)]))
    save(desk / "b-still.mp4", np.repeat(moving(3, 1), 40, 0))
    save(desk / "c-text.mp4", titled(40, 4))
    save(desk / "d-title.mp4", titled(40, 1))
    pixels, _, caption, _ = world.clip(0, 3, 17, 64, 64)
    save(desk / "e-world.mp4", pixels.add(1).mul(127.5).permute(1, 2, 3, 0).numpy(), 8)
    (desk / "e-world.txt").write_text(caption)
    (desk / "f-again.mp4").write_bytes((desk / "b-still.mp4").read_bytes())
    (desk / "g-broken.mp4").write_bytes((desk / "a-two.mp4").read_bytes()[:3000])
    cv2.imwrite(str(desk / "h-picture.png"), moving(1, 1)[0].astype(np.uint8))
    save(desk / "i-short.mp4", moving(4, 10))
    return desk


def run(place: Path, *inputs: Path | str, settings: Settings = SMALL, **more: Any) -> Curated:
    items = clips.discover([str(one) for one in inputs])
    chosen, _ = choose([], more.get("without", ["camera", "shared-words"]))
    return curate(items, chosen, settings, Journal(place / "set.scores.jsonl"), "cpu", lambda *told: None)


@pytest.fixture(scope="module")
def found(desk: Path, tmp_path_factory: pytest.TempPathFactory) -> Curated:
    return run(tmp_path_factory.mktemp("found"), desk, without=["camera"])


def named(found: Curated, start: str) -> list[dict[str, Any]]:
    return [row for row in found.rows if Path(row["source"]).name.startswith(start)]


def test_shots_are_rows_and_decisions_have_reasons(found: Curated) -> None:
    first, second = named(found, "a-")
    assert [(row["start_frame"], row["end_frame"], row["cut_level"]) for row in (first, second)] == [
        (0, 40, -1),
        (40, 90, 1),
    ]
    assert {Path(row["source"]).name: row["reasons"] for row in found.rows if row["decision"] == "drop"} == {
        "b-still.mp4": [f"motion_score {named(found, 'b-')[0]['motion_score']:g} < 0.5"],
        "c-text.mp4": [f"text_area {named(found, 'c-')[0]['text_area']:g} > 0.07"],
        "i-short.mp4": ["0.67 s < 2 s"],
    }
    assert 0.01 < named(found, "d-")[0]["text_area"] < 0.07
    assert (second["fps"], second["n_frames"], second["height"], second["width"]) == ("15", 50, 96, 128)
    assert second["scorer"]["aesthetic"] == second["scorer"]["text_area"] == STANDIN
    assert second["scorer"]["motion_score"] == "farneback"
    assert 10 < second["motion_score"] < 7.5 * 256 / 96


def test_what_gives_no_clips_is_set_aside_with_the_reason(found: Curated) -> None:
    told = {Path(one.source).name: one.reason for one in found.aside}
    assert set(told) == {"f-again.mp4", "g-broken.mp4", "h-picture.png"}
    assert "b-still.mp4" in told["f-again.mp4"]
    assert "picture" in told["h-picture.png"]
    assert not found.problems


def test_given_captions_are_kept_and_need_no_stand_in(found: Curated, desk: Path) -> None:
    (row,) = named(found, "e-")
    assert row["captions"] == {"given": (desk / "e-world.txt").read_text()}
    assert row["caption_probs"] == {"given": 1.0}
    assert "captions.image" not in row["scorer"]
    assert 0 < row["clip_sim"] <= 1


def test_captions_of_the_world_are_read_where_none_are_given(desk: Path, tmp_path: Path) -> None:
    (tmp_path / "w.mp4").write_bytes((desk / "e-world.mp4").read_bytes())
    (row,) = run(tmp_path, tmp_path / "w.mp4").rows
    scene_drawn = world.scene(0, 3)
    thing = f"a {scene_drawn.colour} {scene_drawn.object}"
    assert row["captions"] == {
        k: thing if k == "image" else f"{thing} {scene_drawn.motion}" for k in ("image", "video", "fused")
    }
    assert row["caption_probs"] == {"image": 0.5, "video": 0.25, "fused": 0.25}


def test_shares_of_captions_add_up_to_one() -> None:
    assert shares({"image": "a", "video": "b"}) == {"image": pytest.approx(2 / 3), "video": pytest.approx(1 / 3)}
    assert shares({"given": "a", "given-1": "b", "fused": "c"}) == dict.fromkeys(
        ("given", "given-1", "fused"), pytest.approx(1 / 3, abs=1e-5)
    )
    assert shares({}) == {}


def test_buckets_come_from_the_kept_clips(found: Curated) -> None:
    kept = [row["motion_score"] for row in found.rows if row["decision"] == "keep"]
    assert found.table == motion.ecdf(kept)
    scored = sorted(
        (row["motion_score"], row["motion_bucket"]) for row in found.rows if row["motion_score"] is not None
    )
    assert [bucket for _, bucket in scored] == sorted(bucket for _, bucket in scored)
    assert (scored[0][1], scored[-1][1]) == (0, 255)


def test_clips_begin_at_key_frames_unless_told_not_to(tmp_path: Path) -> None:
    """A dissolve leaves no key frame behind it, so the second shot is lost to copying, but not to --no-snap."""
    mixed = np.linspace(0, 1, 10)[:, None, None, None]
    a, b = moving(1, 45), moving(2, 60)
    save(tmp_path / "a.mp4", np.concatenate([a[:35], a[35:] * (1 - mixed) + b[:10] * mixed, b[10:]]))
    first, second = run(tmp_path, tmp_path / "a.mp4").rows
    assert (first["decision"], second["reasons"]) == ("keep", ["no key frame in it"])
    free = run(tmp_path, tmp_path / "a.mp4", settings=Settings(min_side=32, snap=False)).rows[1]
    assert free["decision"] == "keep"
    assert 44 <= free["start_frame"] <= 48
    assert not free["keyframe_snapped"]


def test_long_shots_are_cut_in_equal_parts(desk: Path, tmp_path: Path) -> None:
    settings = Settings(min_side=32, snap=False, max_seconds=2, min_seconds=1)
    rows = run(tmp_path, desk / "a-two.mp4", settings=settings).rows
    assert [(row["start_frame"], row["end_frame"]) for row in rows] == [(0, 20), (20, 40), (40, 65), (65, 90)]


def test_totals_are_the_columns_of_the_paper(found: Curated) -> None:
    rows = named(found, "a-")
    assert totals(rows) == {
        "clips": 2,
        "mean_seconds": 3.0,
        "mean_frames": 45,
        "total_seconds": 6.0,
        "clips_per_source": 2,
    }
    assert totals([])["clips"] == 0


def test_scores_are_made_once_and_thresholds_need_none_anew(desk: Path, tmp_path: Path) -> None:
    first = run(tmp_path, desk, without=["shared-words"])
    kept = (tmp_path / "set.scores.jsonl").read_bytes()
    again = run(tmp_path, desk, without=["shared-words"])
    strict = run(tmp_path, desk, without=["shared-words"], settings=replace(SMALL, limits={"motion_score": "75%"}))
    assert again == first
    assert (tmp_path / "set.scores.jsonl").read_bytes() == kept
    assert sum(row["decision"] == "keep" for row in strict.rows) < sum(row["decision"] == "keep" for row in first.rows)
    other = run(tmp_path, desk, without=["shared-words", "glyphs"])
    assert "text_area" not in other.rows[0]
    assert (tmp_path / "set.scores.jsonl").read_bytes() == kept


def test_a_torn_or_spoilt_journal_loses_those_lines_alone(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    journal = Journal(path)
    assert [journal.once(k, lambda k=k: k * 2) for k in (1, 2, 3)] == [2, 4, 6]
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"\xff\x00 spoilt\n" + lines[1] + lines[2][:-5])
    journal = Journal(path)
    assert [journal.once(k, lambda: "new") for k in (1, 2, 3)] == [2, 4, "new"]
    assert Journal(path).once(3, lambda: "newer") == "new"


def test_copies_hold_the_frames_of_their_clips(found: Curated, tmp_path: Path) -> None:
    made = list(copies(found.rows, tmp_path / "cut"))
    kept = [row for row in found.rows if row["decision"] == "keep"]
    assert len(made) == len(kept)
    for (path, count, reason), row in zip(made, kept, strict=True):
        assert not reason
        assert row["n_frames"] - 4 <= count <= row["n_frames"]
        copied = torch.stack(list(video.frames(path)))
        whole = torch.stack(list(video.frames(row["source"], start=row["start_frame"], stop=row["end_frame"])))
        assert torch.equal(copied, whole[:count])


def command(desk: Path, place: Path, *more: str) -> list[str]:
    return ["curate", str(desk), "-o", str(place / "set.jsonl"), "--min-side", "32", "--without", "camera", *more]


def test_the_command_writes_manifest_report_and_copies(desk: Path, found: Curated, tmp_path: Path) -> None:
    done = vgen(
        *command(desk, tmp_path, "--report", str(tmp_path / "r.html"), "--clips", str(tmp_path / "cut"), "--json")
    )
    assert done.code == 3, done.err
    rows = [json.loads(line) for line in (tmp_path / "set.jsonl").read_text().splitlines()]
    assert rows == json.loads(json.dumps(found.rows))
    assert done.json()["kept"] == totals([row for row in rows if row["decision"] == "keep"])
    told = tomllib.loads((tmp_path / "set.jsonl.toml").read_text())
    assert told["min_side"] == 32
    assert tuple(told["record"]["motion_table"]) == found.table
    assert len(list((tmp_path / "cut").iterdir())) == done.json()["kept"]["clips"]
    assert "set aside" in done.err
    page = (tmp_path / "r.html").read_text()
    assert not re.search(r'(src|href)="(?!data:image/jpeg;base64,)', page)
    assert page.count("<img") == len(rows)
    assert page.count("<svg") >= 4
    for word in ("clips per source", "builtin-standin", "g-broken.mp4", "raw", "kept"):
        assert word in page
    items = clips.discover([str(tmp_path / "set.jsonl")])
    assert [item.frames for item in items] == [
        (r["start_frame"], r["end_frame"]) for r in rows if r["decision"] == "keep"
    ]


def test_a_run_that_is_killed_goes_on_and_comes_to_the_same_bytes(desk: Path, tmp_path: Path) -> None:
    few = ["--without", "world-video-caption", "--without", "shared-words"]
    assert vgen(*command(desk, tmp_path / "whole", *few)).code == 3
    place = tmp_path / "killed"
    words = [sys.executable, "-m", "vgen.cli", *command(desk, place, *few)]
    process = subprocess.Popen(words, env=environment(), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    scores = place / "set.scores.jsonl"
    for _ in range(600):
        if scores.exists() and scores.read_bytes().count(b"\n") >= 8:
            break
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (place / "set.jsonl").exists()
    before = scores.read_bytes()
    assert vgen(*command(desk, place, *few)).code == 3
    assert (place / "set.jsonl").read_bytes() == (tmp_path / "whole" / "set.jsonl").read_bytes()
    sound = before[: before.rfind(b"\n") + 1]
    assert scores.read_bytes().startswith(sound)
    keys = [json.loads(line)["key"] for line in scores.read_text().splitlines()]
    assert len(keys) == len(set(keys))


def test_a_scorer_that_does_not_import_is_named_and_the_others_run(desk: Path, tmp_path: Path) -> None:
    words = ["curate", str(desk / "a-two.mp4"), "-o", str(tmp_path / "s.jsonl"), "--min-side", "32"]
    done = vgen(*words, VGEN_SCORERS="gone=no_such_module:card")
    assert done.code == 3
    assert "'gone' could not be imported" in done.err
    assert json.loads((tmp_path / "s.jsonl").read_text().splitlines()[0])["motion_score"] > 0


def test_clips_of_the_world_can_be_curated_and_named_again(tmp_path: Path) -> None:
    found = run(tmp_path, "world:3")
    assert [row["source"] for row in found.rows] == ["world:0/0", "world:0/1", "world:0/2"]
    assert all(row["captions"]["given"] for row in found.rows)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "No input"),
        (["{desk}"], "-o set.jsonl"),
        (["{desk}", "-o", "set.csv"], "no name for a manifest"),
        (["{desk}", "-o", "a.jsonl", "--report", "r.pdf"], "no name for a report"),
        (["{desk}", "-o", "a.jsonl", "--no-snap", "--clips", "c"], "cannot be copied"),
        (["{desk}", "-o", "there.jsonl"], "--overwrite"),
        (["{desk}", "-o", "a.jsonl", "--min-motion", "much"], "no limit for motion_score"),
        (["{desk}", "-o", "a.jsonl", "--scorer", "blib=x"], "Did you mean 'blip'"),
        (["{desk}", "-o", "a.jsonl", "--min-motoin", "1"], "--min-motion"),
        (["nowhere", "-o", "a.jsonl"], "no file or folder"),
    ],
)
def test_what_cannot_be_is_refused_before_work_begins(desk: Path, tmp_path: Path, words: list[str], told: str) -> None:
    (tmp_path / "there.jsonl").write_text("")
    done = vgen("curate", *(word.format(desk=desk) for word in words), cwd=tmp_path)
    assert done.code == 2, done.err
    assert told in done.err
    assert done.out == ""


def test_no_kept_clip_is_an_error_that_says_why(desk: Path, tmp_path: Path) -> None:
    done = vgen("curate", desk / "i-short.mp4", "-o", tmp_path / "s.jsonl", "--min-side", "32")
    assert done.code == 1
    assert "0.67 s < 2 s" in done.err
