"""train-lora --camera from the command line: clips in, an adapter for each way out, checked, and gone on with."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import filmed
import pytest
import svd_tiny
import torch
from diffusers import StableVideoDiffusionPipeline, UNetSpatioTemporalConditionModel
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from safetensors.torch import load_file
from shell import Done, vgen
from torch import Tensor

from vgen import lora, modelcard
from vgen.lora_source import locate
from vgen.plugins.svd import family
from vgen.tensorfile import header

FLAGS = ("--min-clips", "4", "--check-samples", "2", "--clip-fps", "8", "--rank", "2", "--learning-rate", "1e-2")
WEIGHTS = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that is sampled in two steps."""
    folder = svd_tiny.checkpoint(tmp_path_factory.mktemp("base"))
    (folder / "vgen.json").write_text(json.dumps({"defaults": {"num_inference_steps": 2}}))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("clips")
    for seed in range(3):
        filmed.clip(place / f"left-{seed}.mp4", "pan-left", seed, 4, (32, 32))
    for seed in range(2):
        filmed.clip(place / f"right-{seed}.mp4", "pan-right", seed, 4, (32, 32))
        filmed.clip(place / f"up-{seed}.mp4", "tilt-up", seed, 4, (32, 32))
    filmed.clip(place / "still.mp4", "static", 1, 4, (32, 32))
    return place


def train(base: Path, folder: Path, output: Path, *more: str) -> Done:
    words = ("train-lora", "svd", "--checkpoint", base, "--data", folder, "-o", output, *FLAGS, *more)
    return vgen(*words, cwd=output.parent)


@pytest.fixture(scope="module")
def ran(base: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Done]:
    """A run that trains both ways of a pan, some of whose clips are made."""
    output = tmp_path_factory.mktemp("ran") / "pan"
    done = train(base, folder, output, "--camera", "pan", "--synthesize", "3", "--max-train-steps", "2", "--seed", "4")
    return output, done


def test_an_adapter_for_each_way_that_is_not_yet_good(ran):
    """Two steps on random weights turn no camera: 3, and a word on what to do."""
    output, done = ran
    assert done.code == 3, done.err
    assert done.out.split() == [str(output / "pan-left"), str(output / "pan-right")]
    assert "3 of 8 clips show 'pan-left', 3 more were made" in done.err
    assert "2 of 8 clips show 'pan-right', 3 more were made" in done.err
    assert done.err.count("does not turn the camera as asked.") == 2
    for word in ("pan-left", "pan-right"):
        assert (output / "data" / word / "kept.png").exists()
        told = json.loads((output / word / "vgen.json").read_text())
        camera = told["camera"]
        assert (camera["word"], camera["good"], camera["with"]["of"], camera["without"]["of"]) == (word, False, 2, 2)
        assert told["data"][0]["clips"] == (6 if word == "pan-left" else 5)
        assert told["network"] == "UNetSpatioTemporalConditionModel"
        assert f"Camera '{word}': {camera['with']['show']} of 2 samples show it with the adapter" in done.err


def test_pictures_of_the_check_are_of_clips_that_were_not_trained_on(ran):
    """Those that tilt."""
    output, _ = ran
    assert len(list((output / "data" / "pictures").glob("*.png"))) == 2
    trained = [path for word in ("pan-left", "pan-right") for path in (output / "data" / word).rglob("*.safetensors")]
    records = [json.dumps(header(path).record, default=str) for path in trained]
    assert len(records) == 11
    assert not any("up-" in record for record in records)


