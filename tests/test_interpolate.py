"""Interpolation: given frames stay, times are exact, cuts are held, sound and colours are kept, and a run goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from fractions import Fraction
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any

import av
import barcode
import pytest
import torch
import typer
from barcode import numbers
from films import film, heard, scene, with_sound
from shell import FAMILIES, TOYS, environment, vgen

from vgen import family as found_families
from vgen.commands.prepare import perform
from vgen.errors import VgenError
from vgen.family import Checkpoint, family, resolve
from vgen.hard_cuts import marked
from vgen.metrics import psnr
from vgen.options import InterpolateOptions
from vgen.placing import dense
from vgen.probe import probe
from vgen.video import frames
from vgen.video_write import Look, write

TOY = {"VGEN_FAMILIES": f"{FAMILIES},between=between_family:family"}
NTSC = Fraction(30000, 1001)


@pytest.fixture(autouse=True)
def _toys(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The family 'between' of tests/toys is installed."""
    monkeypatch.syspath_prepend(str(TOYS))
    monkeypatch.setenv("VGEN_FAMILIES", TOY["VGEN_FAMILIES"])
    found_families._entries.cache_clear()
    yield
    found_families._entries.cache_clear()


def run(clip: Path, output: Path, name: str = "classic", **flags: Any) -> Path:
    """Run the verb in this process, as the command line does."""
    told = {"method": "linear"} if name == "classic" else {}
    given = {**told, **flags, "input": str(clip), "output": str(output)}
    with pytest.raises(typer.Exit) as end:
        perform("interpolate", family(name), {**given, "quiet": True})
    assert end.value.exit_code == 0
    assert not output.with_name(output.name + ".parts").exists()
    return output


def record(output: Path) -> dict[str, Any]:
    """The record beside an output."""
    path = output / "run.toml" if output.is_dir() else output.with_name(output.name + ".toml")
    return tomllib.loads(path.read_text())["record"]


def pictures(folder: Path) -> list[torch.Tensor]:
    """The frames of a folder of PNGs."""
    return [next(frames(path)) for path in sorted(folder.glob("*.png"))]


@pytest.mark.parametrize("name", ["classic", "between"])
@pytest.mark.parametrize("size", [(48, 64), (65, 33)])
def test_given_frames_are_returned_exactly(tmp_path: Path, name: str, size: tuple[int, int]) -> None:
    clip = film(tmp_path / "a.mp4", 5, height=size[0], width=size[1])
    made = pictures(run(clip, tmp_path / "out", name))
    given = list(frames(clip))
    assert len(made) == 4 * (5 - 1) + 1
    assert all(torch.equal(made[4 * k], given[k]) for k in range(5))
    for k in range(4):
        for j in (1, 2, 3):
            mean = torch.lerp(given[k].float(), given[k + 1].float(), j / 4)
            assert (made[4 * k + j].float() - mean).abs().max() <= 1


@pytest.mark.parametrize(("factor", "places"), [(2, (0, 8)), (3, (0, 5, 11)), (16, tuple(range(16)))])
def test_three_frames_at_a_time_make_any_factor(tmp_path: Path, factor: int, places: tuple[int, ...]) -> None:
    clip = film(tmp_path / "a.mp4", 3, height=33, width=47)
    made = pictures(run(clip, tmp_path / "out", "between", factor=str(factor), batch_size="4"))
    given = [frame.float() for frame in frames(clip)]
    wanted = [torch.lerp(given[k], given[k + 1], place / 16) for k in (0, 1) for place in places] + [given[2]]
    assert len(made) == len(wanted)
    assert max((a.float() - b).abs().max() for a, b in zip(made, wanted, strict=True)) <= 1.5


def test_grids_are_exact_where_they_can_be() -> None:
    assert [dense(3, factor) for factor in (2, 3, 4, 5, 8, 16, Fraction(5, 2))] == [4, 16, 4, 16, 16, 16, 16]
    assert [dense(1, factor) for factor in (2, 4, 8)] == [2, 4, 8]
    assert dense(None, 7) == 7


