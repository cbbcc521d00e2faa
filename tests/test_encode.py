"""Encoding: each clip once, at the size that fits, with its texts; bad ones set aside, and no run torn by its end."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from PIL import Image

from vgen import clips
from vgen.encode import Encoded, as_latents, embed_captions, encode, set_aside
from vgen.errors import UsageError, VgenError
from vgen.generate import decode
from vgen.metrics import psnr
from vgen.plugins.cogvideox.model import CogVideoX
from vgen.store import Store
from vgen.video_write import write

SIZE = (9, 32, 32)
BY_THEMSELVES = ["b.mp4", "c.mp4", "d.mp4", "picture.png", "short.mp4"]


@pytest.fixture(scope="module")
def model(folder: Path) -> CogVideoX:
    return tiny.model(folder)


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four good clips, one of them twice, a picture, and three bad files; captions beside some."""
    desk = tmp_path_factory.mktemp("desk")
    draw = torch.Generator().manual_seed(0)
    for name, shape in {
        "a": (12, 40, 48),
        "b": (9, 36, 60),
        "c": (20, 60, 36),
        "d": (17, 32, 32),
        "short": (4, 32, 32),
    }.items():
        small = torch.randint(0, 256, (shape[0], 3, 4, 4), generator=draw).float()
        frames = torch.nn.functional.interpolate(small, shape[1:], mode="bilinear").permute(0, 2, 3, 1)
        write(desk / f"{name}.mp4", frames.to(torch.uint8), Fraction(8), metadata={})
    (desk / "a-again.mp4").write_bytes((desk / "a.mp4").read_bytes())
    (desk / "a.txt").write_text("a red ball rising\nthe red ball is rising\n")
    (desk / "b.txt").write_text("a blue box falling\n")
    (desk / "cut.mp4").write_bytes((desk / "b.mp4").read_bytes()[:900])
    (desk / "text.mp4").write_text("no clip")
    Image.new("RGB", (64, 40), (200, 30, 30)).save(desk / "picture.png")
    return desk


def run(model: CogVideoX, place: Path, inputs: list[str], sizes: Any = (SIZE,), **flags: Any) -> list[Encoded]:
    told = tiny.asked(model.folder, "encode", inputs=inputs, **flags)
    return list(encode(model, tiny.opened(model, place), clips.discover(inputs), list(sizes), told, tiny.ignore))


def test_clips_of_a_folder(model: CogVideoX, desk: Path, tmp_path: Path) -> None:
    told = [(9, 32, 48), (9, 48, 32), (9, 32, 32), (1, 32, 48)]
    results = run(model, tmp_path / "s", [str(desk)], told, batch_size=2, check=True)
    by = {Path(one.source).name: one for one in results}
    status = {name: one.status for name, one in by.items()}
    assert {name for name, told in status.items() if told == "set aside"} == {"cut.mp4", "text.mp4"}
    assert {status.pop("a.mp4"), status.pop("a-again.mp4")} == {"encoded", "there already"}
    assert sorted(name for name, told in status.items() if told == "encoded") == BY_THEMSELVES
    made = Store.open(tmp_path / "s")
    assert len(made) == 6
    shapes = {
        name: tuple(made.record(by[name].key)["tensors"]["mean"]["shape"]) for name in ("b.mp4", "c.mp4", "d.mp4")
    }
    assert shapes == {"b.mp4": (4, 3, 8, 12), "c.mp4": (4, 3, 12, 8), "d.mp4": (4, 3, 8, 8)}
    assert made.record(by["picture.png"].key)["tensors"]["mean"]["shape"] == [4, 1, 8, 12]
    record = made.record(by["b.mp4"].key)
    assert (record["captions"], record["orig_hw"], record["fps"]) == (["a blue box falling"], [36, 60], "8")
    assert record["check"]["psnr"] == pytest.approx(by["b.mp4"].psnr, abs=1e-3)
    assert {Path(one["source"]).name for one in set_aside(made.folder)} == {"cut.mp4", "text.mp4"}
    assert all(one["reason"] for one in set_aside(made.folder))


