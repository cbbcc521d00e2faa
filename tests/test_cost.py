"""What a clip costs: counted without weights it is what a real run computes; the paper's table; memory; refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import cmd_tiny
import pytest
import svd_tiny
import tiny
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel, UNet3DConditionModel
from shell import vgen
from torch import nn

from vgen import cost
from vgen.commands.prepare import perform
from vgen.cost import Meter, counted, empty, report
from vgen.errors import UsageError, VgenError
from vgen.family import Family, family, resolve
from vgen.generate import decode, generate
from vgen.machine import Machine
from vgen.plugins.cmd.factored import FactoredAutoencoder
from vgen.plugins.cmd.transformer import MotionTransformer

META = Machine(torch.device("meta"), torch.float32)


def bill(card: Family, folder: Path, options: Any, machine: Machine = META) -> dict[str, Any]:
    assert card.describe is not None
    model = card.loader()(folder, card.describe(folder), machine)
    return report(model.cost(options), offload=False)


UNSEEN = {"cogvideox": ["vae"]}  # on the CPU it computes convolutions in a library's own form, which is not counted


def computed(card: Family, folder: Path, options: Any) -> float:
    """Floating-point operations of a real run, less those of the text encoder and what is unseen."""
    assert card.describe is not None
    model = card.loader()(folder, card.describe(folder), tiny.CPU)
    generate(model, options, tiny.ignore)  # texts are then on the disk
    with torch.no_grad(), Meter() as meter:
        streams = generate(model, options, tiny.ignore)
        if card.name not in UNSEEN:
            decode(model, streams)
    return meter.count.flops


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("c")
    made = {"cmd": cmd_tiny.checkpoint(place / "cmd"), "svd": svd_tiny.checkpoint(place / "svd")}
    return {**made, "cogvideox": tiny.checkpoint(place / "cogvideox"), "sd": cmd_tiny.image(place / "sd")}


FEW: dict[str, dict[str, Any]] = {
    "cmd": {"num_frames": 4},
    "sd": {"num_inference_steps": 3, "height": 32, "width": 32},
    "cogvideox": {"num_inference_steps": 3, "num_videos_per_prompt": 2},
    "svd": {"prompt": "", "num_inference_steps": 2},
}


@pytest.mark.parametrize("name", FEW)
def test_what_is_counted_without_weights_is_what_a_run_computes(folders, tmp_path, name):
    card, folder, flags = family(name), folders[name], dict(FEW[name])
    if name == "svd":
        flags["image"] = svd_tiny.picture(tmp_path / "p.png")
    assert card.describe is not None
    given = {"prompt": "a red ball rising", "seed": 3, **flags}
    options = resolve(card, card.verbs["sample"](**given), card.describe(folder))
    told = bill(card, folder, options)
    left = ["text_encoder", *UNSEEN.get(name, [])]
    flops = [part["calls"] * part["flops_true"] for part in told["parts"] if part["name"] not in left]
    assert sum(flops) == pytest.approx(computed(card, folder, options), rel=1e-3)
    streams = generate(card.loader()(folder, card.describe(folder), tiny.CPU), options, tiny.ignore)
    assert told["latents"]["streams"] == {stream: list(s.shape[1:]) for stream, s in streams.items()}
    for part in told["parts"]:
        assert 0 < part["macs_fvcore_like"] * 2 * part["passes"] <= part["flops_true"]
        assert part["peak_memory"] > part["weights_memory"] > 0


def test_a_picture_costs_no_motion(folders):
    folder = folders["cmd"]
    names = {k: [p["name"] for p in bill(family("cmd"), folder, cmd_tiny.asked(folder, **{k: v}))["parts"]]
             for k, v in {"content_only": True, "content_image": Path("x.png")}.items()}  # fmt: skip
    assert names == {
        "content_only": ["text_encoder", "content", "vae"],
        "content_image": ["text_encoder", "motion", "autoencoder", "vae"],
    }


# --- counting -------------------------------------------------------------------------------------------------------


def test_products_of_activations_are_told_apart():
    """A linear layer is one, however torch computes it; attention is both."""
    layer = nn.Linear(8, 16)
    seen = torch.randn(2, 8, 5).transpose(1, 2)
    assert counted(lambda: layer(seen), layer).plain == 2 * 5 * 8 * 16
    q = torch.randn(1, 2, 5, 8)
    attention = counted(lambda: nn.functional.scaled_dot_product_attention(q, q, q))
    assert (attention.plain, attention.products) == (0, 2 * 2 * 5 * 5 * 8)
    both = counted(lambda: torch.bmm(q[0], q[0].mT))
    assert (both.plain, both.products, both.flops) == (0, 2 * 5 * 5 * 8, 2 * 2 * 5 * 5 * 8)


def test_memory_is_what_lives_at_once():
    x = empty(1000)

    def chain() -> None:
        y = x
        for _ in range(5):
            y = y + 1

    assert counted(chain).bytes == 2 * 4000
    assert counted(lambda: [x + k for k in range(5)]).bytes == 5 * 4000


# --- the paper's table ----------------------------------------------------------------------------------------------

SD21: dict[str, Any] = {
    "sample_size": 64,
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}
VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}
TEXT = {  # OpenCLIP-H without its last layer, as Stable Diffusion 2.1 has it
    "model_type": "clip_text_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "max_position_embeddings": 77,
    "hidden_act": "gelu",
    "vocab_size": 49408,
}


def paper(folder: Path) -> Path:
    """The configurations of the paper's checkpoint, and no weights."""
    with torch.device("meta"):
        UNet2DConditionModel(**SD21).save_config(folder / "unet")
        AutoencoderKL(**VAE).save_config(folder / "vae")
        FactoredAutoencoder().save_config(folder / "autoencoder")
        MotionTransformer().save_config(folder / "motion")
    (folder / "text_encoder").mkdir()
    (folder / "text_encoder" / "config.json").write_text(json.dumps(TEXT))
    for name in ("unet", "vae", "autoencoder", "text_encoder", "motion"):
        (folder / name / "none.safetensors").write_bytes(b"\x02" + bytes(7) + b"{}")
    demo = family("sd").demo
    assert demo is not None
    for name in ("tokenizer", "scheduler"):
        shutil.copytree(demo / name, folder / name)
    (folder / "model_index.json").write_text(json.dumps({**cmd_tiny.INDEX, **cmd_tiny.TEXT}))
    return folder


