"""A training run in its surroundings: killed, full disks, two at once, held-out clips, samples, trackers, bad data."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from shell import environment, vgen
from torch import Tensor, nn

from vgen import clips, diffusion, settings, train
from vgen.dataset import Batches, hold_out
from vgen.encode import embed_captions, encode
from vgen.errors import UsageError, VgenError
from vgen.finetune import batches, finetune
from vgen.generate import decode, generate
from vgen.lock import claimed
from vgen.plugins.cogvideox import family
from vgen.store import Store
from vgen.tensorfile import load_tensors
from vgen.video_write import write

FAST = {"train_batch_size": 2, "learning_rate": 3e-3, "lr_scheduler": "constant"}
MANY = 20


def ignore(*_: Any) -> None:
    """Nobody watches."""


def stored(folder: Path, place: Path, inputs: list[str], size: tuple[int, int, int], captions: bool = True) -> str:
    """A store of clips of the world as latents."""
    model, items = tiny.model(folder), clips.discover(inputs)
    made = Store.open(place, space=model.space, text_space=model.text_space, create=True)
    told = tiny.asked(folder, "encode", inputs=inputs)
    embed_captions(model, made, items, ignore)
    if not captions:
        items = [type(item)(item.path, (), item.kind, item.world) for item in items]
    list(encode(model, made, items, [size], told, ignore))
    return str(place)


@pytest.fixture(scope="module")
def store(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Twenty pictures of the world."""
    return stored(folder, tmp_path_factory.mktemp("data") / "store", [f"world:{MANY}"], (1, 32, 32))


def asked(folder: Path, output: Path, **flags: Any) -> Any:
    return tiny.asked(folder, "finetune", **{"max_train_steps": 2, **FAST, **flags}, output=output)


def run(folder: Path, output: Path, **flags: Any) -> dict[str, Any]:
    return finetune(family, tiny.model(folder), folder, asked(folder, output, **flags), tiny.CPU)