@pytest.mark.parametrize("kind", ["mp4", "webm"])
@pytest.mark.parametrize("fps", [NTSC, Fraction(10)])
def test_a_factor_keeps_duration_and_every_time(tmp_path: Path, kind: str, fps: Fraction) -> None:
    clip = film(tmp_path / "a.mp4", 8, fps)
    told, made = probe(clip), probe(run(clip, tmp_path / f"b.{kind}"))
    assert len(made.pts) == 4 * 7 + 1
    tick = Fraction(0) if kind == "mp4" else Fraction(1, 1000)  # Matroska rounds to it, and the rate is read from that
    assert abs(made.fps - 4 * fps) <= 10 * tick
    assert all(abs(stamp - k / (4 * fps)) <= tick for k, stamp in enumerate(made.pts))
    with av.open(str(tmp_path / f"b.{kind}")) as container:
        assert container.duration is not None
        assert abs(Fraction(container.duration, 1_000_000) - told.duration) <= 1 / (4 * fps)
    if kind == "mp4":
        assert made.duration == told.duration


def test_a_gif_lasts_as_long_as_the_clip(tmp_path: Path) -> None:
    clip = film(tmp_path / "a.mp4", 5)
    made = probe(run(clip, tmp_path / "b.gif"))
    assert len(made.pts) == 17
    assert abs(made.duration - probe(clip).duration) <= Fraction(1, 40)


@pytest.mark.parametrize("rate", ["60000/1001", "60", "23.976"])
def test_any_rate_is_placed_by_time(tmp_path: Path, rate: str) -> None:
    clip = barcode.make(tmp_path / "a.mp4", 16, Fraction(12))
    out = run(clip, tmp_path / "b.mp4", method="duplicate", fps=rate)
    made = probe(out)
    assert made.fps == Fraction(rate)
    assert made.pts == tuple(k / made.fps for k in range(len(made.pts)))
    assert abs(made.duration - Fraction(16, 12)) <= 1 / made.fps
    assert numbers(frames(out)) == [min(int(stamp * 12), 15) for stamp in made.pts]


def test_frames_whose_times_meet_stay_exact_at_another_rate(tmp_path: Path) -> None:
    clip = film(tmp_path / "a.mp4", 9, 24)
    made, given = pictures(run(clip, tmp_path / "out", fps="60")), list(frames(clip))
    assert len(made) == round(9 / 24 * 60)
    assert all(torch.equal(made[5 * k], given[2 * k]) for k in range(4))
    assert (made[1].float() - torch.lerp(given[0].float(), given[1].float(), 0.4)).abs().max() <= 2


@pytest.mark.parametrize("kind", ["mp4", "webm"])
def test_a_varying_rate_keeps_its_stamps(tmp_path: Path, kind: str) -> None:
    stamps = [0, 1, 2, 6, 7, 8, 16, 17, 18, 19]
    clip = barcode.make(tmp_path / "a.mp4", pts=stamps)
    told, made = probe(clip), probe(run(clip, tmp_path / f"b.{kind}", method="duplicate"))
    assert told.vfr
    tick = Fraction(0) if kind == "mp4" else Fraction(1, 1000)
    wanted = [Fraction(a * 4 + (b - a) * k, 40) for a, b in pairwise(stamps) for k in range(4)]
    assert all(abs(a - b) <= tick for a, b in zip(made.pts, [*wanted, Fraction(19, 10)], strict=True))
    assert abs(made.duration - told.duration) <= Fraction(1, 10)
    assert numbers(frames(made.path))[::4] == list(range(10))


def test_odd_stamps_are_kept_to_the_tick(tmp_path: Path) -> None:
    stamps = [0, 3001, 7013, 9109, 12401, 12403, 18917]
    clip = barcode.make(tmp_path / "a.mp4", fps=Fraction(90000), pts=stamps)
    made = probe(run(clip, tmp_path / "b.mp4", method="duplicate", factor="3"))
    wanted = [Fraction(a * 3 + (b - a) * k, 270000) for a, b in pairwise(stamps) for k in range(3)]
    assert made.pts == (*wanted, Fraction(18917, 90000))


