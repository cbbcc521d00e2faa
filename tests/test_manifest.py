"""The manifest of a curated set as the input of `encode`: its clips are parts of files, with captions and facts."""

import json
from collections import Counter
from fractions import Fraction
from pathlib import Path

import barcode
import pytest
import tiny

from vgen import clips
from vgen.dataset import choose
from vgen.encode import encode
from vgen.errors import UsageError
from vgen.machine import seeded
from vgen.probe import BadClip
from vgen.store import Store

SHARES = {"image": 0.5, "video": 0.25, "fused": 0.25}


def row(source: str, start: int, stop: int, **more: object) -> dict[str, object]:
    """A line of a manifest."""
    captions = {"image": "a red ball", "video": "a ball rising", "fused": "a red ball rising"}
    told = {"source": source, "start_frame": start, "end_frame": stop, "motion_score": 3.5, "motion_bucket": 99}
    return {**told, "captions": captions, "caption_probs": SHARES, "decision": "keep", "reasons": [], **more}


def manifest(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return path


@pytest.fixture
def film(tmp_path: Path) -> Path:
    return barcode.make(tmp_path / "film.mp4", 60)


def test_parts_of_a_file_are_read_from_their_first_frame_to_their_end(film: Path, tmp_path: Path):
    lines = [row("film.mp4", 7, 20), row("film.mp4", 20, 60), row("film.mp4", 60 - 20, 50, decision="drop")]
    first, second = clips.discover([str(manifest(tmp_path / "m.jsonl", *lines))])
    assert (first.frames, second.frames) == ((7, 20), (20, 60))
    loaded = clips.load(first, 13, 48, 128)
    frames = loaded.pixels.add(1).mul(127.5).byte().permute(1, 2, 3, 0)
    assert barcode.numbers(frames) == list(range(7, 20))
    assert loaded.record["source"]["frames"] == [7, 20]
    halved = clips.load(second, 20, 48, 128, fps=5).pixels.add(1).mul(127.5).byte().permute(1, 2, 3, 0)
    assert barcode.numbers(halved) == list(range(20, 60, 2))
    for item, count, fps in ((first, 14, None), (second, 21, 5)):
        with pytest.raises(BadClip, match="needed"):
            clips.load(item, count, 48, 128, fps=fps)
        with pytest.raises(BadClip, match="needed"):
            clips.bucket(item, [(count, 48, 128)], fps)


def test_keys_tell_parts_of_a_file_apart_and_the_record_keeps_the_hash_of_the_file(film: Path, tmp_path: Path):
    lines = [row("film.mp4", 0, 20), row("film.mp4", 20, 40), row("film.mp4", 20, 40)]
    items = clips.discover([str(manifest(tmp_path / "m.jsonl", *lines))])
    whole = clips.look(clips.discover([str(film)])[0])
    seen = [clips.look(item) for item in items]
    assert len({one.sha256 for one in (*seen, whole)}) == 3
    assert clips.load(items[0], 3, 48, 128).record["source"]["sha256"] == whole.sha256 == seen[1].file
    assert items[1].facts["motion_bucket"] == 99
    assert items[1].facts["caption_probs"] == [0.5, 0.25, 0.25]
    assert items[1].captions == ("a red ball", "a ball rising", "a red ball rising")


def test_parts_beyond_the_end_are_set_aside(film: Path, tmp_path: Path):
    (item,) = clips.discover([str(manifest(tmp_path / "m.jsonl", row(str(film), 50, 61)))])
    with pytest.raises(BadClip, match="60 frames"):
        clips.look(item)


def test_clips_of_the_world_come_back_by_name(tmp_path: Path):
    (item,) = clips.discover([str(manifest(tmp_path / "m.jsonl", row("world-full:3/5", 0, 17)))])
    assert item.world == clips.World(3, 5, "full")
    assert clips.look(item).sha256 == clips.look(clips.discover(["world-full:6:3"])[5]).sha256


@pytest.mark.parametrize("line", ["{}", "[1]", '{"file": "a.mp4", "caption": "x"}', "not json"])
def test_other_lines_are_refused_with_their_number(tmp_path: Path, line: str):
    path = tmp_path / "m.jsonl"
    path.write_text(json.dumps(row("film.mp4", 0, 9)) + "\n" + line + "\n")
    with pytest.raises(UsageError, match="line 2"):
        clips.discover([str(path)])


def test_encode_keeps_the_facts_of_the_manifest(film: Path, tmp_path: Path, folder: Path):
    model, store = tiny.model(folder), tmp_path / "store"
    inputs = [str(manifest(tmp_path / "m.jsonl", row("film.mp4", 0, 20), row("film.mp4", 20, 60)))]
    told = tiny.asked(folder, "encode", inputs=inputs)
    done = list(encode(model, tiny.opened(model, store), clips.discover(inputs), [(9, 32, 32)], told, tiny.ignore))
    assert [one.source for one in done] == [f"{tmp_path / 'film.mp4'}[0:20]", f"{tmp_path / 'film.mp4'}[20:60]"]
    for record in Store.open(store).records():
        assert record["facts"]["motion_score"] == 3.5
        assert record["facts"]["caption_probs"] == [0.5, 0.25, 0.25]


def test_captions_are_drawn_by_their_shares():
    """Within 2 % over 10,000 draws, and with dropout in front of it."""
    captions = list(SHARES)
    drawn = Counter(choose(captions, 0.2, seeded(0, "draw", k), list(SHARES.values())) for k in range(10_000))
    assert drawn[""] / 10_000 == pytest.approx(0.2, abs=0.02)
    for name, share in SHARES.items():
        assert drawn[name] / (10_000 - drawn[""]) == pytest.approx(share, abs=0.02)


def test_captions_without_shares_are_as_likely():
    drawn = Counter(choose(["a", "b"], 0.0, seeded(0, "draw", k)) for k in range(4000))
    assert drawn["a"] / 4000 == pytest.approx(0.5, abs=0.03)
    assert Fraction(drawn["a"] + drawn["b"]) == 4000
