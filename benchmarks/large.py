"""What `vgen train-lora` takes at the released sizes of CogVideoX: steps per second, and memory while it samples too.

The 2b and the 5b have random weights here, and a text encoder of one layer: neither changes speed, nor the memory of
training. Clips of 49x480x720 are drawn, encoded and trained on by vgen's own verbs, one in a step, with recomputed
activations in bf16. Each run is a process, which tells the most memory that torch reserved: of a run that trains only,
and of the same run that samples a clip of a validation prompt half-way. Needs a CUDA device and 40 GB of disk.

    python benchmarks/large.py --page docs/benchmarks.md
    python benchmarks/large.py --tiny       # the same path with tiny networks on the CPU: shows that it runs, no more
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

from speed import tell

from vgen import registry
from vgen.family import family

START, END = "<!-- large results -->", "<!-- large end -->"
CLIPS, RANK, WARM = 4, 128, 2  # steps that are not counted
FAST = 4  # steps of sampling
RELEASED = {"in_channels": 16, "out_channels": 16, "time_embed_dim": 512, "text_embed_dim": 4096}
RELEASED |= {"attention_head_dim": 64, "sample_height": 60, "sample_width": 90, "sample_frames": 49}
RELEASED |= {"max_text_seq_length": 226, "temporal_compression_ratio": 4}
SIZES: dict[str, dict[str, Any]] = {  # what is changed in the demo's transformer
    "2b": {**RELEASED, "num_attention_heads": 30, "num_layers": 30, "use_rotary_positional_embeddings": False},
    "5b": {**RELEASED, "num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True},
}
TINY = {"num_attention_heads": 2, "num_layers": 2}  # all else as in the demo, its autoencoder and text encoder too


def base(folder: Path, shape: dict[str, Any]) -> int:
    """The demo with a random transformer, in bf16; for a released shape, all networks are. Returns how many weights."""
    import torch
    from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
    from transformers import T5Config, T5EncoderModel

    demo = registry.resolve(family("cogvideox"), "demo", accelerator=False).folder
    assert demo is not None
    shutil.copytree(demo, folder)
    told = {"family": "cogvideox", "defaults": {"num_inference_steps": FAST}}
    (folder / "vgen.json").write_text(json.dumps(told))
    config = {**json.loads((folder / "transformer" / "config.json").read_text()), **shape}
    torch.set_default_dtype(torch.bfloat16)
    torch.manual_seed(0)
    network = CogVideoXTransformer3DModel.from_config(config)
    network.save_pretrained(folder / "transformer", max_shard_size="1000GB")
    if "text_embed_dim" in shape:
        text = json.loads((folder / "text_encoder" / "config.json").read_text())
        wide = T5Config(**{**text, "d_model": shape["text_embed_dim"], "num_layers": 1})
        T5EncoderModel(wide).save_pretrained(folder / "text_encoder")
        AutoencoderKLCogVideoX().save_pretrained(folder / "vae", max_shard_size="1000GB")
    return sum(p.numel() for p in network.parameters())


def run(*words: object) -> float:
    """Run vgen in this process. Returns the most memory that torch reserved on a GPU, or the process had, in MiB."""
    from vgen.cli import main

    sys.argv = ["vgen", *map(str, words)]
    try:
        main()
    except SystemExit as end:
        if end.code:
            raise RuntimeError(f"{' '.join(sys.argv)} ended with {end.code}") from None
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved() / 2**20
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def apart(act: Callable[..., Any], *given: object) -> Any:
    """What a function gives that runs in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(act, *given).result()


def row(name: str, shape: dict[str, Any], steps: int, device: str, work: Path) -> str:
    """Measure one size; what it wrote is removed."""
    folder, store = work / "base", work / "store"
    weights = apart(base, folder, shape)
    common = ("cogvideox", "--checkpoint", folder, "--device", device, "--dtype", "bf16", "--seed", 1)
    apart(run, "encode", *common[:1], f"world:{CLIPS}", *common[1:], "-o", store)

    def trained(out: Path, *more: object) -> tuple[float, list[float]]:
        told = ("--rank", RANK, "--max-train-steps", steps, "--gradient-checkpointing", "--mixed-precision", "bf16")
        mib = apart(run, "train-lora", *common, "--data", store, *told, "-o", out, *more)
        log = [json.loads(line) for line in (out / "training" / "log.jsonl").read_text().splitlines()]
        return mib, [line["seconds"] for line in log if "seconds" in line][WARM:]

    alone, seconds = trained(work / "alone")
    validated, _ = trained(work / "shown", "--validation-prompt", "a red ball rising", "--validation-steps", steps // 2)
    shutil.rmtree(work)
    figures = f"{weights / 1e6:.0f} | {1 / median(seconds):.3g} | {alone:.0f} | {validated:.0f}"
    return f"| {name} | {figures} | **{validated / alone:.3f}** |"


def main() -> None:
    """Measure and print."""
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--steps", type=int, default=12)
    ask.add_argument("--only", nargs="*", choices=SIZES, help="some of the sizes")
    ask.add_argument("--tiny", action="store_true", help="tiny networks on the CPU: its figures mean nothing")
    ask.add_argument("--page", type=Path, help="put the table into this page, between its markers, too")
    ask.add_argument("--work", type=Path, help="folder for what it writes; temporary when absent")
    given = ask.parse_args()
    import torch

    if not given.tiny and not torch.cuda.is_available():
        ask.error("torch finds no CUDA device here. --tiny runs the same path on the CPU.")
    if given.steps < WARM + 2:
        ask.error(f"--steps must be {WARM + 2} or more: the first {WARM} are not counted.")
    sizes = {"tiny": TINY} if given.tiny else {name: SIZES[name] for name in given.only or SIZES}
    device = "cpu" if given.tiny else "cuda"
    with tempfile.TemporaryDirectory(dir=given.work) as work:
        rows = [row(name, shape, given.steps, device, Path(work) / name) for name, shape in sizes.items()]
    where = f"{os.cpu_count()} cores" if given.tiny else torch.cuda.get_device_name()
    memory = "resident memory" if given.tiny else "max_memory_reserved"
    head = "| size | million weights | steps/s | training alone, MiB | with a validation pass, MiB | ratio |"
    about = f"{where}, torch {torch.__version__}, rank {RANK}, {given.steps} steps; memory is {memory}."
    tell("\n".join([about, "", head, "| --- " * 6 + "|", *rows]), given.page, START, END)


if __name__ == "__main__":
    main()
