"""Adapters: what is saved loads elsewhere with the same effect, and what others save loads here."""

from __future__ import annotations

import json
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import diffusers
import loopback
import pytest
import test_sd
import tiny
import torch
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from shell import run, vgen
from torch import Tensor, nn

from vgen import adapter_file, adapters, clips, diffusion, lora, lora_source, quant
from vgen.adapter_file import WEIGHTS
from vgen.encode import embed_captions, encode
from vgen.errors import UsageError, VgenError
from vgen.finetune import batches
from vgen.generate import generate
from vgen.machine import seeded
from vgen.plugins.cogvideox import family
from vgen.record import hash_file
from vgen.store import Store
from vgen.tensorfile import load_tensors

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tiny.checkpoint(tmp_path_factory.mktemp("checkpoint") / "c", "5b")
    (made / "vgen.json").write_text('{"family": "cogvideox"}')
    return made


@pytest.fixture(scope="module")
def still(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint of Stable Diffusion."""
    return test_sd.checkpoint(tmp_path_factory.mktemp("sd") / "small")


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


def samples(folder: Path, *specs: str) -> Tensor:
    """Latents that `vgen sample --lora` makes of the tiny checkpoint."""
    model = tiny.model(folder)
    sources = [lora_source.locate(spec) for spec in specs]
    assert lora.use(family, model, folder, sources) == []
    told = tiny.asked(folder, num_inference_steps=2, guidance_scale=1.0)
    return generate(model, told, lambda *_: None)["latents"]


def test_samples_with_adapters_and_of_the_merged_checkpoint(folder: Path, store: str, tmp_path: Path) -> None:
    path = trained(folder, store, tmp_path / "a", export=["comfy", "kohya"])
    other = trained(folder, store, tmp_path / "b", target_modules=["ff.net.0.proj", "*.1.attn1.to_?"], seed=9, rank=2)
    plain, live = samples(folder), samples(folder, f"{path.parent}:0.5", str(other))
    assert (live - plain).abs().max() > 1e-3
    assert torch.equal(samples(folder, f"{path}:0"), plain)
    for name in ("comfy", "kohya"):
        source = lora_source.locate(str(path.parent / f"{name}.safetensors"))
        again = adapter_file.read(source.path, "transformer", adapters.layers(network(folder)), lora._comfy(family))
        first = adapter_file.read(path, "transformer", adapters.layers(network(folder)))
        assert again.pairs.keys() == first.pairs.keys()
        for key, (a, b) in first.pairs.items():
            torch.testing.assert_close(again.pairs[key][1] @ again.pairs[key][0], b @ a)
    merged = vgen(
        *("checkpoints", "merge", folder, "--lora", f"{path.parent}:0.5", "--lora", other.parent),
        *("-o", tmp_path / "merged"),
    )
    assert (merged.code, merged.out) == (0, f"{tmp_path / 'merged'}\n"), merged.err
    torch.testing.assert_close(samples(tmp_path / "merged"), live, atol=1e-5, rtol=0)
    told = json.loads((tmp_path / "merged" / "vgen.json").read_text())
    assert [(one["reference"], one["scale"]) for one in told["adapters"]] == [
        (str(path.parent), 0.5),
        (str(other.parent), 1),
    ]
    assert told["base"]["reference"] == str(folder)
    assert told["run"]["verb"] == "merge"


def test_a_resumed_run_writes_the_same_adapter_and_only_it_is_in_the_state(
    folder: Path, store: str, tmp_path: Path
) -> None:
    how = {"lr_scheduler": "constant", "ema_decay": 0.9, "lora_dropout": 0.2, "max_train_steps": 4}
    whole = trained(folder, store, tmp_path / "whole", **how)
    half = trained(folder, store, tmp_path / "half", **{**how, "max_train_steps": 2})
    assert half.read_bytes() != whole.read_bytes()
    half = trained(folder, store, tmp_path / "half", **how, resume=True)
    assert half.read_bytes() == whole.read_bytes()
    state, _ = load_tensors(half.parent / "training" / "state.safetensors")
    assert {name.rpartition(".lora_")[2] for name in state if name.startswith("weights/")} == {"A.weight", "B.weight"}


def test_an_adapter_is_continued(folder: Path, store: str, tmp_path: Path) -> None:
    first = trained(folder, store, tmp_path / "a")
    told = asked(folder, store, tmp_path / "b", rank=None, lora_alpha=12.0, init_lora=str(first), learning_rate=1e-9)
    lora.train_lora(family, tiny.model(folder), folder, told, tiny.CPU)
    a, b = (load_file(path) for path in (first, tmp_path / "b" / WEIGHTS))
    assert all(torch.allclose(t, b[name], atol=1e-6) for name, t in a.items())
    on_top = trained(folder, store, tmp_path / "c", lora=[f"{first}:0.5"])
    log = [json.loads((tmp_path / x / "training" / "log.jsonl").read_text().splitlines()[0])["loss"] for x in "ac"]
    assert log[0] != log[1]
    assert load_file(on_top).keys() == a.keys()
    with pytest.raises(UsageError, match="has rank 3, not 5"):
        trained(folder, store, tmp_path / "d", init_lora=str(first), rank=5)


# Stable Diffusion


def image(net: Any) -> Tensor:
    """The U-Net's answer to one noisy image."""
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        return net(torch.randn(1, 4, 8, 8, generator=g), 500, torch.randn(1, 16, 16, generator=g), return_dict=False)[0]


def latents_of(still: Path, place: Path) -> str:
    """Two pictures of the world, encoded for the tiny checkpoint."""
    model, items = test_sd.model(still), clips.discover(["world:2"])
    made = Store.open(place, space=model.space, text_space=model.text_space, create=True)
    embed_captions(model, made, items, lambda *_: None)
    list(encode(model, made, items, [(1, 32, 32)], test_sd.asked(still, "encode"), lambda *_: None))
    return str(place)


def test_adapters_of_stable_diffusion_load_in_diffusers_under_both_names(still: Path, tmp_path: Path) -> None:
    out = tmp_path / "look"
    flags = {"data": [latents_of(still, tmp_path / "store")], "output": out, "max_train_steps": 2, "rank": 3}
    told = test_sd.asked(still, "train-lora", **flags, lora_alpha=12.0, learning_rate=1e-2, export=["kohya", "comfy"])
    model = test_sd.model(still)
    lora.train_lora(test_sd.family, model, still, told, tiny.CPU)
    live, plain = image(model.networks.get("unet")), image(test_sd.model(still).networks.get("unet"))
    assert (live - plain).abs().max() > 1e-3
    for name in (WEIGHTS, "kohya.safetensors"):
        pipe = diffusers.StableDiffusionPipeline.from_pretrained(still, safety_checker=None)
        pipe.load_lora_weights(out, weight_name=name)
        torch.testing.assert_close(image(pipe.unet), live, atol=1e-5, rtol=0)
    assert (out / "comfy.safetensors").read_bytes() == (out / "kohya.safetensors").read_bytes()


@pytest.mark.parametrize("format", ["diffusers", "peft"])
def test_adapters_that_others_trained_load_here(still: Path, tmp_path: Path, format: str) -> None:
    net = diffusers.UNet2DConditionModel.from_pretrained(still / "unet")
    net.add_adapter(LoraConfig(r=2, lora_alpha=5, target_modules=TARGETS, init_lora_weights=False))
    if format == "diffusers":
        net.save_lora_adapter(tmp_path)
    else:
        state = {f"base_model.model.{name}": t for name, t in get_peft_model_state_dict(net).items()}
        save_file(state, tmp_path / "adapter_model.safetensors")
        (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 5}')
    model = test_sd.model(still)
    (heard,) = lora.use(test_sd.family, model, still, [lora_source.locate(str(tmp_path))])
    assert "does not tell which weights it was trained on" in heard
    torch.testing.assert_close(image(model.networks.get("unet")), image(net), atol=1e-5, rtol=0)


# Frozen weights in fewer bits


@pytest.mark.parametrize(("kind", "close"), [("nf4", 0.1), ("int8", 0.02)])
def test_an_adapter_trains_on_quantized_weights_and_loads_on_whole_ones(
    folder: Path, store: str, tmp_path: Path, kind: str, close: float
) -> None:
    net = network(folder)
    whole = output(net)
    assert quant.quantize(net, kind, torch.device("cpu")) == 16
    assert (output(net) - whole).norm() < close * whole.norm()
    assert net.transformer_blocks[0].attn1.to_q.weight.element_size() == 1
    path = trained(folder, store, tmp_path / "out", quantize=kind, gradient_checkpointing=True)
    assert all(t.dtype == torch.float32 for t in load_file(path).values())
    assert not torch.equal(samples(folder, str(path)), samples(folder))


# Sizes


@pytest.mark.parametrize(("tag", "heads", "layers", "count"), [("2b", 30, 30, 58_982_400), ("5b", 48, 42, 132_120_576)])
def test_counts_of_rank_128(tag: str, heads: int, layers: int, count: int) -> None:
    with torch.device("meta"):
        net = diffusers.CogVideoXTransformer3DModel(num_attention_heads=heads, num_layers=layers)
        wanted = adapters.targets(net, family.lora_targets)
        weights = adapters.add(net, wanted, rank=128, alpha=64.0, dropout=0.0, seed=0)
    assert len(wanted) == 4 * layers
    assert sum(p.numel() for p in weights.parameters()) == count
    assert sum(p.numel() for p in net.parameters() if p.requires_grad) == count


# What is refused


def test_adapters_of_others_are_refused_by_name(folder: Path, still: Path, store: str, tmp_path: Path) -> None:
    path = trained(folder, store, tmp_path / "a")
    other = tiny.checkpoint(tmp_path / "other", "5b", seed=1)
    with pytest.raises(UsageError, match=r"is an adapter of .*/c, whose weights are not those of other"):
        samples(other, str(path))
    flags = ("--checkpoint", still, "--lora", path, "-o", tmp_path / "x.png")
    done = vgen("sample", "sd", "a red ball", *flags)
    assert done.code == 2
    assert "is an adapter of 'cogvideox' (transformer), not of 'sd'" in done.err
    larger = tmp_path / "larger.safetensors"
    save_file({n: torch.cat([t, t], 1) if "lora_A" in n else t for n, t in load_file(path).items()}, larger)
    with pytest.raises(VgenError, match="takes 32 numbers to 32, the adapter 64 to 32"):
        samples(folder, str(larger))


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"target_modules": ["to_quack"]}, r"to_quack names no layer.*\n.*Did you mean 'to_q'"),
        ({"target_modules": ["attn1"]}, "attn1 names no layer"),
        ({"lora": ["/nowhere:0.5"]}, "/nowhere: there is no such file"),
        ({"init_lora": "nowhere.safetensors"}, "there is no such file"),
    ],
)
def test_wrong_settings_are_refused_before_training(
    folder: Path, store: str, tmp_path: Path, flags: dict[str, Any], says: str
) -> None:
    with pytest.raises(UsageError, match=says):
        trained(folder, store, tmp_path / "out", **flags)
    assert not (tmp_path / "out").exists()


