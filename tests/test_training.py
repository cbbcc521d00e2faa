"""A training run in its surroundings: resumed, killed, full disks, two at once, samples, trackers, bad data."""

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
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from shell import environment, vgen
from tiny import ignore
from trained import MANY, asked, log, run, same, state, stored

from vgen import logs, settings
from vgen.dataset import Batches
from vgen.errors import UsageError, VgenError
from vgen.finetune import batches, finetune
from vgen.generate import decode, generate
from vgen.lock import claimed
from vgen.plugins.cogvideox import family
from vgen.store import Store
from vgen.tensorfile import load_tensors
from vgen.video_write import write


@pytest.fixture(scope="module")
def store(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Twenty pictures of the world."""
    return stored(folder, tmp_path_factory.mktemp("data") / "store", [f"world:{MANY}"], (1, 32, 32))


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


class Notebook(GeneralTracker):
    """A tracker of accelerate's, with a file, and with something to say on stdout."""

    name, requires_logging_directory = "notebook", False

    def __init__(self, project: str, name: str, resume: str) -> None:
        super().__init__()
        self.lines = Path(name)

    @property
    def tracker(self) -> Path:
        return self.lines

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        print("hello")

    def log(self, values: dict[str, Any], step: int | None = None, **more: Any) -> None:
        with self.lines.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")


def test_a_tracker_gets_no_line_twice_and_not_our_stdout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "notebook", Notebook)
    path, book = tmp_path / "log.jsonl", tmp_path / "book"
    told = [{"step": i, "loss": i / 10} for i in (1, 2, 3)]
    with logs.opened(path, 0, "notebook", str(book)) as written:
        for line in told:  # and then it is killed; its state has seen one step
            written.write(line)
    again = [*told[1:], {"step": 3, "eval_loss": 0.5}, {"step": 4, "loss": 0.4}]
    with logs.opened(path, 1, "notebook", str(book)) as written:
        for line in again:
            written.write(line)
    assert logs.lines(book) == logs.lines(path) == [told[0], *again]
    assert capsys.readouterr().out == ""


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
