"""Stable Video Diffusion as shells use it: what cannot be is refused before weights load; pictures and clips of all
shapes; a sample that is interrupted."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import barcode
import numpy as np
import pytest
import svd_tiny
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from shell import Done, environment, run, vgen

from vgen.adapter_file import ABOUT
from vgen.clips import load_file as read_clip
from vgen.plugins.sd import family as sd

MANY = """
import sys
from vgen.cli import main
lines = sys.argv[1:]
for line in lines:
    sys.argv[1:] = line.split("|")
    code = 0
    try:
        main()
    except SystemExit as end:
        code = end.code or 0
    for stream in (sys.stdout, sys.stderr):
        print(f"\\nended with {code}", file=stream, flush=True)
"""
SMALL = "--seed|3|--num-inference-steps|1"


def several(place: Path, *lines: str) -> list[Done]:
    """What commands left behind that ran in one process, in turn; their words are parted by |."""
    done = run([sys.executable, "-c", MANY, *lines], cwd=place)
    assert done.code == 0, done.err
    found: list[Done] = []
    out, err = done.out, done.err
    for _ in lines:
        said, _, out = out.partition("\nended with ")
        told, _, err = err.partition("\nended with ")
        code, _, out = out.partition("\n")
        found.append(Done(int(code), said, told))
        err = err.partition("\n")[2]
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return svd_tiny.checkpoint(tmp_path_factory.mktemp("svd") / "c")


@pytest.fixture(scope="module")
def hollow(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose weights cannot be loaded: a command that gets so far as to try says so."""
    place = tmp_path_factory.mktemp("hollow") / "c"
    shutil.copytree(folder, place)
    for path in place.rglob("*.safetensors"):
        save_file({"nothing": torch.zeros(1)}, path)
    return place


def pixels(place: Path) -> list[bytes]:
    """The frames of a folder of PNGs."""
    return [np.asarray(Image.open(path)).tobytes() for path in sorted(place.glob("frame_*.png"))]


