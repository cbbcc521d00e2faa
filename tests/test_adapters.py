"""Adapters: what is saved loads elsewhere with the same effect, and what others save loads here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import tiny
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vgen import adapter_file, adapters, clips, diffusion, lora
from vgen.adapter_file import WEIGHTS, kohya_name
from vgen.encode import embed_captions, encode
from vgen.errors import UsageError, VgenError
from vgen.finetune import batches
from vgen.machine import seeded
from vgen.plugins.cogvideox import family
from vgen.store import Store
from vgen.tensorfile import load_tensors

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


# Training


@pytest.fixture(scope="module")
def store(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Four clips of the world as latents."""
    place = tmp_path_factory.mktemp("data") / "store"
    model, items = tiny.model(folder), clips.discover(["world:4"])
    made = Store.open(place, space=model.space, text_space=model.text_space, create=True)
    embed_captions(model, made, items, lambda *_: None)
    list(encode(model, made, items, [(9, 32, 32)], tiny.asked(folder, "encode", inputs=["x"]), lambda *_: None))
    return str(place)


def asked(folder: Path, store: str, output: Path, **flags: Any) -> Any:
    told = {"data": [store], "max_train_steps": 3, "learning_rate": 1e-2, "rank": 3, "lora_alpha": 6.0, **flags}
    return tiny.asked(folder, "train-lora", output=output, checkpoint=str(folder), **told)


def trained(folder: Path, store: str, output: Path, **flags: Any) -> Path:
    """The file of an adapter that was trained for three steps."""
    told = asked(folder, store, output, **flags)
    lora.train_lora(family, tiny.model(folder), folder, told, tiny.CPU)
    return output / WEIGHTS


def test_a_step_is_that_of_a_plain_loop_of_diffusers_and_peft(folder: Path, store: str, tmp_path: Path) -> None:
    told = asked(folder, store, tmp_path / "out", train_batch_size=2, lr_scheduler="constant", learning_rate=3e-4)
    lora.train_lora(family, tiny.model(folder), folder, told, tiny.CPU)
    log = [json.loads(line) for line in (tmp_path / "out" / "training" / "log.jsonl").read_text().splitlines()]
    net = network(folder)
    net.requires_grad_(False)
    net.add_adapter(LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS))
    start = asked(folder, store, tmp_path / "start")
    own = lora.adapted(family, tiny.model(folder), folder, start)[0].modules["transformer"].state_dict()
    ours = {name.replace(".weight", ".default.weight"): tensor for name, tensor in own.items()}
    assert not net.load_state_dict(ours, strict=False).unexpected_keys
    weights = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, 3e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=1e-4)
    scheduler = diffusers.CogVideoXDDIMScheduler.from_pretrained(folder / "scheduler")
    make = batches(family, tiny.model(folder), told)
    part = tiny.model(folder).part("transformer", told)
    for step in range(3):
        batch, noise = make(step), seeded(told.seed, "noise", step, 0)
        seen: dict[str, Tensor] = {}

        def predict(x: Tensor, t: Tensor, cond: Any, seen: dict[str, Tensor] = seen) -> Tensor:
            seen.update(x=x, t=t)
            return torch.zeros_like(x)

        diffusion.loss(predict, part.process, "v", batch["latents"], {}, noise)  # what was drawn
        x0, x, t = batch["latents"].transpose(1, 2), seen["x"].transpose(1, 2), seen["t"].long()
        alphas = scheduler.alphas_cumprod.double()[t][:, None, None, None, None]
        eps = (x - alphas.sqrt() * x0) / (1 - alphas).sqrt()
        v = (alphas.sqrt() * eps - (1 - alphas).sqrt() * x0).float()
        positions = part._rotary((3, 8, 8), torch.device("cpu"))
        out = net(x.float(), batch["text"], t, image_rotary_emb=positions, return_dict=False)[0]
        loss = (out - v).square().mean()
        assert loss.item() == pytest.approx(log[step]["loss"], abs=1e-6)
        loss.backward()
        assert all((p.grad is not None) == p.requires_grad for p in net.parameters())
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    state, _ = load_tensors(tmp_path / "out" / "training" / "state.safetensors")
    theirs = {n.replace(".default", ""): p.detach() for n, p in net.named_parameters() if p.requires_grad}
    assert len(theirs) == 16
    for name, tensor in theirs.items():
        torch.testing.assert_close(state[f"weights/transformer.{name}"], tensor, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_reach_only_the_adapter(folder: Path, store: str, tmp_path: Path, recompute: bool) -> None:
    model = tiny.model(folder, tiny.Machine(torch.device("cpu"), torch.bfloat16))
    told = asked(folder, store, tmp_path, gradient_checkpointing=recompute)
    part = lora.adapted(family, model, folder, told)[0]
    part.loss(batches(family, tiny.model(folder), told)(0), torch.Generator().manual_seed(0)).backward()
    weights = dict(part.modules["transformer"].named_parameters())
    assert {p.dtype for p in weights.values()} == {torch.float32}
    assert all(p.grad is not None for p in weights.values())
    base = {n: p for n, p in model.networks.get("transformer").named_parameters() if ".lora_" not in n}
    assert {p.dtype for p in base.values()} == {torch.bfloat16}
    assert not any(p.requires_grad or p.grad is not None for p in base.values())