def test_a_run_goes_on_and_makes_nothing_twice(ran, base, folder):
    """As if it had been killed before the second way: what is lost is trained again, to the same bits."""
    output, _ = ran
    refused = train(base, folder, output, "--camera", "pan", "--synthesize", "3")
    assert refused.code == 2
    assert "--resume goes on" in refused.err
    data, lost = output / "data", output / "pan-right"
    before = {path: path.stat().st_mtime_ns for path in data.rglob("*") if path.suffix in (".safetensors", ".mp4")}
    lines, weights = (data / "motion.jsonl").read_text(), (lost / WEIGHTS).read_bytes()
    log = output / "pan-left" / "training" / "log.jsonl"
    logged = log.read_text()
    shutil.rmtree(lost)
    done = vgen("train-lora", "svd", "--config", output / "run.toml", "--resume")
    assert done.code == 3, done.err
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert (data / "motion.jsonl").read_text() == lines
    assert log.read_text() == logged
    assert (lost / WEIGHTS).read_bytes() == weights


def test_what_cannot_be_is_refused_before_weights_load(base, folder, tmp_path):
    start = ("train-lora", "svd", "--checkpoint", base, "--data", folder, "-o", tmp_path / "o")
    for words, told in (
        (("--camera", "pan-rigth"), "Did you mean 'pan-right'?"),
        (("--synthesize", "3"), "--synthesize does nothing without --camera."),
        (("--camera", "pan", "--check-samples", "-1"), "out of range"),
    ):
        done = vgen(*start, *words, "--dry-run")
        assert done.code == 2
        assert told in done.err
    done = vgen(*start, "--camera", "zoom-in", "--clip-fps", "8")
    assert done.code == 2
    assert "0 of 8 clips show 'zoom-in'; 16 are needed." in done.err
    assert "Motions found: pan-left 3, pan-right 2, tilt-up 2, static 1." in done.err
    store = tmp_path / "store"
    store.mkdir()
    (store / "store.json").write_text("{}")
    done = vgen(*start[:5], store, *start[6:], "--camera", "pan")
    assert done.code == 2
    assert "is a store of latents" in done.err


def called(network: UNetSpatioTemporalConditionModel) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x, context = (torch.randn(shape, generator=generator) for shape in ((1, 4, 8, 8, 8), (1, 1, 16)))
    with torch.no_grad():
        out: Tensor = network(x, torch.tensor([0.3]), context, torch.tensor([[6.0, 127.0, 0.02]])).sample
    return out


def test_the_adapter_loads_in_plain_diffusers_and_peft_as_documented(ran, base):
    adapter = ran[0] / "pan-left"

    told = json.loads((adapter / "vgen.json").read_text())
    told |= {"license": "mit", "base": {"reference": f"toys/svd@{40 * '0'}"}}
    card = modelcard.card("me/pan-left", "", told, "adapter", "image-to-video", {})
    assert "It is for the motion `pan-left`." in card
    assert "| with the adapter | 0 of 2 |" in card
    assert "vgen sample svd picture.png --checkpoint toys/svd --lora me/pan-left" in card
    python = card.partition("```python\n")[2].partition("```")[0]
    there = {"me/pan-left": str(adapter), "toys/svd": str(base)}
    names: dict[str, Any] = {}
    exec(re.sub("|".join(there), lambda match: there[match[0]], python), names)
    assert isinstance(names["pipe"], StableVideoDiffusionPipeline)
    by_diffusers = names["pipe"].unet

    by_peft = UNetSpatioTemporalConditionModel.from_pretrained(base, subfolder="unet")
    state = {name.removeprefix("unet."): t for name, t in load_file(adapter / WEIGHTS).items()}
    layers = [name.removesuffix(".lora_A.weight") for name in state if "lora_A" in name]
    rank = len(state[f"{layers[0]}.lora_A.weight"])
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=layers), by_peft)
    set_peft_model_state_dict(by_peft, state)

    ours = svd_tiny.model(base)
    plain = called(ours.networks.get("unet"))
    lora.use(family, ours, base, [locate(str(adapter))])
    wanted = called(ours.networks.get("unet"))
    assert not torch.equal(plain, wanted)
    assert torch.equal(called(by_diffusers), wanted)
    assert torch.equal(called(by_peft), wanted)
    assert all("temporal_transformer_blocks" in layer and ".attn1." in layer for layer in layers)