@pytest.mark.parametrize("output", ["out", "b.mp4", "c.gif"])
def test_a_varying_rate_is_made_constant_where_it_is_asked_for(tmp_path: Path, output: str) -> None:
    stamps = [0, 1, 2, 6, 7, 8, 16, 17, 18, 19]
    clip = barcode.make(tmp_path / "a.mp4", pts=stamps)
    flags = {"fps": "20"} if output == "b.mp4" else {"factor": "2"}
    rate = Fraction(20) if output == "b.mp4" else 2 * probe(clip).fps
    out = run(clip, tmp_path / output, method="duplicate", **flags)
    shown = numbers(pictures(out) if out.is_dir() else frames(out))
    assert shown == [sum(s <= Fraction(k * 10) / rate for s in stamps[1:]) for k in range(len(shown))]
    assert abs(len(shown) / rate - 2) <= 1 / rate


@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_a_turned_clip_comes_out_upright(tmp_path: Path, rotation: int) -> None:
    clip = barcode.make(tmp_path / "a.mp4", 4, rotation=rotation, size=(96, 256))
    out = run(clip, tmp_path / "b.mp4")
    made = probe(out)
    assert (made.rotation, made.width, made.height) == (0, probe(clip).width, probe(clip).height)
    assert numbers(frames(out))[::4] == [0, 1, 2, 3]


def test_cuts_are_held(tmp_path: Path) -> None:
    clip = write(tmp_path / "a.mp4", chain(scene(5), scene(5, hue=1)), Fraction(10))
    out = run(clip, tmp_path / "out", "between")
    made, given = pictures(out), list(frames(clip))
    assert record(out)["cuts"] == [5]
    assert all(torch.equal(made[16 + k], given[4]) for k in range(4))
    assert torch.equal(made[20], given[5])
    assert not torch.equal(made[13], given[3])


def test_fast_motion_dissolves_and_stills_are_no_cuts() -> None:
    pairs = zip(scene(9), scene(9, hue=1), strict=True)
    fade = [torch.lerp(a.float(), b.float(), k / 8).byte() for k, (a, b) in enumerate(pairs)]
    for some in (list(scene(12, speed=9.0)), fade, list(scene(1)) * 4):
        assert not any(cut for _, cut in marked(some))
    two = [*scene(1), *(255 - frame for frame in scene(1))]
    assert [cut for _, cut in marked(two)] == [False, True]


def test_nothing_is_made_where_nothing_moves(tmp_path: Path) -> None:
    still = list(scene(1)) * 5
    clip = write(tmp_path / "a", still, Fraction(10))  # pictures, for equal frames stay equal in them
    assert clip.is_dir()
    gif = write(tmp_path / "a.gif", still, Fraction(10))
    out = run(gif, tmp_path / "b", "between")
    assert (record(out)["made"], record(out)["still"]) == (0, 4)
    assert len(pictures(out)) == 17


@pytest.mark.parametrize(("kind", "codec"), [("mp4", "aac"), ("webm", "libopus")])
def test_all_sound_is_copied_bit_for_bit(tmp_path: Path, kind: str, codec: str) -> None:
    silent = film(tmp_path / "silent.mp4", 8)
    clip = with_sound(silent, tmp_path / "a.mkv", codec=codec, tracks=2)
    out = run(clip, tmp_path / f"b.{kind}")
    before, after = heard(clip), heard(out)
    assert len(after) == 2
    for old, new in zip(before, after, strict=True):
        assert [data for _, data in new] == [data for _, data in old]
        assert max(abs(a - b) for (a, _), (b, _) in zip(old, new, strict=True)) <= Fraction(1, 500)
    with av.open(str(out)) as container:
        assert [s.metadata.get("language") for s in container.streams.audio] == ["eng", "deu"]
    assert abs(probe(out).duration - probe(clip).duration) <= Fraction(3, 40)
    assert not heard(run(clip, tmp_path / f"c.{kind}", audio="false"))
    assert not heard(run(silent, tmp_path / f"d.{kind}"))