# --- refused before weights load ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("sample svdd x.png", "Did you mean 'svd'?"),
        ("sample svd x.png --num-frames 0", "at least 1"),
        ("sample svd x.png --motion-bucket-id 300", "0 to 255"),
        ("sample svd x.png --guidance-profile triangle", "Did you mean 'triangular'?"),
        ("sample svd x.png --height 52", "--height 52 is not a multiple of 8 from 8.\n  Nearest: 48 or 56."),
        ("sample svd none.png", "none.png: there is no such file or folder."),
        ("sample svd x.png --temporal-image none.png", "--temporal-image none.png: there is no such file"),
        ("sample svd x.png --lora ./none", "--lora ./none: there is no such file or folder."),
        ("sample svd x.png --checkpoint svd.img2vid-xl", "Did you mean 'img2vid-xt'?"),
        ("sample svd x.png --checkpoint SD", "is a checkpoint of 'sd', not of 'svd'."),
        ("sample svd x.png --checkpoint PLAIN", "its U-Net is a UNet2DConditionModel."),
        ("sample svd x.png --checkpoint COG", "is not a Stable Video Diffusion checkpoint: unet/config.json cannot be"),
        ("finetune svd --data x.png --part i2w", "Did you mean 'i2v'?"),
        ("train-lora svd --data x.png --part interpolate", "'interpolate'"),
        ("train-lora svd --data x.png --camera pann", "Did you mean 'pan'?"),
        ("train-lora svd --data x.png --camera pan-lefft", "Did you mean 'pan-left'?"),
    ],
)
def test_what_cannot_be_is_refused_at_once(hollow, elsewhere, line, says):
    named = {"SD": str(sd.demo), **{name: str(elsewhere / name) for name in ("PLAIN", "COG")}}
    words = [named.get(word, word) for word in line.split()]
    on = () if "--checkpoint" in words else ("--checkpoint", hollow)
    done = vgen(*words, *on, "-o", elsewhere / "made", cwd=elsewhere)
    assert done.out == ""
    assert says in done.err, done.err
    assert done.code == (1 if "is not a Stable" in done.err else 2)
    assert not (elsewhere / "made").exists()


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a picture, and checkpoints of other families that no vgen.json tells of."""
    place = tmp_path_factory.mktemp("elsewhere")
    svd_tiny.picture(place / "x.png")
    assert sd.demo is not None
    shutil.copytree(sd.demo, place / "PLAIN", ignore=shutil.ignore_patterns("vgen.json"))
    tiny.checkpoint(place / "COG", "2b")
    return place


def test_what_is_no_picture_is_refused_before_weights_load(hollow, tmp_path):
    whole = svd_tiny.picture(tmp_path / "whole.png", size=(64, 64)).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    for name in ("words.txt", "words.jpg"):
        (tmp_path / name).write_text("A red ball on a dark background.")
    (tmp_path / "empty.png").touch()
    (tmp_path / "folder").mkdir()
    bad = ("cut.png", "words.txt", "words.jpg", "empty.png", "folder")
    start = f"sample|svd|--checkpoint|{hollow}|{SMALL}|-o|made"
    lines = [f"{start}|{name}" for name in bad] + [f"{start}|whole.png|--temporal-image|cut.png", f"{start}|whole.png"]
    *refused, tried = several(tmp_path, *lines)
    assert "The weights of 'image_encoder'" in tried.err
    for name, done in zip((*bad, "cut.png"), refused, strict=True):
        assert (done.code, done.out.strip()) == (1, "")
        assert f"Error: {name}: " in done.err
        assert "The weights of" not in done.err
    assert not (tmp_path / "made").exists()


def test_adapters_of_others_are_refused_before_weights_load(folder, hollow, tmp_path):
    svd_tiny.picture(tmp_path / "x.png")
    about = {"family": "svd", "part": "unet", "base": {"reference": "svd.img2vid", "hash": "sha256:" + "0" * 64}}
    for name, told in {
        "other.safetensors": {**about, "family": "cogvideox", "part": "transformer"},
        "base.safetensors": about,
    }.items():
        save_file({"unet.x.lora_A.weight": torch.zeros(1, 1)}, tmp_path / name, {ABOUT: json.dumps(told)})
    (tmp_path / "torn.safetensors").write_bytes(b"torn")
    start = f"sample|svd|x.png|--checkpoint|{hollow}|{SMALL}|-o|made|--lora"
    names = ("other", "base", "torn")
    other, base, torn = several(tmp_path, *(f"{start}|{name}.safetensors:0.5" for name in names))
    assert other.code == base.code == 2
    assert "other.safetensors is an adapter of 'cogvideox' (transformer), not of 'svd'." in other.err
    assert "base.safetensors is an adapter of svd.img2vid, whose weights are not those of c." in base.err
    assert "Run it on its base: --checkpoint svd.img2vid" in base.err
    assert torn.code == 1
    assert "torn.safetensors" in torn.err
    for done in (other, base, torn):
        assert "The weights of" not in done.err
    assert not (tmp_path / "made").exists()


# --- pictures and clips of all shapes -------------------------------------------------------------------------------


def test_pictures_of_all_shapes(folder, tmp_path):
    """Tall ones are cut, and it is told when much of them is; photos are turned upright; a video gives its first."""
    tall = Image.fromarray(barcode.picture(5, 96, 32))
    tall.save(tmp_path / "tall.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    tall.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    Image.fromarray(barcode.picture(5, 40, 33)).save(tmp_path / "odd.png")
    clip = barcode.make(tmp_path / "clip.mp4", 3, size=(64, 64))
    first = read_clip(clip, 1, 64, 64)[0][:, 0].add(1).mul(127.5).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(np.ascontiguousarray(first)).save(tmp_path / "first.png")
    names = ("tall.png", "turned.png", "odd.png", "clip.mp4", "first.png")
    start = f"sample|svd|--checkpoint|{folder}|{SMALL}|-n|2"
    lines = [f"{start}|{name}|-o|{name.partition('.')[0]}" for name in names]
    done = several(tmp_path, *lines, f"{start}|tall.png|--height|56|--width|16|-o|fits")
    assert [one.code for one in done] == [0] * 6
    told = [next((line for line in one.err.splitlines() if "cut away" in line), "") for one in done]
    assert told[0].endswith(
        "67% of tall.png is outside the frame of 32x32 and is cut away; --height 56 --width 16 cuts less."
    )
    assert told[1] == told[0].replace("tall.png", "turned.png")
    assert told[2:] == ["", "", "", ""]
    tall_, turned, _, video, picture = (pixels(tmp_path / name.partition(".")[0]) for name in names)
    assert len(tall_) == 2
    assert tall_ == turned
    assert video == picture != tall_


def test_clips_of_all_shapes_are_encoded_and_too_short_ones_set_aside(folder, tmp_path):
    clips = tmp_path / "clips"
    clips.mkdir()
    exact = {"pix_fmt": "yuv444p", "options": {"qp": "0"}}  # nothing is lost
    barcode.make(clips / "upright.mp4", 4, size=(128, 48), **exact)
    barcode.make(clips / "phone.mp4", 4, size=(48, 128), rotation=90, **exact)
    barcode.make(clips / "sideways.mp4", 4, size=(48, 128), **exact)
    barcode.make(clips / "odd.mp4", 5, size=(50, 70))
    barcode.make(clips / "short.mp4", 1)
    done = vgen("encode", "svd", clips, "--checkpoint", folder, "--fps", "10", "-o", tmp_path / "d", "--json")
    assert done.code == 3, done.err
    told = {Path(one["source"]).name: one for one in map(json.loads, done.out.splitlines()) if "source" in one}
    assert {name for name, one in told.items() if one["status"] == "set aside"} == {"short.mp4"}
    assert "short.mp4: it has 1 frame" in done.err
    stored = {path.stem: load_file(path) for path in (tmp_path / "d").rglob("*.safetensors")}
    found = {name: stored[one["key"]] for name, one in told.items() if one["key"]}
    assert found["odd.mp4"]["mean"].shape == (4, 4, 8, 8)
    for stream in ("mean", "conditioning", "embedding"):
        assert torch.allclose(found["phone.mp4"][stream], found["upright.mp4"][stream], atol=1e-5)
        assert not torch.allclose(found["phone.mp4"][stream], found["sideways.mp4"][stream], atol=1e-2)


# --- interrupted ----------------------------------------------------------------------------------------------------


def test_an_interrupted_sample_leaves_what_was_there(folder, tmp_path):
    """A real signal, in the middle of the sampling, to a run that is to replace a clip."""
    svd_tiny.picture(tmp_path / "x.png")
    words = ["sample", "svd", "x.png", "--checkpoint", folder, "--num-inference-steps", "5000", "-o", "x.mp4"]
    (tmp_path / "x.mp4").write_bytes(b"an older clip")
    program = [sys.executable, "-m", "vgen.cli", *map(str, words), "--overwrite"]
    with subprocess.Popen(program, env=environment(), cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        while "denoise" not in (line := process.stderr.readline()):
            assert line
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert "Interrupted." in process.stderr.read()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.mp4", "x.png"]
    assert (tmp_path / "x.mp4").read_bytes() == b"an older clip"