def test_rank_0_is_refused() -> None:
    done = vgen("train-lora", "cogvideox", "--data", "x", "--rank", "0")
    assert done.code == 2
    assert "--rank: 0 is out of range" in done.err


def test_what_learnt_nothing_is_not_written(folder: Path, store: str, tmp_path: Path) -> None:
    told = asked(folder, store, tmp_path)
    part, save = lora.adapted(family, tiny.model(folder), folder, told)
    with pytest.raises(VgenError, match="has learnt nothing"):
        save(part.modules)
    weights = dict(part.modules["transformer"].named_parameters())
    with torch.no_grad():
        weights["transformer_blocks.0.attn1.to_q.lora_B.weight"].fill_(torch.nan)
    with pytest.raises(VgenError, match="not finite"):
        save(part.modules)
    assert not any(path.suffix == ".safetensors" for path in tmp_path.iterdir())


def test_a_file_that_does_not_load_as_it_was_trained_is_refused(folder: Path, tmp_path: Path) -> None:
    path, _ = saved(folder, tmp_path)
    net = network(folder)
    whole = dict(adapter_file.read(path, "transformer", adapters.layers(net)).pairs)
    lora._check(path, "transformer", whole, net, torch.float32)
    name = "transformer_blocks.1.attn1.to_v"
    fewer = {n: pair for n, pair in whole.items() if n != name}
    other = {**whole, name: (whole[name][0], 2 * whole[name][1])}
    for pairs, same in ((fewer, "7 of 7"), (other, "7 of 8")):
        with pytest.raises(VgenError, match=f"does not load as it was trained: {same} layers"):
            lora._check(path, "transformer", pairs, net, torch.float32)


