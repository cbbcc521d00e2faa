"""A run from end to end, as a shell sees it: its answer, its record, and the same bits again from that record."""

import tomllib

import pytest
import tiny
import torch
from safetensors.torch import load_file
from shell import vgen

from vgen.record import hash_file


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


def test_a_record_repeats_its_run_bit_for_bit(folder, tmp_path):
    line = ("sample", "cogvideox", "a red ball rising", "--checkpoint", folder, "--num-inference-steps", "3")
    home = {"VGEN_HOME": str(tmp_path / "home")}
    first = vgen(*line, "-o", "one.safetensors", "--json", cwd=tmp_path, **home)
    assert first.code == 0, first.err
    told = first.json()
    assert (told["output"], told["checkpoint"]) == ("one.safetensors", str(folder))
    assert first.err.splitlines()[0] == f"Loading cogvideox ({folder}), seed {told['seed']} ..."

    record = tomllib.loads((tmp_path / "one.safetensors.toml").read_text())
    assert (record["seed"], record["num_frames"], record["height"]) == (told["seed"], 9, 32)
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    assert record["record"]["checkpoint"]["files"][f"vae/{weights.name}"] == hash_file(weights)
    assert record["record"]["device"] == "cpu"

    again = ("sample", "cogvideox", "--config", "one.safetensors.toml", "-o", "two.safetensors")
    second = vgen(*again, cwd=tmp_path, **home)
    assert (second.code, second.out) == (0, "two.safetensors\n"), second.err
    one, two = (load_file(tmp_path / f"{name}.safetensors") for name in ("one", "two"))
    assert one
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_same_output_twice_is_refused_before_weights_load(folder, tmp_path):
    (tmp_path / "x.mp4").touch()
    done = vgen("sample", "cogvideox", "x", "--checkpoint", folder, "-o", "x.mp4", cwd=tmp_path)
    assert (done.code, done.out) == (2, "")
    assert "--overwrite" in done.err
    assert "Loading" not in done.err
