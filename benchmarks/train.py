"""How fast `vgen train-lora` trains beside a loop with diffusers and peft: ratios, as a table in Markdown.

The model has a random transformer of about 200 million parameters, a random autoencoder of the released shape (216
million) and the demo's text encoder; both sides train the same LoRA in bf16 on clips of 17x96x96, one in a step, in
processes that take turns.

    python benchmarks/train.py --page docs/benchmarks.md        # about 15 minutes on two quiet cores
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from speed import HERE, VGEN, process, tell

from vgen import registry
from vgen.family import family

START, END = "<!-- training results -->", "<!-- training end -->"
RANK, CLIPS, WARM = 16, 8, 2  # steps that are not counted
SIDE = 96  # pixels; the released autoencoder makes latents of an eighth
SHAPE = {"num_attention_heads": 16, "attention_head_dim": 64, "num_layers": 10, "time_embed_dim": 512}
SHAPE |= {"in_channels": 16, "out_channels": 16, "sample_height": SIDE // 8, "sample_width": SIDE // 8}


def base(folder: Path) -> None:
    """The demo with a large random transformer and an autoencoder of the released shape."""
    import torch
    from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel

    demo = registry.resolve(family("cogvideox"), "demo", accelerator=False).folder
    assert demo is not None
    shutil.copytree(demo, folder)
    config = json.loads((folder / "transformer" / "config.json").read_text())
    torch.manual_seed(0)
    network = CogVideoXTransformer3DModel.from_config({**config, **SHAPE}).to(torch.bfloat16)
    network.save_pretrained(folder / "transformer", max_shard_size="100GB")
    autoencoder = AutoencoderKLCogVideoX(sample_height=SIDE, sample_width=SIDE)  # all else as released
    autoencoder.to(torch.bfloat16).save_pretrained(folder / "vae", max_shard_size="100GB")
    print(f"{sum(p.numel() for p in network.parameters()) / 1e6:.0f} million parameters", file=sys.stderr)


def tensors(store: Path, folder: Path, path: Path) -> None:
    """The clips of a store as the plain loop takes them."""
    import torch

    from vgen.latents import scale
    from vgen.machine import machine
    from vgen.store import Store

    card = family("cogvideox")
    found = registry.resolve(card, str(folder), accelerator=False)
    model = card.loader()(folder, found.checkpoint, machine("cpu", "fp32"))
    opened = Store.open(store, space=model.space, text_space=model.text_space, mend="")
    pairs = []
    for record in opened.records():
        streams, told = opened.get(record["key"])
        x = scale(model.space, streams["mean"].float()).transpose(0, 1)[None]
        pairs.append((x, opened.text(told["captions"][0])["text"][None]))
    torch.save(pairs, path)


class Bench:
    """The runs. `work` holds what they read and write."""

    family, script = "cogvideox", "train_lora.py"

    def __init__(self, work: Path, steps: int) -> None:
        self.work, self.steps, self.home, self.count = work, steps, work / "home", 0
        self.folder, self.store, self.clips = work / "base", work / "store", work / "clips"
        self.apart(base, self.folder)
        process(sys.executable, HERE / "plain" / "clips.py", self.clips, CLIPS, SIDE, SIDE, home=self.home)
        for clip in self.clips.glob("*.mp4"):
            clip.with_suffix(".txt").write_text("a red ball moving left")
        size = ("--num-frames", 17, "--height", SIDE, "--width", SIDE)
        told = ("--checkpoint", self.folder, "--device", "cpu", "--seed", 1, "-o", self.store)
        process(VGEN, "encode", "cogvideox", self.clips, *size, *told, home=self.home)
        self.apart(tensors, self.store, self.folder, work / "latents.pt")

    @staticmethod
    def apart(act: Callable[..., Any], *given: Path) -> None:
        """Run a function in a process of its own: a child's peak counts from what this one had when it started it."""
        child = multiprocessing.get_context("spawn").Process(target=act, args=given)
        child.start()
        child.join()
        if child.exitcode:
            raise RuntimeError(f"{act.__name__} ended with {child.exitcode}")

    def vgen(self, steps: int, save_every: int = 10**6) -> dict[str, Any]:
        """Seconds of the steps and of the process, and its peak of memory."""
        self.count += 1
        out = self.work / f"lora-{self.count}"
        words = ("--checkpoint", self.folder, "--data", self.store, "--rank", RANK, "--max-train-steps", steps)
        more = ("--mixed-precision", "bf16", "--dtype", "bf16", "--checkpointing-steps", save_every, "--device", "cpu")
        took = process(VGEN, "train-lora", self.family, *words, *more, "--seed", 1, "-o", out, home=self.home)
        log = [json.loads(line) for line in (out / "training" / "log.jsonl").read_text().splitlines()]
        return {"steps": [line["seconds"] for line in log if "seconds" in line], "wall": took.wall, "mib": took.mib}

    def plain(self, steps: int, *source: object) -> dict[str, Any]:
        """The same of the plain loop, and seconds from its start to the end of its first step."""
        self.count += 1
        words = [self.folder, "--steps", steps, "--rank", RANK, "--out", self.work / f"plain-{self.count}", *source]
        script = [sys.executable, HERE / "plain" / self.script, *words]
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
        begun = os.times().elapsed
        done = subprocess.run([str(w) for w in script], env=env, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        return {**json.loads(done.stdout.splitlines()[-1]), "wall": os.times().elapsed - begun}

    def rows(self, pairs: int) -> list[str]:
        """The lines of the table."""
        cached, fresh = ("--latents", self.work / "latents.pt"), ("--clips", self.clips)
        ours, others, encoding, short, first, saving = [], [], [], [], [], []
        for i in range(pairs):
            print(f"pair {i + 1} of {pairs} ...", file=sys.stderr, flush=True)
            ours.append(self.vgen(self.steps))
            others.append(self.plain(self.steps, *cached))
            encoding.append(self.plain(self.steps, *fresh))
            short.append(self.vgen(1)["wall"])
            first.append(self.plain(1, *cached)["wall"])
            saving.append(self.vgen(self.steps, 2))
        step, other, slow = (median(median(run["steps"][WARM:]) for run in runs) for runs in (ours, others, encoding))
        mib, their_mib = (median(run["mib"] for run in runs) for runs in (ours, others))
        saves = self.steps // 2 - 1
        stall = median((a["wall"] - b["wall"]) / saves for a, b in zip(saving, ours, strict=True))
        start, their_start = median(short), median(first)
        return [
            line("steps/s, both from cached latents", 1 / step, 1 / other, other / step, ">= 1.1", other / step >= 1.1),
            line("steps/s, the other encodes clips", 1 / step, 1 / slow, slow / step, ">= 3", slow / step >= 3),
            line("peak memory, MiB", mib, their_mib, mib / their_mib, "<= 0.8", mib / their_mib <= 0.8),
            line("a whole run of one step, s", start, their_start, start / their_start, "", None),
            line("a save in mid-training, s (beside: a step)", stall, step, stall / step, "< 1", stall < step),
        ]


def figure(value: float) -> str:
    """Three figures, and all of those before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def line(name: str, ours: float, other: float, ratio: float, goal: str, met: bool | None) -> str:
    """A row of the table."""
    told = "" if met is None else "yes" if met else "no"
    return f"| {name} | {figure(ours)} | {figure(other)} | **{ratio:.2f}** | {goal} | {told} |"


def main() -> None:
    """Measure and print."""
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--steps", type=int, default=12)
    ask.add_argument("--pairs", type=int, default=5)
    ask.add_argument("--page", type=Path, help="put the table into this page, between its markers, too")
    given = ask.parse_args()
    with tempfile.TemporaryDirectory() as work:
        rows = Bench(Path(work), given.steps).rows(given.pairs)
    load = ", ".join(f"{x:.1f}" for x in os.getloadavg())
    head = ["| measured | vgen | other | ratio | goal | met |", "| --- | --- | --- | --- | --- | --- |"]
    about = f"{os.cpu_count()} cores, load {load}, {given.pairs} pairs."
    tell("\n".join([about, "", *head, *rows]), given.page, START, END)


if __name__ == "__main__":
    main()