def test_what_is_stored_is_what_the_autoencoder_gives(model: CogVideoX, desk: Path, tmp_path: Path) -> None:
    (result,) = run(model, tmp_path / "s", [str(desk / "b.mp4")], check=True)
    pixels = clips.load_file(desk / "b.mp4", *SIZE, fps=8)[0]
    streams, _ = Store.open(tmp_path / "s").get(result.key)
    expected = model.encode(pixels[None])
    assert all(torch.equal(streams[name], expected[name][0]) for name in ("mean", "logvar"))
    back = model.decode({"latents": expected["mean"]})[0]
    assert result.psnr == pytest.approx(psnr(back, pixels))
    assert decode(model, as_latents({name: s[None] for name, s in streams.items()}))[0].shape == (9, 32, 32, 3)


def test_a_second_run_encodes_nothing(model: CogVideoX, desk: Path, tmp_path: Path) -> None:
    first = run(model, tmp_path / "s", [str(desk), "world:3"])
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "s").rglob("*") if path.is_file()}
    again = run(model, tmp_path / "s", [str(desk), "world:3"])
    assert {one.status for one in again} == {"there already", "set aside"}
    assert {one.key for one in again} == {one.key for one in first}
    assert {path: path.stat().st_mtime_ns for path in files if path.exists()} == files
    anew = run(model, tmp_path / "s", ["world:3"], overwrite=True)
    assert {one.status for one in anew} == {"encoded"}
    assert len(Store.open(tmp_path / "s")) == len({one.key for one in first if one.key})


def test_reading_ahead_keeps_the_order_and_every_item(model: CogVideoX, tmp_path: Path) -> None:
    for count in (1, 2, 3, 7):
        results = run(model, tmp_path / f"s{count}", [f"world:{count}"], batch_size=1)
        assert [one.source for one in results] == [f"world:0/{i}" for i in range(count)]


def test_the_batch_does_not_matter(model: CogVideoX, tmp_path: Path) -> None:
    run(model, tmp_path / "one", ["world:5"], batch_size=1)
    run(model, tmp_path / "three", ["world:5"], batch_size=3)
    one, three = (Store.open(tmp_path / name) for name in ("one", "three"))
    keys = one.keys()
    assert keys == three.keys()
    for key in keys:
        torch.testing.assert_close(one.get(key)[0]["mean"], three.get(key)[0]["mean"], atol=1e-5, rtol=1e-4)


def test_the_world_brings_its_mask(model: CogVideoX, tmp_path: Path) -> None:
    (result,) = run(model, tmp_path / "s", ["world:1"])
    streams, record = Store.open(tmp_path / "s").get(result.key)
    assert streams["mask"].shape == (1, 3, 8, 8)
    assert 0 <= streams["mask"].min() < streams["mask"].max() <= 1
    assert len(record["captions"]) == 1


@pytest.mark.parametrize(
    ("posterior", "kept"), [("moments", {"mean", "logvar"}), ("mean", {"mean"}), ("sample", {"latents"})]
)
def test_what_of_the_posterior_is_kept(
    model: CogVideoX, desk: Path, tmp_path: Path, posterior: str, kept: set[str]
) -> None:
    inputs = [str(desk / "b.mp4")]
    (result,) = run(model, tmp_path / "s", inputs, posterior=posterior)
    made = Store.open(tmp_path / "s")
    assert made.get(result.key)[0].keys() == kept
    assert made.record(result.key)["posterior"] == posterior
    (other,) = run(model, tmp_path / "s", inputs, posterior=posterior, seed=9)
    assert (other.status == "encoded") == (posterior == "sample")
    assert len({run(model, tmp_path / "s", inputs, posterior=p)[0].key for p in ("moments", "mean", "sample")}) == 3


