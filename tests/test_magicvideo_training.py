"""Training MagicVideo: what each part learns and what stays, conditions, adapters, less memory for the same numbers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import magicvideo_tiny
import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch import Tensor

from vgen import clips, lora, lora_source
from vgen.errors import UsageError
from vgen.finetune import batches, finetune
from vgen.generate import generate
from vgen.lora import train_lora
from vgen.plugins.magicvideo import describe, family

FAST: dict[str, Any] = {"train_batch_size": 2, "learning_rate": 3e-3, "lr_scheduler": "constant", "max_train_steps": 2}
NETWORKS = ("unet", "temporal", "interpolator", "interpolator_temporal", "video_decoder", "vae")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return magicvideo_tiny.checkpoint(tmp_path_factory.mktemp("magicvideo") / "c")


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return magicvideo_tiny.image(tmp_path_factory.mktemp("magicvideo") / "image")


@pytest.fixture(scope="module")
def data(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stored(folder, tmp_path_factory.mktemp("data") / "d", 4)


def stored(folder: Path, place: Path, frames: int, *, captions: bool = True) -> Path:
    items = [item if captions else replace(item, captions=()) for item in clips.discover(["world:4"])]
    told = magicvideo_tiny.asked(folder, "encode", inputs=["world:4"])
    tiny.fill(magicvideo_tiny.model(folder), place, told, (items, (frames, 32, 32)))
    return place


def run(folder: Path, output: Path, data: Path | str, part: str = "text", **flags: Any) -> list[float]:
    """Train two steps, and give the loss of each."""
    told = {**FAST, "part": part, "data": [str(data)], **flags}
    options = magicvideo_tiny.asked(folder, "finetune", **told, output=output)
    finetune(family, magicvideo_tiny.model(folder), folder, options, tiny.CPU)
    lines = (output / "training" / "log.jsonl").read_text().splitlines()
    return [step["loss"] for step in map(json.loads, lines) if "loss" in step]


def weights(folder: Path, name: str) -> dict[str, Tensor]:
    return load_file(folder / name / "diffusion_pytorch_model.safetensors")


def changed(before: Path, after: Path) -> set[str]:
    """The networks of a checkpoint that are new or have other weights."""

    def same(name: str) -> bool:
        a, b = weights(before, name), weights(after, name)
        return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)

    there = [name for name in NETWORKS if (after / name).is_dir()]
    return {name for name in there if not (before / name).is_dir() or not same(name)}


# --- what trains ----------------------------------------------------------------------------------------------------


def test_only_what_a_part_says_is_trained(folder, data, tmp_path):
    run(folder, tmp_path / "text", data)
    assert changed(folder, tmp_path / "text") == {"temporal"}
    run(folder, tmp_path / "whole", data, image_layers=True)
    assert changed(folder, tmp_path / "whole") == {"temporal", "unet"}
    five = stored(folder, tmp_path / "five", 5)
    run(folder, tmp_path / "between", five, "interpolate")
    assert changed(folder, tmp_path / "between") == {"interpolator", "interpolator_temporal"}
    small = {"num_frames": 3, "height": 32, "width": 32, "flicker_weight": 1.0}
    run(folder, tmp_path / "decoder", "world:4", "decoder", **small)
    assert changed(folder, tmp_path / "decoder") == {"video_decoder"}
    assert magicvideo_tiny.model(tmp_path / "decoder").space == magicvideo_tiny.model(folder).space


def test_an_image_model_becomes_one_of_clips_part_by_part(start, tmp_path):
    """First on clips without captions, then with them, then the other networks; each step starts from the last."""
    bare = stored(start, tmp_path / "bare", 4, captions=False)
    run(start, tmp_path / "1", bare, "unsupervised", clip_frames=4, mask="post")
    plan = json.loads((tmp_path / "1" / "temporal" / "config.json").read_text())["plan"]
    assert [group["kind"] for group in plan] == ["adaptor", "attention", "told"]
    assert (plan[0]["frames"], plan[1]["mask"]) == (4, "post")
    with pytest.raises(UsageError, match="have no caption"):
        run(tmp_path / "1", tmp_path / "x", bare)
    run(tmp_path / "1", tmp_path / "2", stored(start, tmp_path / "d", 4))
    assert changed(tmp_path / "1", tmp_path / "2") == {"temporal"}
    run(tmp_path / "2", tmp_path / "3", stored(start, tmp_path / "five", 5), "interpolate", adaptor="convolution")
    assert changed(tmp_path / "2", tmp_path / "3") == {"interpolator", "interpolator_temporal"}
    run(tmp_path / "3", tmp_path / "4", "world:4", "decoder", num_frames=3, height=32, width=32)
    assert changed(start, tmp_path / "4") == {*NETWORKS} - {"unet", "vae"}
    assert describe(tmp_path / "4").facts["parts"] == ("temporal", "interpolator", "video_decoder")
    options = magicvideo_tiny.asked(tmp_path / "4", num_inference_steps=1)
    assert generate(magicvideo_tiny.model(tmp_path / "4"), options, tiny.ignore)["latents"].shape == (1, 4, 4, 8, 8)


def test_a_new_decoder_is_the_image_decoder(start):
    options = magicvideo_tiny.asked(start, "finetune", part="decoder")
    model = magicvideo_tiny.model(start)
    part, z = model.part("decoder", options), magicvideo_tiny.noise(1, 4, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(part.modules["video_decoder"].eval()(z), model.decode({"latents": z}))


# --- conditions and losses ------------------------------------------------------------------------------------------


def test_the_unsupervised_phase_is_told_of_one_frame_in_place_of_the_caption(folder, data):
    model = magicvideo_tiny.model(folder)
    made = {}
    for dropout in (0.0, 1.0):
        options = magicvideo_tiny.asked(
            folder, "finetune", part="unsupervised", data=[str(data)], train_batch_size=4, caption_dropout=dropout
        )
        batch = batches(family, model, options)(0)
        made[dropout] = model.part("unsupervised", options).told(batch, torch.Generator().manual_seed(0))
    stored_, found = batch["embedding"], made[0.0]["text"]
    assert found.shape == (4, 1, 16)
    pairs = zip(found, stored_, strict=True)
    which = [next(k for k in range(3) if torch.equal(one[0], some[k])) for one, some in pairs]
    assert len(set(which)) > 1
    assert made[1.0]["text"].abs().sum() == 0
    assert made[0.0]["fps"].tolist() == [8.0] * 4


def test_the_loss_is_that_of_noise_predicted(folder, data):
    """E |e - eps(a x + s e, t, text, fps)|^2, written out."""
    model = magicvideo_tiny.model(folder)
    options = magicvideo_tiny.asked(folder, "finetune", data=[str(data)], train_batch_size=2)
    batch, part = batches(family, model, options)(0), model.part("text", options)
    with torch.no_grad():
        ours = part.loss(batch, torch.Generator().manual_seed(5))
        generator = torch.Generator().manual_seed(5)
        strata = torch.randperm(2, generator=generator)
        t = part.process.training_time((strata + torch.rand(2, generator=generator, dtype=torch.float64)) / 2)
        e = torch.randn(batch["latents"].shape, generator=generator)
        a, s = (level.float().view(-1, 1, 1, 1, 1) for level in part.process.level(t))
        times = part.process.network_time(t)
        out = part.network(a * batch["latents"] + s * e, times, batch["text"], fps=batch["fps"][:, 0])
    assert ours.item() == pytest.approx((out - e).square().mean().item(), rel=1e-4)


def test_the_loss_of_the_decoder_counts_what_changes_between_frames(folder):
    told = {"part": "decoder", "num_frames": 3, "height": 16, "width": 16}
    pixels, values = magicvideo_tiny.noise(1, 3, 3, 16, 16), {}
    for weight in (0.0, 2.0):
        part = magicvideo_tiny.model(folder).part(
            "decoder", magicvideo_tiny.asked(folder, "finetune", flicker_weight=weight, **told)
        )
        with torch.no_grad():
            values[weight] = part.loss({"pixels": pixels}, torch.Generator().manual_seed(1)).item()
            streams = part.encode(part.vae, pixels)
            draw = torch.randn(streams["mean"].shape, generator=torch.Generator().manual_seed(1))
            made = part.decode(part.vae, streams["mean"] + torch.exp(0.5 * streams["logvar"]) * draw)
    between = (made - pixels)[:, :, 1:] - (made - pixels)[:, :, :-1]
    assert values[2.0] - values[0.0] == pytest.approx(2 * between.abs().sum().item() / pixels.numel(), rel=1e-3)


def test_less_memory_and_averages_leave_the_numbers_as_they_are(folder, data, tmp_path):
    plain = run(folder, tmp_path / "1", data, image_layers=True)
    again = run(folder, tmp_path / "2", data, image_layers=True, gradient_checkpointing=True, ema_decay=0.9)
    assert plain == again
    frozen = run(folder, tmp_path / "3", data), run(folder, tmp_path / "4", data, gradient_checkpointing=True)
    assert frozen[0] == frozen[1]


def test_clips_that_carry_too_little_are_refused(folder, data, tmp_path):
    with pytest.raises(UsageError, match="clips of 5 frames, not 4"):
        run(folder, tmp_path / "x", data, "interpolate")


# --- adapters -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [[], ["conv1"]])
def test_an_adapter_runs_as_it_was_trained(folder, data, tmp_path, targets):
    """Also on a convolution that a layer in time hangs on: that comes after the adapter, in both."""
    told = {**FAST, "rank": 2, "data": [str(data)], "target_modules": targets, "learning_rate": 0.05}
    options = magicvideo_tiny.asked(folder, "train-lora", **told, output=tmp_path / "l")
    trained = magicvideo_tiny.model(folder)
    train_lora(family, trained, folder, options, tiny.CPU)
    used = magicvideo_tiny.model(folder)
    lora.use(family, used, folder, [lora_source.locate(str(tmp_path / "l"))])
    sample = magicvideo_tiny.asked(folder)
    x, t = magicvideo_tiny.noise(1, 4, 4, 8, 8), torch.tensor([500.0])
    cond = {"text": magicvideo_tiny.noise(1, 16, 16), "fps": torch.tensor([8.0])}
    with torch.no_grad():
        plain, one, two = (
            some.denoiser("unet", sample).predict(x, t, cond) for some in (magicvideo_tiny.model(folder), trained, used)
        )
    assert not torch.allclose(one, plain, atol=1e-3)
    torch.testing.assert_close(one, two, atol=1e-5, rtol=0)