def test_sound_stays_in_time_where_the_pictures_begin_late(tmp_path: Path) -> None:
    clip = with_sound(film(tmp_path / "silent.mp4", 8), tmp_path / "a.mkv", late=Fraction(1, 2))
    assert probe(clip).pts[0] == Fraction(1, 2)
    out = run(clip, tmp_path / "b.mp4")
    assert probe(out).pts[0] == 0
    after = {data: stamp for stamp, data in heard(out)[0]}
    for stamp, data in heard(clip)[0]:
        if stamp >= Fraction(1, 2):
            assert abs(after[data] - (stamp - Fraction(1, 2))) <= Fraction(1, 500)


@pytest.mark.parametrize("output", ["b.gif", "b"])
def test_sound_that_an_output_cannot_hold_is_told(tmp_path: Path, output: str) -> None:
    clip = with_sound(film(tmp_path / "silent.mp4", 4), tmp_path / "a.mp4")
    done = vgen("interpolate", "classic", clip, "-o", tmp_path / output, "--method", "linear")
    assert done.code == 0
    assert "has no sound: that of" in done.err
    assert done.out == f"{tmp_path / output}\n"


TAGS = {
    "601": {"color_primaries": 6, "color_trc": 6, "colorspace": 6, "color_range": 1},
    "full": {"color_primaries": 1, "color_trc": 1, "colorspace": 1, "color_range": 2},
    "2020": {"color_primaries": 9, "color_trc": 16, "colorspace": 9, "color_range": 1},
    "none": {"color_primaries": 2, "color_trc": 2, "colorspace": 2, "color_range": 0},
}


@pytest.mark.parametrize("kind", ["mp4", "webm"])
@pytest.mark.parametrize("name", TAGS)
def test_colours_and_their_tags_are_kept(tmp_path: Path, name: str, kind: str) -> None:
    wanted = TAGS[name]
    look = Look(wanted["color_primaries"], wanted["color_trc"], wanted["colorspace"], max(1, wanted["color_range"]))
    clip = write(tmp_path / "a.mp4", scene(3), Fraction(10), look=look)
    told, made = probe(clip), probe(run(clip, tmp_path / f"b.{kind}"))
    assert (told.color_space, told.color_range) == (wanted["colorspace"], wanted["color_range"])
    assert made.color_space == told.color_space
    assert made.color_range == (told.color_range if kind == "mp4" else max(1, told.color_range))  # VP9 always says
    if kind == "mp4":
        assert (made.color_primaries, made.color_trc) == (told.color_primaries, told.color_trc)
    shown = list(frames(made.path))[::4]
    assert min(psnr(a / 127.5 - 1, b / 127.5 - 1) for a, b in zip(shown, frames(clip), strict=True)) > 35


def test_the_shape_of_pixels_is_kept(tmp_path: Path) -> None:
    clip = write(tmp_path / "a.mp4", scene(3), Fraction(10), look=Look(aspect=Fraction(4, 3)))
    assert probe(clip).pixel_aspect == Fraction(4, 3)
    assert probe(run(clip, tmp_path / "b.mp4")).pixel_aspect == Fraction(4, 3)


def test_flow_beats_fading_and_fading_beats_repeating(tmp_path: Path) -> None:
    clip = film(tmp_path / "a.mp4", 9, speed=5.0)
    found = {name: record(run(clip, tmp_path / f"{name}.mp4", method=name, measure="true")) for name in METHODS}
    figures = {name: told["measured"] for name, told in found.items()}
    assert figures["flow"]["psnr_made"] > figures["flow"]["psnr_linear"] + 3
    assert figures["flow"]["psnr_linear"] > figures["flow"]["psnr_duplicate"]
    assert figures["linear"]["psnr_made"] == pytest.approx(figures["linear"]["psnr_linear"], abs=0.1)
    assert figures["duplicate"]["psnr_made"] == figures["duplicate"]["psnr_duplicate"]
    assert {one["left_out"] for one in figures.values()} == {4}
    assert figures["flow"]["flicker_after"] < figures["duplicate"]["flicker_after"]
    assert figures["flow"]["flicker_after"] < figures["flow"]["flicker_before"]