def log(output: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (output / "training" / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def state(output: Path) -> dict[str, Tensor]:
    return load_tensors(output / "training" / "state.safetensors")[0]


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether all is equal to the bit, NaN too."""
    return a.keys() == b.keys() and all(bits(t) == bits(b[name]) for name, t in a.items())


def bits(tensor: Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


# Optimizers


@pytest.mark.parametrize("optimizer", ["muon", "adamw8bit"])
def test_other_optimizers_resume_to_the_bit(folder: Path, store: str, tmp_path: Path, optimizer: str) -> None:
    told = {"data": [store], "optimizer": optimizer}
    run(folder, tmp_path / "whole", **told, max_train_steps=4)
    run(folder, tmp_path / "half", **told, max_train_steps=2)
    run(folder, tmp_path / "half", **told, max_train_steps=4, resume=True)
    assert same(state(tmp_path / "whole"), state(tmp_path / "half"))
    eight = [t for name, t in state(tmp_path / "half").items() if t.dtype == torch.uint8]
    assert bool(eight) == (optimizer == "adamw8bit")


@pytest.mark.parametrize("optimizer", ["paged-adamw", "paged-adamw8bit"])
def test_paged_optimizers_need_an_accelerator(folder: Path, store: str, tmp_path: Path, optimizer: str) -> None:
    with pytest.raises(UsageError, match="pages its state"):
        run(folder, tmp_path / "out", data=[store], optimizer=optimizer)
    assert not (tmp_path / "out").exists()


# Gradients


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 2, 3)])
def test_accumulated_gradients_are_those_of_one_batch(folder: Path, store: str, tmp_path: Path, sizes: Any) -> None:
    """One forward pass over all clips, by hand, with the times and the noise that the micro-batches draw."""
    told = asked(folder, tmp_path, data=[store])
    data, part = batches(family, tiny.model(folder), told), tiny.model(folder).part("transformer", told)
    (network,) = part.modules.values()
    some = [{k: v[:n] for k, v in {**data(i), **_more(data, i)}.items()} for i, n in enumerate(sizes)]
    loss = train.gradients(part, some, told, tiny.CPU, 7, torch.amp.GradScaler("cpu", enabled=False))
    found = [p.grad.clone() for p in network.parameters()]
    network.zero_grad()

    times, noise = [], []
    for k, batch in enumerate(some):
        generator = train.seeded(told.seed, "noise", 7, k)
        times.append(diffusion.sample_times(part.process, sizes[k], generator, (k, len(sizes))))
        noise.append(torch.randn(batch["latents"].shape, generator=generator))
    t, e, x = torch.cat(times), torch.cat(noise), torch.cat([batch["latents"] for batch in some])
    a, s = diffusion.levels(part.process, t, x)
    text = torch.cat([batch["text"] for batch in some])
    out = diffusion.call(part.predict, part.process, a * x + s * e, t, {"text": text})
    whole = (out - diffusion.target("v", x, e, a, s)).square().mean()
    whole.backward()
    assert loss == pytest.approx(whole.item(), rel=1e-5)
    for p, grad in zip(network.parameters(), found, strict=True):
        assert torch.allclose(p.grad, grad, atol=1e-6 * max(1.0, float(p.grad.abs().max())))
    shares = [int(one * len(sizes) / 1000) for one in torch.cat(times)]
    assert shares == [k for k, n in enumerate(sizes) for _ in range(n)]


def _more(data: Any, i: int) -> dict[str, Any]:
    """A batch of three clips, made of two."""
    first, then = data(2 * i), data(2 * i + 1)
    return {k: torch.cat([v, then[k]]) if isinstance(v, Tensor) else [*v, *then[k]] for k, v in first.items()}


def test_each_time_by_itself_where_that_is_asked_for() -> None:
    process = diffusion.cogvideox()
    draws = [diffusion.sample_times(process, 8, torch.Generator().manual_seed(i), None) for i in range(40)]
    strata = [sorted((t // 125).long().tolist()) for t in draws]
    assert list(range(8)) not in strata
    assert torch.cat(draws).mean() == pytest.approx(500, abs=60)


class Fragile:
    """A part that breaks on some clips: in its loss (NaN), or in its gradient alone (great numbers)."""

    name = "fragile"

    def __init__(self) -> None:
        self.modules = {"net": nn.Linear(1, 1)}

    def loss(self, batch: dict[str, Any], generator: torch.Generator) -> Tensor:
        net = self.modules["net"]
        made = net(batch["x"].clamp(max=1)).mean()
        steep = (net.weight - net.weight.detach()).abs().sqrt().sum()  # 0, with a slope that is not finite
        return made + steep if bool((batch["x"] > 1e30).any()) else made


@pytest.mark.parametrize(("value", "says"), [(torch.nan, "loss became nan"), (3e38, "norm of the gradients became")])
def test_the_one_clip_that_breaks_is_found(folder: Path, tmp_path: Path, value: float, says: str) -> None:
    told = asked(folder, tmp_path, data=["x"], gradient_accumulation_steps=3)

    def batch(i: int) -> dict[str, Any]:
        x = torch.tensor([[1.0], [value if i == 4 else 0.5]])
        return {"x": x, "keys": [f"good-{i}", "bad" if i == 4 else f"fine-{i}"]}

    with pytest.raises(VgenError, match=rf"{says}.* at step 2, on: bad\."):
        train.fit(Fragile(), batch, told, tiny.CPU, tmp_path, train.Between(ignore))  # type: ignore[arg-type]


def test_only_what_is_named_trains(folder: Path, store: str, tmp_path: Path) -> None:
    out, told = tmp_path / "out", {"data": [store], "trainable": ["transformer_blocks.1.attn1", "proj_out"]}
    run(folder, out, **told, max_train_steps=1)
    run(folder, out, **told, resume=True)
    before, after = (tiny.model(where).networks.get("transformer").state_dict() for where in (folder, out))
    changed = {name for name, weight in after.items() if not torch.equal(weight, before[name])}
    assert changed == {n for n in after if n.startswith(("transformer_blocks.1.attn1.", "proj_out."))}
    kept = [name for name in state(out) if name.startswith("weights/")]
    assert len(kept) == len(changed) + len([n for n in kept if n.endswith("pos_embedding")])
    with pytest.raises(UsageError, match=r"--trainable proj_in: no weight .*\n.*Did you mean 'proj(_out)?'"):
        run(folder, tmp_path / "no", data=[store], trainable=["proj_in"])


# Held-out clips


def test_some_clips_are_held_out_and_evaluated(folder: Path, store: str, tmp_path: Path) -> None:
    told = {"data": [store], "eval_share": 0.15, "eval_steps": 2, "ema_decay": 0.5, "max_train_steps": 3}
    run(folder, tmp_path / "a", **told)
    run(folder, tmp_path / "b", **told)
    lines = [line for line in log(tmp_path / "a") if "eval_loss" in line]
    assert lines == [line for line in log(tmp_path / "b") if "eval_loss" in line]
    assert [line["step"] for line in lines] == [0, 2, 3]
    for line in lines:
        bands = [line[f"eval_loss_band_{band}"] for band in range(4)]
        assert line["eval_loss"] == pytest.approx(sum(bands) / 4)
    data = batches(family, tiny.model(folder), asked(folder, tmp_path, data=[store], eval_share=0.15))
    held = {key for make in data.held for key in make()["keys"]}
    assert len(held) == 3
    assert held.isdisjoint(key for i in range(40) for key in data(i)["keys"])
    # by hand, on the average that was exported
    part = tiny.model(tmp_path / "a").part("transformer", asked(folder, tmp_path, data=[store]))
    again = train.evaluate(part, data.held, 3)
    assert again == pytest.approx({k: v for k, v in lines[-1].items() if k != "step"}, rel=1e-5)


def test_evaluation_changes_nothing(folder: Path, store: str, tmp_path: Path) -> None:
    for name, every in (("often", 1), ("never", 0)):
        run(folder, tmp_path / name, data=[store], eval_steps=every, part="transformer")
    assert same(state(tmp_path / "often"), state(tmp_path / "never"))
    pixels = {"part": "autoencoder", "data": ["world:17"], "num_frames": 1, "max_train_steps": 1}
    for name, every in (("ae-often", 1), ("ae-never", 0)):
        run(folder, tmp_path / name, **pixels, eval_steps=every)
    assert same(state(tmp_path / "ae-often"), state(tmp_path / "ae-never"))
    assert {"step", "eval_loss"} == set(log(tmp_path / "ae-often")[0])


def test_what_is_held_out() -> None:
    assert hold_out({"a": range(15)}, 0.5, 1)[1] == {}
    assert hold_out({"a": range(40)}, 0.0, 1)[1] == {}
    train_on, held = hold_out({"a": range(30), "alone": [99]}, 0.02, 1)
    assert train_on["alone"] == [99]
    assert len(held["a"]) == 1
    assert sorted([*train_on["a"], *held["a"]]) == list(range(30))
    assert len(hold_out({"a": range(1000)}, 0.5, 1)[1]["a"]) == 4
    assert hold_out({"a": range(1000)}, 0.5, 1) == hold_out({"a": range(1000)}, 0.5, 1)


# What a resume depends on


def test_a_resume_with_anything_else_is_refused_and_shown(folder: Path, store: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(folder, out, data=[store])
    with pytest.raises(UsageError, match=r"--caption-dropout +0.1 +0.2\n +--learning-rate +0.003 +0.001\n"):
        run(folder, out, data=[store], learning_rate=1e-3, caption_dropout=0.2, resume=True)
    more = stored(folder, tmp_path / "more", [f"world:{MANY + 1}"], (1, 32, 32))
    with pytest.raises(UsageError, match=rf"data: clips +{MANY} +{MANY + 1}\n"):
        run(folder, out, data=[more], resume=True)
    other = tiny.checkpoint(tmp_path / "other", "5b")
    weights = other / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"abcd")
    with pytest.raises(UsageError, match=r"then +now\n +transformer/diffusion_pytorch_model.safetensors +sha256:\w+"):
        run(other, out, data=[store], resume=True)
    run(folder, tmp_path / "cosine", data=[store], lr_scheduler="cosine")
    with pytest.raises(UsageError, match=r"--max-train-steps +2 +4\n"):
        run(folder, tmp_path / "cosine", data=[store], lr_scheduler="cosine", max_train_steps=4, resume=True)


def test_a_store_may_move_and_the_record_says_what_was_resumed(folder: Path, store: str, tmp_path: Path) -> None:
    first = run(folder, tmp_path / "out", data=[store])
    assert "resumed" not in first
    (tmp_path / "elsewhere").symlink_to(store)
    told = {"data": [str(tmp_path / "elsewhere")], "max_train_steps": 3, "checkpointing_steps": 1, "resume": True}
    resumed = run(folder, tmp_path / "out", **told)["resumed"]
    assert resumed["step"] == 2
    again = run(folder, tmp_path / "out", **{**told, "max_train_steps": 4})["resumed"]
    record = load_tensors(tmp_path / "out" / "training" / "state.safetensors")[1]
    assert record["resumed"] == [resumed, again]
    manifest = json.loads((tmp_path / "out" / "vgen.json").read_text())
    assert manifest["data"][0]["clips"] == MANY
    assert manifest["run"]["verb"] == "finetune"
    assert "transformer/diffusion_pytorch_model.safetensors" in manifest["base"]["files"]


# Processes


def train_for_ever(folder: Path, told: Any) -> None:
    finetune(family, tiny.model(folder), folder, told, tiny.CPU)


def test_killed_at_any_moment_it_goes_on_to_the_same_end(folder: Path, store: str, tmp_path: Path) -> None:
    """Killed four times, over epochs of ten batches and states every five steps."""
    draw, out, fork = random.Random(1), tmp_path / "killed", multiprocessing.get_context("fork")
    flags = {"data": [store], "checkpointing_steps": 5, "eval_steps": 5, "ema_decay": 0.9}
    for k in range(4):
        told = asked(folder, out, **flags, max_train_steps=10**6, resume=k > 0)
        process = fork.Process(target=train_for_ever, args=(folder, told))
        process.start()
        while not (out / "training" / "state.safetensors").exists():
            assert process.is_alive()
            time.sleep(0.01)
        time.sleep(draw.uniform(0.1, 0.6))
        process.kill()
        process.join()
    done = load_tensors(out / "training" / "state.safetensors")[1]["step"]
    end = (done // 10 + 1) * 10
    run(folder, out, **flags, max_train_steps=end, resume=True)
    run(folder, tmp_path / "whole", **{**flags, "checkpointing_steps": 500}, max_train_steps=end)
    assert same(state(tmp_path / "whole"), state(out))
    assert log(tmp_path / "whole") == log(out)


def test_ctrl_c_saves_and_meanwhile_nobody_else_may_write(folder: Path, store: str, tmp_path: Path) -> None:
    """One process: its folder is refused to others, then it is interrupted, and goes on by the record it left."""
    out = tmp_path / "out"
    line = [sys.executable, "-m", "vgen.cli", "finetune", "cogvideox", "--checkpoint", str(folder), "--data", store]
    line += ["--max-train-steps", "100000", "--lr-scheduler", "constant", "--seed", "3", "-o", str(out)]
    process = subprocess.Popen(line, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (len(log(out)) if (out / "training" / "log.jsonl").exists() else 0):
        time.sleep(0.1)
    try:
        for flags in ({"resume": True}, {"overwrite": True}, {}):
            with pytest.raises(UsageError, match=f"another run .process {process.pid} on "):
                run(folder, out, data=[store], **flags)
    finally:
        process.send_signal(signal.SIGINT)
        printed, said = process.communicate(timeout=60)
    assert (process.returncode, printed) == (130, ""), said
    again = re.search(r"To go on: vgen (finetune .* --resume)", said)
    assert again
    done = load_tensors(out / "training" / "state.safetensors")[1]["step"]
    assert done == len([one for one in log(out) if "loss" in one]) > 0
    assert (out / "transformer" / "diffusion_pytorch_model.safetensors").exists()
    assert not list((out / "training").glob("run*"))
    assert str(out / "run.toml") in again[1]
    told = {k: v for k, v in settings.read(out / "run.toml").items() if k not in ("checkpoint", "output")}
    assert run(folder, out, **{**told, "max_train_steps": done + 1, "resume": True})["step"] == done + 1


def test_a_lock_is_of_one_process_and_leaves_nothing(tmp_path: Path) -> None:
    with claimed(tmp_path / "a" / "b"), pytest.raises(UsageError, match="another run"), claimed(tmp_path / "a" / "b"):
        pass
    assert not list(tmp_path.iterdir())


def train_on_a_small_disk(folder: Path, told: Any, size: int, said: Any) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    try:
        finetune(family, tiny.model(folder), folder, told, tiny.CPU)
    except VgenError as error:
        said.send(str(error))


@pytest.mark.parametrize("which", ["the state", "the weights"])
def test_a_full_disk_leaves_a_whole_state_and_checkpoint(folder: Path, store: str, tmp_path: Path, which: str) -> None:
    out, fork = tmp_path / "out", multiprocessing.get_context("fork")
    run(folder, out, data=[store], max_train_steps=2, save_dtype="fp32")
    kept = out / "training" / "state.safetensors"
    weights = out / "transformer" / "diffusion_pytorch_model.safetensors"
    before = {path: path.read_bytes() for path in (kept, weights)}
    told = asked(folder, out, data=[store], max_train_steps=4, resume=True)
    size = (kept if which == "the state" else weights).stat().st_size - 8
    if which == "the weights":  # an autoencoder keeps no moments: the state is the smaller file
        told.max_train_steps = 2
    ours, theirs = fork.Pipe()
    process = fork.Process(target=train_on_a_small_disk, args=(folder, told, size, theirs))
    process.start()
    process.join(120)
    assert ours.poll(), process.exitcode
    assert re.search("Free some", ours.recv())
    assert {path: path.read_bytes() for path in (kept, weights)} == before
    assert not [path for path in out.rglob("*") if path.name.startswith(".")]
    assert run(folder, out, data=[store], max_train_steps=4, resume=True)["step"] == 4


# Samples while training


def test_validation_clips_are_of_the_weights_as_they_are(folder: Path, store: str, tmp_path: Path) -> None:
    base, out = shutil.copytree(folder, tmp_path / "base"), tmp_path / "out"
    (base / "vgen.json").write_text('{"defaults": {"num_inference_steps": 2}}')
    model, prompts = tiny.model(base), ["a red ball rising", "a blue cube"]
    told = {"data": [store], "learning_rate": 1e-1, "ema_decay": 0.5}
    shown = asked(base, out, **told, validation_prompt=prompts, validation_steps=2)
    finetune(family, model, base, shown, tiny.CPU)
    assert set(model.networks.loaded) == {"transformer"}
    assert sorted(path.name for path in (out / "validation").iterdir()) == ["000002-0.mp4", "000002-1.mp4"]
    # the same as a sample of what was exported
    exported, given = tiny.model(out), tiny.asked(out, prompt=prompts[1], num_inference_steps=2, vae_tiling=True)
    frames = decode(exported, generate(exported, given, ignore))[0]
    write(tmp_path / "clip.mp4", frames, Fraction(8), metadata={"prompt": prompts[1], "step": 2})
    assert (tmp_path / "clip.mp4").read_bytes() == (out / "validation" / "000002-1.mp4").read_bytes()
    run(base, tmp_path / "plain", **told)
    assert same(state(out), state(tmp_path / "plain"))


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"validation_prompt": ["a ball"], "train_text_encoder": True}, "exclude each other"),
        ({"validation_image": Path("x.png")}, "--validation-image is where"),
        ({"validation_prompt": [""]}, "The prompt is empty"),
        ({"report_to": "wandb"}, r"pip install 'vgen\[wandb\]'"),
    ],
)
def test_what_cannot_be_shown_is_said_before_weights_load(
    folder: Path, store: str, tmp_path: Path, flags: dict[str, Any], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.model(folder)
    monkeypatch.setitem(sys.modules, "wandb", None)  # as where it is not installed
    with pytest.raises(UsageError, match=says):
        finetune(family, model, folder, asked(folder, tmp_path / "out", data=[store], **flags), tiny.CPU)
    assert not model.networks.loaded
    assert not (tmp_path / "out").exists()


def test_tensorboard_has_every_figure_once_also_after_a_resume(folder: Path, store: str, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out, told = tmp_path / "out", {"data": [store], "report_to": "tensorboard", "checkpointing_steps": 2}
    run(folder, out, **told, max_train_steps=2)
    run(folder, out, **told, max_train_steps=4, resume=True)
    events = EventAccumulator(str(out / "training" / "tensorboard")).Reload()
    seen = [(event.step, event.value) for event in events.Scalars("loss")]
    assert seen == [(line["step"], pytest.approx(line["loss"])) for line in log(out) if "loss" in line]
    assert "eval_loss_band_3" in events.Tags()["scalars"]


# Data


def test_training_on_a_store_loads_one_network(folder: Path, store: str, tmp_path: Path) -> None:
    model = tiny.model(folder)
    finetune(family, model, folder, asked(folder, tmp_path / "out", data=[store]), tiny.CPU)
    assert set(model.networks.loaded) == {"transformer"}


def test_an_empty_store_is_refused(folder: Path, tmp_path: Path) -> None:
    model = tiny.model(folder)
    Store.open(tmp_path / "store", space=model.space, text_space=model.text_space, create=True)
    with pytest.raises(VgenError, match="nothing to train on"):
        finetune(family, model, folder, asked(folder, tmp_path / "out", data=[str(tmp_path / "store")]), tiny.CPU)
    assert not model.networks.loaded


def test_clips_without_captions_train_only_without_any(folder: Path, tmp_path: Path) -> None:
    bare = stored(folder, tmp_path / "bare", ["world:3"], (1, 32, 32), captions=False)
    with pytest.raises(UsageError, match=r"3 of 3 clips have no caption: .*\n.*--caption-dropout 1"):
        run(folder, tmp_path / "out", data=[bare])
    assert run(folder, tmp_path / "out", data=[bare], caption_dropout=1.0)["step"] == 2


def test_a_clip_shorter_than_the_rest_is_told_and_comes_once_in_its_batch(folder: Path, tmp_path: Path) -> None:
    place = stored(folder, tmp_path / "mixed", ["world:3"], (1, 32, 32))
    stored(folder, tmp_path / "mixed", ["world:1:9"], (9, 32, 32))
    heard: list[str] = []
    told = asked(folder, tmp_path / "out", data=[place], max_train_steps=3)
    finetune(family, tiny.model(folder), folder, told, tiny.CPU, on_note=heard.append)
    assert heard == ["Only 1 clip of shape 4x3x8x8: its batches hold 1, not 2."]
    data = batches(family, tiny.model(folder), told)
    for i in range(6):
        keys = data(i)["keys"]
        assert len(set(keys)) == len(keys)
    assert sorted(Batches({"all": "abc"}, 5, seed=1).of(0)) == ["a", "b", "c"]


def test_a_learning_rate_of_nothing_is_refused(store: str, tmp_path: Path) -> None:
    done = vgen("finetune", "cogvideox", "--data", store, "--learning-rate", "0", "-o", tmp_path / "out", "--dry-run")
    assert done.code == 2
    assert "--learning-rate: 0 is out of range" in done.err
    assert not os.path.lexists(tmp_path / "out")
