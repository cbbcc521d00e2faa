"""A picture of a text, by any family that makes pictures: what families that start from a picture are given."""

from __future__ import annotations

import gc
from typing import Any

from torch import Tensor

from vgen import registry
from vgen.clips import cover
from vgen.family import Family, resolve
from vgen.generate import decode, generate
from vgen.machine import Machine
from vgen.registry import Found


def picture(card: Family, found: Found, prompt: str, seed: int, size: tuple[int, int], machine: Machine) -> Tensor:
    """Pixels (3, H, W) in [-1, 1] of one picture, at the checkpoint's own size, brought to cover `size` (H, W).

    The networks leave memory before it is returned. Raises UsageError where the checkpoint cannot make it.
    """
    ready = found if found.folder else registry.download(card, found)
    kind: Any = card.options("sample")
    options = resolve(card, kind(prompt=prompt, seed=seed, num_frames=1), ready.checkpoint)
    model = card.loader()(ready.folder, ready.checkpoint, machine)
    frames = decode(model, generate(model, options, lambda name, i, n: None))[0]
    del model
    gc.collect()
    return cover(frames, *size)[0][:, 0]