def test_files_that_are_not_whole_are_refused(folder: Path, store: str, tmp_path: Path) -> None:
    path, _ = saved(folder, tmp_path)
    layers = list(adapters.layers(network(folder)))
    whole = load_file(path)
    name = "transformer.transformer_blocks.0.attn1.to_q"
    changes = {
        "no place": {**whole, "transformer.elsewhere.lora_A.weight": torch.zeros(3, 3)},
        "do not fit together": {n: t for n, t in whole.items() if n != f"{name}.lora_B.weight"},
        "nothing for": {"unet.x.bias": torch.zeros(1)},
        "1 weights that have no place": {**whole, f"{name}.lora_magnitude_vector": torch.zeros(3)},
    }
    for says, tensors in changes.items():
        save_file(tensors, tmp_path / "x.safetensors")
        with pytest.raises(VgenError, match=says):
            adapter_file.read(tmp_path / "x.safetensors", "transformer", layers)
    with pytest.raises(VgenError, match="pickled weights can run any code"):
        adapter_file.read(tmp_path / "x.bin", "transformer", layers)


# From the command line


def test_an_adapter_from_the_command_line_and_from_the_hub(folder: Path, store: str, tmp_path: Path) -> None:
    base = ("--checkpoint", folder)
    train = ("--data", store, "--rank", "2", "--learning-rate", "1e-2", "--max-train-steps", "2", "--seed", "1")
    done = vgen("train-lora", "cogvideox", *base, *train, "-o", "look", cwd=tmp_path)
    assert (done.code, done.out) == (0, "look\n"), done.err
    told = json.loads((tmp_path / "look" / "vgen.json").read_text())
    assert (told["family"], told["part"], told["rank"], told["layers"]) == ("cogvideox", "transformer", 2, 8)
    assert told["base"]["reference"] == str(folder)
    draw = ("sample", "cogvideox", "a red ball", *base, "--num-inference-steps", "2", "--seed", "1")
    done = vgen(*draw, "--lora", "look/:0.5", "-o", "here.safetensors", cwd=tmp_path)
    assert done.code == 0, done.err
    with loopback.hub() as running:
        running.add(
            "me/look", {path.name: path.read_bytes() for path in (tmp_path / "look").iterdir() if path.is_file()}
        )
        online = running.environment(tmp_path / "home")
        done = vgen(*draw, "--lora", "me/look:0.5", "-o", "there.safetensors", cwd=tmp_path, **online)
    assert done.code == 0, done.err
    ask = "from vgen import lora_source; print(lora_source.locate('me/look:0.5').spec)"
    offline = run([sys.executable, "-c", ask], **{**online, "HF_HUB_OFFLINE": "1"})
    here, there = (load_file(tmp_path / f"{name}.safetensors")["latents"] for name in ("here", "there"))
    assert torch.equal(here, there)
    record = tomllib.loads((tmp_path / "there.safetensors.toml").read_text())
    (spec,) = record["lora"]
    assert re.fullmatch(r"me/look@[0-9a-f]{40}:0.5", spec)
    assert offline.out == f"{spec}\n", offline.err
    assert record["record"]["adapters"] == {spec: hash_file(tmp_path / "look" / WEIGHTS)}


def test_under_autocast_inputs_are_shared_and_no_bit_changes(folder: Path) -> None:
    def step(net: Any, weights: nn.Module) -> tuple[int, list[Tensor]]:
        """Bytes that are kept for the backward pass, and the gradients."""
        g, kept = torch.Generator().manual_seed(0), dict[int, int]()

        def keep(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        x, text = (torch.randn(shape, generator=g).bfloat16() for shape in ((1, 3, 4, 8, 8), (1, 8, 16)))
        same = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with torch.autocast("cpu", torch.bfloat16), same:
            loss = net(x, text, torch.tensor([500]), return_dict=False)[0].float().square().mean()
        return sum(kept.values()), list(torch.autograd.grad(loss, list(weights.parameters())))

    net, weights = adapted(folder)
    for name, p in net.named_parameters():
        if ".lora_" not in name:
            p.data = p.data.bfloat16()
    before, plain = step(net, weights)
    adapters.share_inputs(net)
    after, shared = step(net, weights)
    assert after < before
    assert all(map(torch.equal, plain, shared))