METHODS = ("flow", "linear", "duplicate")


def test_a_still_measures_without_figures_that_nothing_tells_of(tmp_path: Path) -> None:
    clip = film(tmp_path / "a.mp4", 2)
    assert record(run(clip, tmp_path / "b.mp4", measure="true"))["measured"] == {"left_out": 0}


def test_a_contact_sheet_shows_new_frames_between_given_ones(tmp_path: Path) -> None:
    clip = film(tmp_path / "a.mp4", 9, height=48)
    out = run(clip, tmp_path / "b.mp4", contact_sheet="true")
    sheet = next(frames(tmp_path / "b.sheet.png"))
    assert sheet.shape == (6 * 50 - 2, 5 * 130 - 2, 3)
    assert record(out)["contact_sheet"] == str(tmp_path / "b.sheet.png")
    assert (sheet[:48, :128].float() - next(frames(out)).float()).abs().max() <= 1


def test_a_record_repeats_the_run_bit_for_bit(tmp_path: Path) -> None:
    clip = film(tmp_path / "a.mp4", 4)
    out = run(clip, tmp_path / "b", "between", fps="25")
    with pytest.raises(typer.Exit):
        perform("interpolate", family("between"), {"config": out / "run.toml", "output": str(tmp_path / "c")})
    assert all(torch.equal(a, b) for a, b in zip(pictures(out), pictures(tmp_path / "c"), strict=True))


def test_a_run_that_was_killed_goes_on(tmp_path: Path) -> None:
    clip = film(tmp_path / "a.mp4", 70, 30)
    words = ["interpolate", "between", str(clip), "-o", str(tmp_path / "b.mp4")]
    slow = environment(**TOY, BETWEEN_SECONDS="0.05")
    killed = subprocess.Popen([sys.executable, "-m", "vgen.cli", *words], env=slow, stderr=subprocess.DEVNULL)
    part = tmp_path / "b.mp4.parts" / "part-000000.mp4"
    end = time.monotonic() + 60
    while not part.exists() and time.monotonic() < end:
        time.sleep(0.02)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "b.mp4").exists()
    done = vgen(*words, **TOY)
    assert done.code == 0, done.err
    assert "Going on with the 1 parts" in done.err
    assert "\nread 0/69\n" in done.err
    assert record(tmp_path / "b.mp4")["parts_found"] == 1
    assert record(tmp_path / "b.mp4")["made"] < 69 * 3
    whole = run(clip, tmp_path / "c.mp4", "between")
    assert probe(whole).pts == probe(tmp_path / "b.mp4").pts
    assert all(torch.equal(a, b) for a, b in zip(frames(whole), frames(tmp_path / "b.mp4"), strict=True))
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith("c")) == [
        "a.mp4",
        "b.mp4",
        "b.mp4.toml",
    ]


def test_parts_of_another_run_are_not_used(tmp_path: Path) -> None:
    clip = film(tmp_path / "a.mp4", 4)
    parts = tmp_path / "b.mp4.parts"
    parts.mkdir()
    (parts / "made-by.json").write_text('{"factor": 2}')
    write(parts / "part-000000.mp4", scene(5, hue=1), Fraction(10))
    done = vgen("interpolate", "between", clip, "-o", tmp_path / "b.mp4", **TOY)
    assert done.code == 0, done.err
    assert "are made anew" in done.err
    assert all(
        torch.equal(a, b)
        for a, b in zip(frames(tmp_path / "b.mp4"), frames(run(clip, tmp_path / "c.mp4", "between")), strict=True)
    )


def test_memory_is_flat_in_the_length_of_the_clip(tmp_path: Path) -> None:
    peaks = []
    for count in (60, 600):
        clip = write(tmp_path / f"{count}.mp4", islice(long_scene(), count), Fraction(30))
        out = tmp_path / f"out-{count}.mp4"
        done = vgen("interpolate", "classic", clip, "-o", out, "--method", "linear", "--factor", "2", "--threads", "1")
        assert done.code == 0, done.err
        assert len(probe(out).pts) == 2 * count - 1
        peaks.append(record(out)["peak_memory_mib"]["host"])
    frame = 180 * 320 * 3 / 2**20
    assert peaks[1] - peaks[0] < 0.5 * 540 * frame  # not even half of the frames that are more, of given ones alone
    assert peaks[1] <= 1.1 * peaks[0]


