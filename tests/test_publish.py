"""The self-check before publishing: weights that do not fit their configuration are refused before any upload."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from diffusers import AutoencoderKL
from test_exchange import tensors, written

from vgen import publish
from vgen.errors import VgenError

TOLD = {"family": "cogvideox", "license": "mit"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_layers": 3}, r"The first, transformer_blocks\.2\.\S+, is missing in the files and \(\d"),
        ({"num_layers": 1}, r"The first, transformer_blocks\.1\.\S+, is \(\S+.* and missing in the network"),
        ({"time_embed_dim": 8}, r"norm_out.linear.weight, is \(64, 16\) in the files and \(64, 8\) in the network"),
    ],
)
def test_weights_that_do_not_fit_their_configuration_are_refused(folder: Path, change: dict[str, int], said: str):
    publish.check(folder, TOLD)
    config = folder / "transformer" / "config.json"
    before = config.read_text()
    config.write_text(json.dumps({**json.loads(before), **change}))
    try:
        with pytest.raises(VgenError, match="The weights of 'transformer' do not fit its config.json: .*" + said):
            publish.check(folder, TOLD)
    finally:
        config.write_text(before)


def test_old_names_of_attention_layers_are_read_as_diffusers_reads_them(tmp_path: Path):
    from safetensors.torch import load_file, save_file

    AutoencoderKL(block_out_channels=(4,), norm_num_groups=2).save_pretrained(tmp_path / "vae")
    path = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    held = load_file(path)
    renamed = {}
    for name, tensor in held.items():
        for new, former in old.items():
            name = name.replace(f".{new}.", f".{former}.")
        renamed[name] = tensor
    assert renamed.keys() != held.keys()
    save_file(renamed, path)
    publish._fits(tmp_path / "vae" / "config.json")


def test_the_card_shows_the_last_samples_of_the_training_with_their_prompts(tmp_path: Path):
    names = ["000002-0.mp4", "000010-1.mp4", "000010-0.mp4", "10-notes.txt"]
    held = {"pytorch_lora_weights.safetensors": tensors(), **{f"validation/{name}": b"clip" for name in names}}
    run = {"id": "1", "verb": "train-lora", "settings": {"validation_prompt": ['a "red" ball: rising', "a bear"]}}
    told = {**TOLD, "base": {"reference": "demo"}, "run": run}
    target = publish.Target("ann/look")
    staged = publish.finish(written(tmp_path / "look", held), told, target, "text-to-video")
    card = (staged.folder / "README.md").read_text()
    header = yaml.safe_load(card.split("---")[1])
    shown = [("validation/000010-0.mp4", 'a "red" ball: rising'), ("validation/000010-1.mp4", "a bear")]
    assert header["widget"] == [{"text": text, "output": {"url": name}} for name, text in shown]
    assert "<Gallery />" in card
    assert "[a bear](validation/000010-1.mp4)" in card
    assert "000002" not in card
    assert {name for name, _ in shown} <= staged.files.keys()
    plain = publish.finish(
        written(tmp_path / "plain", {k: v for k, v in held.items() if "/" not in k}), told, target, ""
    )
    assert "Gallery" not in (plain.folder / "README.md").read_text()