def test_the_papers_table(tmp_path):
    """50 + 50 steps of 16 frames of 512x1024: 46.83 with the encoder, and 20.05 times less than ModelScope."""
    folder, card = paper(tmp_path / "c"), family("cmd")
    assert card.describe is not None
    given = {"prompt": "a bear", "seed": 1, "height": 512, "width": 1024, "motion_steps": 50}
    told = bill(card, folder, resolve(card, card.verbs["sample"](**given), card.describe(folder)))
    parts = {part["name"]: part for part in told["parts"]}
    macs = {name: part["macs_fvcore_like"] / 1e12 for name, part in parts.items()}
    wanted = {"text_encoder": 0.0223, "content": 0.67621, "motion": 0.2286, "autoencoder": 1.5468 / 2, "vae": 39.7}
    assert macs == pytest.approx(wanted, rel=5e-3)
    assert [parts[name]["parameters"] for name in ("content", "motion", "autoencoder")] == [
        865_910_724,
        675_213_760,
        47_365_656,
    ]
    assert (parts["content"]["calls"], parts["content"]["passes"]) == (50, 2)
    assert parts["content"]["flops_true"] / 4e12 == pytest.approx(0.9248, rel=5e-3)
    assert parts["motion"]["flops_true"] / 4e12 == pytest.approx(0.2455, rel=5e-3)
    assert told["latents"]["numbers"] == 45_056
    ours = 50 * (macs["content"] + macs["motion"]) + 2 * macs["autoencoder"] + 2 * macs["text_encoder"]
    assert ours == pytest.approx(46.83, rel=5e-3)
    with torch.device("meta"):
        scope = UNet3DConditionModel(cross_attention_dim=1024, attention_head_dim=64)
    assert sum(p.numel() for p in scope.parameters()) == 1_411_233_860
    count = counted(lambda: scope(empty(1, 4, 16, 64, 128), empty(1), empty(1, 77, 1024)), scope)
    assert 50 * count.plain / 1e12 == pytest.approx(938.91, rel=5e-3)
    assert count.flops / 2e12 == pytest.approx(22.7549, rel=1e-3)
    assert 50 * count.plain / 1e12 / ours == pytest.approx(20.05, abs=0.2)


# --- the command line -----------------------------------------------------------------------------------------------


def test_a_dry_run_tells_the_cost(folders, tmp_path):
    done = vgen("sample", "cmd", "x", "--checkpoint", folders["cmd"], "--dry-run", "--cost", "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    told = done.json()["cost"]
    assert told["parts"] == bill(family("cmd"), folders["cmd"], cmd_tiny.asked(folders["cmd"]))["parts"]
    text = cost.lines(told)
    assert text[0].split()[0] == "network"
    assert [line.split()[0] for line in text[1:]] == [*(p["name"] for p in told["parts"]), "clip", "latents:"]


def test_the_cost_is_asked_of_dry_runs_of_sample_on_the_disk(folders, tmp_path):
    given: dict[str, Any] = {"cost": True, "checkpoint": str(folders["cmd"]), "output": str(tmp_path / "o")}
    with pytest.raises(UsageError, match="told by --dry-run"):
        perform("sample", family("cmd"), {**given, "prompt": "x"})
    with pytest.raises(UsageError, match="'encode' makes none"):
        perform("encode", family("cmd"), {**given, "dry_run": True, "inputs": ["world:1"]})
    far = {"checkpoint": "cogvideox.5b", "prompt": "x", "output": str(tmp_path / "o.mp4"), "dry_run": True}
    with pytest.raises(VgenError, match="not on this disk"):
        perform("sample", family("cogvideox"), {**given, **far})