def long_scene() -> Iterator[torch.Tensor]:
    """The same few frames again and again."""
    some = list(scene(10, 180, 320))
    while True:
        yield from [*some, *reversed(some)]


BAD = {
    "one frame": ("one.mp4", {}, "it has one frame"),
    "an image": ("a.png", {}, "it has one frame"),
    "a broken file": ("cut.mp4", {}, "cut.mp4"),
    "not there": ("nothing.mp4", {}, "there is no such file"),
    "latents": ("a.safetensors", {}, "holds latents"),
    "a lower rate": ("a.mp4", {"fps": "8"}, "--fps 8 is no more than the 10"),
    "the same rate": ("a.mp4", {"fps": "10"}, "--fps 10 is no more than the 10"),
    "no rate": ("a.mp4", {"fps": "1/0"}, "'1/0' is not a rate such as"),
    "factor 1": ("a.mp4", {"factor": "1"}, "--factor: 1 is out of range"),
    "both": ("a.mp4", {"factor": "2", "fps": "30"}, "both say how many frames"),
    "a GIF too fast": ("a.mp4", {"factor": "8", "output": "b.gif"}, "the format ends at 50"),
    "to latents": ("a.mp4", {"output": "b.safetensors"}, "would be latents"),
    "to a picture": ("a.mp4", {"output": "b.png"}, "is one picture"),
    "sound": ("sound.mp4", {"output": "b.webm"}, "webm holds no aac"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_told_before_weights_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    clip, flags, what = BAD[name]
    film(tmp_path / "a.mp4", 3)
    film(tmp_path / "one.mp4", 1)
    write(tmp_path / "a.png", scene(1), Fraction(1))
    (tmp_path / "cut.mp4").write_bytes((tmp_path / "a.mp4").read_bytes()[:900])
    (tmp_path / "a.safetensors").write_bytes(b"")
    if clip == "sound.mp4":
        with_sound(tmp_path / "a.mp4", tmp_path / clip)
    monkeypatch.setattr("between_family.load", None)  # it would fail in another way
    output = str(tmp_path / flags.get("output", "b.mp4"))
    with pytest.raises(VgenError, match=what):
        perform("interpolate", family("between"), {**flags, "input": str(tmp_path / clip), "output": output})
    assert not list(tmp_path.glob("b*"))


def test_damage_in_the_middle_is_told_and_leaves_no_output(tmp_path: Path) -> None:
    clip = film(tmp_path / "a.mp4", 40)
    data = bytearray(clip.read_bytes())
    middle = data.find(b"mdat") + (len(data) - data.find(b"mdat")) * 2 // 3
    data[middle : middle + 200] = bytes(200)
    clip.write_bytes(data)
    done = vgen("interpolate", "classic", clip, "-o", tmp_path / "b.mp4", "--method", "linear")
    assert done.code == 1
    assert "damaged" in done.err
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_a_family_without_weights_has_no_checkpoints() -> None:
    done = vgen("interpolate", "classic", "a.mp4", "--checkpoint", "demo")
    assert done.code == 2
    assert "--checkpoint" in done.err
    plan = vgen("interpolate", "classic", __file__, "--dry-run")
    assert plan.code == 0, plan.err
    assert plan.out.startswith("interpolate classic, without weights\n")


def test_families_without_the_verb_answer_with_those_that_have_it() -> None:
    done = vgen("interpolate", "toy", "a.mp4", **TOY)
    assert done.code == 2
    assert "'toy' has no verb 'interpolate'" in done.err
    assert "With 'interpolate': between, classic" in done.err


def test_the_rate_that_a_checkpoint_samples_at_is_not_asked_for() -> None:
    native = Checkpoint("native", defaults={"fps": 7.0, "batch_size": 3})
    told = resolve(family("between"), InterpolateOptions(input="a.mp4"), native)
    assert told.fps is None
