"""Adapters: what is saved loads elsewhere with the same effect, and what others save loads here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vgen import adapter_file, adapters
from vgen.adapter_file import WEIGHTS

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.checkpoint(tmp_path_factory.mktemp("checkpoint") / "c", "5b")


def network(folder: Path) -> Any:
    return diffusers.CogVideoXTransformer3DModel.from_pretrained(folder / "transformer")


def adapted(folder: Path, wanted: list[str] = TARGETS, rank: int = 3, alpha: float = 7.0) -> tuple[Any, nn.Module]:
    """A network with a random adapter that is not 0, alpha != rank."""
    net = network(folder)
    weights = adapters.add(net, adapters.targets(net, wanted), rank=rank, alpha=alpha, dropout=0.0, seed=1)
    with torch.no_grad():
        for i, p in enumerate(weights.parameters()):
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) * 0.3)
    return net, weights


def output(net: Any) -> Tensor:
    """The network's answer to one noisy clip, without its positions."""
    g = torch.Generator().manual_seed(0)
    x, text = torch.randn(1, 3, 4, 8, 8, generator=g), torch.randn(1, 8, 16, generator=g)
    with torch.no_grad():
        return net(x, text, torch.tensor([500]), return_dict=False)[0]


def saved(folder: Path, place: Path, **how: Any) -> tuple[Path, Tensor]:
    """An adapter's file, and the live network's output."""
    net, weights = adapted(folder, **how)
    pairs = adapters.baked(weights, how.get("alpha", 7.0) / how.get("rank", 3))
    adapter_file.write(place / WEIGHTS, "transformer", pairs, {"family": "cogvideox"})
    return place / WEIGHTS, output(net)


@pytest.mark.parametrize("header", ["whole", "stripped"])
def test_diffusers_loads_the_file_with_the_same_output(folder: Path, tmp_path: Path, header: str) -> None:
    path, live = saved(folder, tmp_path)
    if header == "stripped":
        save_file(load_file(path), path)
    pipe = diffusers.CogVideoXPipeline.from_pretrained(folder)
    assert (output(pipe.transformer) - live).abs().max() > 1e-2
    pipe.load_lora_weights(tmp_path)
    torch.testing.assert_close(output(pipe.transformer), live, atol=1e-5, rtol=0)


def test_our_own_reader_gives_the_same_output_and_scale(folder: Path, tmp_path: Path) -> None:
    path, live = saved(folder, tmp_path)
    net = network(folder)
    before = output(net)
    read = adapter_file.read(path, "transformer", adapters.layers(net))
    assert read.about == {"family": "cogvideox"}
    adapters.attach(net, read, 1.0, "a", torch.float32)
    torch.testing.assert_close(output(net), live, atol=1e-5, rtol=0)
    other = network(folder)
    adapters.attach(other, read, 0.25, "a", torch.float32)
    adapters.attach(other, read, 0.75, "b", torch.float32)
    torch.testing.assert_close(output(other), live, atol=1e-5, rtol=0)
    adapters.merge(other)
    torch.testing.assert_close(output(other), live, atol=1e-5, rtol=0)
    assert other.state_dict().keys() == network(folder).state_dict().keys()
    assert (output(other) - before).abs().max() > 1e-2
