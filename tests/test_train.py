"""Training: resumes repeat bit for bit, Ctrl-C saves, faults are named, and what is written loads anywhere."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import random
import stat
import time
from collections import Counter
from pathlib import Path
from typing import Any

import diffusers
import pytest
import tiny
import torch
from torch import Tensor, nn
from transformers import T5EncoderModel

from vgen import clips, train
from vgen.dataset import Batches, choose
from vgen.errors import UsageError, VgenError
from vgen.export import export
from vgen.finetune import batches, finetune
from vgen.generate import generate
from vgen.optimizers import learning_rate
from vgen.plugins.cogvideox import family
from vgen.tensorfile import load_tensors

FAST = {"train_batch_size": 2, "learning_rate": 3e-3, "caption_dropout": 0.3}
ALONG = {"train_text_encoder": True, "mask_weight": 2.0, "mask_steps": 3, "ema_decay": 0.9, **FAST}
PIXELS = {"part": "autoencoder", "data": ["world:6"], "ema_decay": 0.9, "train_batch_size": 2, "num_frames": 9}


@pytest.fixture(scope="module")
def store(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Six clips of the world, of two lengths, as latents."""
    place = tmp_path_factory.mktemp("data") / "store"
    model, items = tiny.model(folder), clips.discover(["world:6"])
    told = tiny.asked(folder, "encode", inputs=["world:6"])
    tiny.fill(model, place, told, (items[:4], (9, 32, 32)), (items[4:], (1, 32, 32)))
    return str(place)


def run(folder: Path, output: Path, **flags: Any) -> dict[str, Any]:
    told = tiny.asked(folder, "finetune", **{"max_train_steps": 6, **flags}, output=output)
    return finetune(family, tiny.model(folder), folder, told, tiny.CPU)


def weights(output: Path) -> dict[str, bytes]:
    files = [
        p for p in sorted(output.rglob("*")) if p.suffix in (".safetensors", ".json") and "training" not in p.parts
    ]
    return {str(p.relative_to(output)): p.read_bytes() for p in files}


