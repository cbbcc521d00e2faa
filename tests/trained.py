"""Training runs of tests: data, options, and what a run leaves behind."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import tiny
import torch
from torch import Tensor

from vgen import clips
from vgen.finetune import finetune
from vgen.plugins.cogvideox import family
from vgen.tensorfile import load_tensors

FAST = {"train_batch_size": 2, "learning_rate": 3e-3, "lr_scheduler": "constant"}
MANY = 20


def stored(folder: Path, place: Path, inputs: list[str], size: tuple[int, int, int], captions: bool = True) -> str:
    """A store of clips of the world as latents."""
    items = clips.discover(inputs)
    if not captions:
        items = [replace(item, captions=()) for item in items]
    tiny.fill(tiny.model(folder), place, tiny.asked(folder, "encode", inputs=inputs), (items, size))
    return str(place)


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