def test_texts_are_embedded_once_and_the_empty_one_too(folder: Path, tmp_path: Path) -> None:
    model = tiny.model(folder)
    made, items = tiny.opened(model, tmp_path / "s"), clips.discover(["world:4"])
    embed_captions(model, made, items, tiny.ignore)
    texts = {"", *(caption for item in items for caption in item.captions)}
    assert {text for text in texts if made.has_text(text)} == texts
    assert len(list((tmp_path / "s" / "texts").rglob("*.safetensors"))) == len(texts)
    assert made.text("")["text"].shape == (8, 16)
    assert not model.networks.loaded  # the encoder has left
    model.networks.classes = {}  # no network can load
    embed_captions(model, made, items, tiny.ignore)


def test_the_store_of_another_autoencoder_is_refused(model: CogVideoX, tmp_path: Path) -> None:
    run(model, tmp_path / "s", ["world:1"])
    other = tiny.model(tiny.checkpoint(tmp_path / "c", "5b", seed=1))
    with pytest.raises(VgenError) as caught:
        tiny.opened(other, tmp_path / "s")
    assert model.space.id in str(caught.value)
    assert other.space.id in str(caught.value)
    assert model.space.id != other.space.id


def test_latents_that_are_not_finite_stop_the_run(folder: Path, tmp_path: Path) -> None:
    model = tiny.model(folder)
    with torch.no_grad():
        model.networks.get("vae").encoder.conv_in.conv.weight.fill_(torch.nan)
    with pytest.raises(VgenError, match="NaN or infinity"):
        run(model, tmp_path / "s", ["world:2"])
    assert len(Store.open(tmp_path / "s")) == 0


@pytest.mark.parametrize("bucket", ["9x32", "9x32xten", "10x32x32", "9x30x32"])
def test_buckets_are_checked(folder: Path, bucket: str) -> None:
    with pytest.raises(UsageError):
        tiny.asked(folder, "encode", inputs=["world:1"], bucket=[bucket])
    tiny.asked(folder, "encode", inputs=["world:1"], bucket=["9x32x32", "1x64x32"])


# Runs that end in the middle


def work(folder: Path, place: Path) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        run(tiny.model(folder), place, ["world:40"], batch_size=2)
    except KeyboardInterrupt:
        os._exit(130)
    os._exit(0)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_was_ended_goes_on_to_the_same_store(
    model: CogVideoX, folder: Path, tmp_path: Path, how: int
) -> None:
    run(model, tmp_path / "whole", ["world:40"], batch_size=2)
    place = tmp_path / "torn"
    for _ in range(2):
        before = len(list(place.rglob("*.safetensors")))
        process = multiprocessing.get_context("fork").Process(target=work, args=(folder, place))
        process.start()
        while process.is_alive() and len(list(place.rglob("*.safetensors"))) < before + 5:
            time.sleep(0.01)
        assert process.pid
        os.kill(process.pid, how)
        process.join(60)
        assert process.exitcode in (-signal.SIGKILL, 130)
        assert Store.open(place).verify() == {}
    there = len(Store.open(place))
    assert 0 < there < 40
    results = run(model, place, ["world:40"], batch_size=2)
    assert sum(one.status == "there already" for one in results) == there
    torn, whole = Store.open(place), Store.open(tmp_path / "whole")
    keys = whole.keys()
    assert torn.keys() == keys
    for key in keys:  # a clip may have had another neighbour in its batch
        torch.testing.assert_close(torn.get(key)[0], whole.get(key)[0], atol=1e-5, rtol=1e-4)
        assert torn.record(key)["captions"] == whole.record(key)["captions"]


@pytest.mark.parametrize("name", ["b.mp4", "picture.png"])
def test_what_was_seen_of_a_file_is_not_looked_up_again(desk: Path, name: str) -> None:
    (item,) = clips.discover([str(desk / name)])
    seen = clips.look(item)._replace(sha256="told")
    loaded = clips.load(item, 1, 32, 32, seen=seen)
    assert loaded.record["source"]["sha256"] == "told"
    assert torch.equal(loaded.pixels, clips.load(item, 1, 32, 32).pixels)