def log(output: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (output / "training" / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


# Resuming


@pytest.mark.parametrize("part", ["transformer", "autoencoder"])
def test_a_resumed_run_repeats_the_whole_one_bit_for_bit(folder: Path, store: str, tmp_path: Path, part: str) -> None:
    told = {"data": [store], **ALONG} if part == "transformer" else PIXELS
    told = {**told, "checkpointing_steps": 3, "lr_scheduler": "constant", "gradient_accumulation_steps": 2}
    run(folder, tmp_path / "whole", **told)
    run(folder, tmp_path / "half", **told, max_train_steps=3)
    (tmp_path / "half" / "training" / "log.jsonl").open("a").write(
        '{"step": 4, "loss": 0.0}\n{"st'
    )  # as a kill leaves it
    run(folder, tmp_path / "half", **told, resume=True)
    assert log(tmp_path / "half") == log(tmp_path / "whole")
    states = [load_tensors(tmp_path / name / "training" / "state.safetensors") for name in ("half", "whole")]
    half, whole = ({k: v for k, v in record.items() if k not in ("run", "resumed")} for _, record in states)
    half["identity"]["settings"].pop("max_train_steps"), whole["identity"]["settings"].pop("max_train_steps")
    assert half == whole
    assert states[0][0].keys() == states[1][0].keys()
    assert all(bits(t) == bits(states[1][0][name]) for name, t in states[0][0].items())
    half, whole = weights(tmp_path / "half"), weights(tmp_path / "whole")
    half.pop("vgen.json"), whole.pop("vgen.json")  # they hold the folders' names
    assert half == whole


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.ndim else tensor.numpy().tobytes()


def test_a_finished_run_that_is_resumed_writes_its_checkpoint_again(folder: Path, store: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(folder, out, data=[store], max_train_steps=2, **FAST)
    before, lines = weights(out), log(out)
    (out / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    figures = run(folder, out, data=[store], max_train_steps=2, resume=True, **FAST)
    assert (weights(out), log(out)) == (before, lines)
    assert figures["step"] == 2


def test_an_output_that_is_there_is_not_mixed_up(folder: Path, store: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(folder, out, data=[store], max_train_steps=2, **FAST)
    before = weights(out)
    with pytest.raises(UsageError, match="is not empty"):
        run(folder, out, data=[store], **FAST)
    assert weights(out) == before
    other = tiny.checkpoint(tmp_path / "other", "5b", seed=1)
    with pytest.raises(VgenError, match="no such file"):
        run(other, out, data=[str(tmp_path / "nowhere")], overwrite=True)
    assert weights(out) == before
    run(other, out, **PIXELS, max_train_steps=1, overwrite=True)
    theirs = (other / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes()
    assert weights(out)["transformer/diffusion_pytorch_model.safetensors"] == theirs
    assert len(log(out)) == 1


@pytest.mark.parametrize("change", [{"train_text_encoder": False}, {"ema_decay": 0.0}, {"seed": 4}])
def test_the_state_of_another_run_is_refused(folder: Path, store: str, tmp_path: Path, change: dict[str, Any]) -> None:
    told = {"data": [store], **ALONG}
    run(folder, tmp_path / "out", **told, max_train_steps=1)
    with pytest.raises(VgenError, match=r"then +now\n +--"):
        run(folder, tmp_path / "out", **{**told, **change}, resume=True)


# What a step does


def test_the_loss_falls_on_one_clip(folder: Path, tmp_path: Path) -> None:
    told = {**PIXELS, "data": ["world:1"], "train_batch_size": 1, "learning_rate": 1e-2, "lr_scheduler": "constant"}
    run(folder, tmp_path / "out", **told, max_train_steps=25)
    losses = [line["loss"] for line in log(tmp_path / "out")]
    assert sum(losses[-3:]) < 0.5 * sum(losses[:3])


def test_the_transformer_learns_one_batch(folder: Path, store: str, tmp_path: Path) -> None:
    told = {"data": [store], **FAST, "train_batch_size": 4, "learning_rate": 1e-2}
    run(folder, tmp_path / "out", **told, max_train_steps=60)
    losses = [line["loss"] for line in log(tmp_path / "out")]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])


@pytest.mark.parametrize(
    ("flags", "trained"),
    [
        ({"part": "transformer"}, {"transformer"}),
        ({"part": "transformer", "train_text_encoder": True}, {"transformer", "text_encoder"}),
        ({"part": "autoencoder", "num_frames": 9}, {"vae"}),
    ],
)
def test_only_the_networks_of_the_part_change(
    folder: Path, store: str, tmp_path: Path, flags: dict[str, Any], trained: set[str]
) -> None:
    data = ["world:2"] if flags["part"] == "autoencoder" else [store]
    run(folder, tmp_path / "out", **flags, data=data, max_train_steps=1)
    before, after = weights(folder), weights(tmp_path / "out")
    changed = {name.split("/")[0] for name in after if name.endswith("safetensors") and after[name] != before[name]}
    assert changed == trained


def test_gradient_checkpointing_changes_no_gradient(folder: Path, store: str, tmp_path: Path) -> None:
    told = {"data": [store], **ALONG, "max_train_steps": 2}
    run(folder, tmp_path / "a", **told)
    run(folder, tmp_path / "b", **told, gradient_checkpointing=True)
    for a, b in zip(log(tmp_path / "a"), log(tmp_path / "b"), strict=True):
        assert a == pytest.approx(b, rel=1e-4)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_trains_on_whole_weights(folder: Path, store: str, tmp_path: Path, precision: str) -> None:
    told = {"data": [store], **FAST, "max_train_steps": 2}
    run(folder, tmp_path / "a", **told)
    run(folder, tmp_path / "b", **told, mixed_precision=precision)
    assert log(tmp_path / "b")[0]["loss"] == pytest.approx(log(tmp_path / "a")[0]["loss"], rel=0.05)
    tensors, record = load_tensors(tmp_path / "b" / "training" / "state.safetensors")
    assert {t.dtype for name, t in tensors.items() if name.startswith("weights/")} == {torch.float32}
    assert bool(record["scaler"]) == (precision == "fp16")


def test_a_network_in_half_precision_is_trained_whole_unless_asked(folder: Path) -> None:
    half = tiny.Machine(torch.device("cpu"), torch.bfloat16)
    for dtype, trained in (("auto", torch.float32), ("bf16", torch.bfloat16)):
        part = tiny.model(folder, half).part("transformer", tiny.asked(folder, "finetune", data=["x"], dtype=dtype))
        assert {p.dtype for p in part.modules["transformer"].parameters()} == {trained}


def test_compile_is_asked_for(folder: Path) -> None:
    for part in ("transformer", "autoencoder"):
        told = tiny.asked(folder, "finetune", data=["x"], part=part, compile=True)
        (network,) = tiny.model(folder).part(part, told).modules.values()
        called = [network] if part == "transformer" else [network.encoder, network.decoder]
        assert all(one._compiled_call_impl is not None for one in called)


class Broken:
    """A part whose loss is what the data say."""

    name = "broken"

    def __init__(self) -> None:
        self.modules = {"net": nn.Linear(1, 1)}

    def loss(self, batch: dict[str, Any], generator: torch.Generator) -> Tensor:
        return self.modules["net"](batch["x"]).sum()


@pytest.mark.parametrize(
    ("value", "says"), [(torch.nan, "loss became nan"), (1e30, "norm of the gradients became inf")]
)
def test_a_loss_that_is_not_finite_stops_and_names_the_clips(
    folder: Path, tmp_path: Path, value: float, says: str
) -> None:
    told = tiny.asked(folder, "finetune", data=["x"], max_train_steps=5, checkpointing_steps=2)

    def batch(step: int) -> dict[str, Any]:
        return {"x": torch.full((1, 1), value if step == 3 else 1.0), "keys": [f"clip-{step}"]}

    with pytest.raises(VgenError, match=f"{says} at step 4, on: clip-3"):
        train.fit(Broken(), batch, told, tiny.CPU, tmp_path, train.Between(tiny.ignore))  # type: ignore[arg-type]
    tensors, record = load_tensors(tmp_path / "state.safetensors")
    assert record["step"] == 2
    assert all(t.isfinite().all() for t in tensors.values())


def test_learning_rates() -> None:
    told = tiny.family.verbs["finetune"](max_train_steps=10, lr_warmup_steps=2, learning_rate=1.0)
    shapes = {}
    for name in ("constant", "linear", "cosine"):
        told.lr_scheduler = name
        shapes[name] = [round(learning_rate(told, step), 3) for step in (0, 1, 2, 6, 9)]
    assert shapes == {
        "constant": [0.5, 1.0, 1.0, 1.0, 1.0],
        "linear": [0.5, 1.0, 1.0, 0.5, 0.125],
        "cosine": [0.5, 1.0, 1.0, 0.5, 0.038],
    }


# Data


def test_batches_are_a_function_of_the_step_and_show_every_item_once_an_epoch() -> None:
    groups = {"long": list("abcdefg"), "short": list("XYZ")}
    some, again = (Batches(groups, 2, seed=1) for _ in range(2))
    assert some.per_epoch == 6
    for epoch in range(3):
        steps = range(epoch * 6, epoch * 6 + 6)
        made = [some.of(step) for step in steps]
        assert [again.of(step) for step in reversed(steps)] == made[::-1]
        assert all("".join(batch).isupper() or "".join(batch).islower() for batch in made)
        seen = Counter(item for batch in made for item in batch)
        assert set(seen) == set("abcdefgXYZ")
        assert sorted(seen.values()) == [1] * 8 + [2, 2]  # one of each group fills up its last batch
    assert [some.of(step) for step in range(6)] != [Batches(groups, 2, seed=2).of(step) for step in range(6)]


def test_dropped_captions_are_the_empty_text(folder: Path, store: str) -> None:
    model = tiny.model(folder)
    empty = next(iter(model.embed([""])))["text"]
    told = tiny.asked(folder, "finetune", data=[store], caption_dropout=1.0)
    batch = batches(family, model, told)(0)
    assert batch["captions"] == [""]
    assert torch.equal(batch["text"][0], empty)
    told.caption_dropout = 0.0
    assert not torch.equal(batches(family, model, told)(0)["text"][0], empty)
    draws = Counter(choose(["one", "two"], 0.3, torch.Generator().manual_seed(i)) for i in range(600))
    assert {word: n / 600 for word, n in draws.items()} == pytest.approx({"": 0.3, "one": 0.35, "two": 0.35}, abs=0.06)
    assert choose([], 0.0, torch.Generator()) == ""


def test_latents_of_another_autoencoder_are_refused(folder: Path, store: str, tmp_path: Path) -> None:
    other = tiny.checkpoint(tmp_path / "other", "5b", seed=1)
    with pytest.raises(VgenError, match="vgen encode cogvideox CLIPS"):
        run(other, tmp_path / "out", data=[store])
    assert not (tmp_path / "out").exists()


def test_clips_are_padded_to_whole_patches_in_time(tmp_path: Path) -> None:
    newer = tiny.checkpoint(tmp_path / "c", "1.5-5b")
    part = tiny.model(newer).part("transformer", tiny.asked(newer, "finetune", data=["x"], mask_weight=1.0))
    batch = {"latents": torch.randn(1, 4, 3, 8, 8), "text": torch.randn(1, 8, 16), "progress": 0}
    assert part.loss({**batch, "mask": torch.rand(1, 1, 3, 8, 8)}, torch.Generator().manual_seed(0)).isfinite()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"part": "autoencoder", "train_text_encoder": True}, "--train-text-encoder does nothing"),
        ({"part": "autoencoder", "caption_dropout": 0.5}, "--caption-dropout does nothing"),
        ({"kl_weight": 0.5}, "--kl-weight does nothing"),
        ({"num_frames": 17}, "--num-frames does nothing"),
    ],
)
def test_settings_of_the_other_part_are_refused(folder: Path, flags: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        tiny.asked(folder, "finetune", data=["x"], **flags)


# What is written


def test_what_is_written_loads_in_vgen_and_in_plain_diffusers(folder: Path, store: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    before = os.umask(0o027)
    try:
        run(folder, out, data=[store], **ALONG, save_dtype="bf16", max_train_steps=2)
    finally:
        os.umask(before)
    network = diffusers.CogVideoXTransformer3DModel.from_pretrained(out / "transformer", torch_dtype=torch.bfloat16)
    T5EncoderModel.from_pretrained(out / "text_encoder", torch_dtype=torch.bfloat16)
    diffusers.AutoencoderKLCogVideoX.from_pretrained(out / "vae")
    state, _ = load_tensors(out / "training" / "state.safetensors")
    for name, weight in network.state_dict().items():
        assert torch.equal(weight, state[f"ema/transformer.{name}"].bfloat16())
    made = generate(tiny.model(out), tiny.asked(out), tiny.ignore)["latents"]
    assert made.isfinite().all()
    files = [path for path in out.rglob("*") if path.is_file()]
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o640}
    assert not list(out.rglob(".*"))
    told = json.loads((out / "vgen.json").read_text())
    assert (told["family"], told["part"], told["tag"]) == ("cogvideox", "transformer", "out")


def test_the_autoencoder_measures_its_scale(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(folder, out, **PIXELS, max_train_steps=2)
    factor = json.loads((out / "vae" / "config.json").read_text())["scaling_factor"]
    x = torch.stack([clips.load(item, 9, 32, 32).pixels for item in clips.discover(["world:6"])])
    assert tiny.model(folder).encode(x)["mean"].square().mean().sqrt().item() * factor == pytest.approx(1, rel=0.3)


def test_sharded_weights_give_way_to_one_file(tmp_path: Path) -> None:
    base, out = tiny.checkpoint(tmp_path / "c", "5b"), tmp_path / "out"
    network = tiny.model(base).networks.get("transformer")
    network.save_pretrained(out / "transformer", max_shard_size="40KB")
    assert len(list((out / "transformer").iterdir())) > 3
    (base / "vgen.json").write_text('{"license": "mit", "files": {"vae/config.json": "sha256:0"}}')
    export(base, {"transformer": network}, out, {"family": "cogvideox"}, torch.float32)
    names = {path.name for path in (out / "transformer").iterdir()}
    assert names == {"config.json", "diffusion_pytorch_model.safetensors"}
    assert json.loads((out / "vgen.json").read_text()) == {"license": "mit", "family": "cogvideox"}
    assert torch.equal(make_first(out), make_first(base))


def make_first(folder: Path) -> Tensor:
    return next(iter(tiny.model(folder).networks.get("transformer").state_dict().values()))


def export_for_ever(base: Path, out: Path, ready: Any) -> None:
    network = tiny.model(base).networks.get("transformer")
    ready.set()
    for k in itertools.count():
        for p in network.parameters():
            p.data.fill_(k)
        export(base, {"transformer": network}, out, {}, torch.float32)


def test_a_kill_during_export_leaves_a_whole_checkpoint(folder: Path, tmp_path: Path) -> None:
    draw, out, fork = random.Random(0), tmp_path / "out", multiprocessing.get_context("fork")
    for k in range(6):
        ready = fork.Event()
        process = fork.Process(target=export_for_ever, args=(folder, out, ready))
        process.start()
        assert ready.wait(60)
        time.sleep(0.5 if k == 0 else draw.uniform(0, 0.1))
        process.kill()
        process.join()
        network = diffusers.CogVideoXTransformer3DModel.from_pretrained(out / "transformer")
        first = next(iter(network.parameters())).flatten()[0]
        assert all(bool((p == first).all()) for p in network.parameters())
        assert tiny.model(out).networks.get("vae") is not None
    export(folder, {"transformer": tiny.model(folder).networks.get("transformer")}, out, {}, torch.float32)
    assert not list(out.glob(".*"))
