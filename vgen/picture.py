"""A picture of a text, by any family that makes pictures: what families that start from a picture are given."""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch import Tensor

from vgen import registry
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
    return _covering(frames[0], size)


def _covering(frame: Tensor, size: tuple[int, int]) -> Tensor:
    """A frame (h, w, 3) of 8 bits, scaled to cover `size` and cut at the centre, as pixels (3, H, W) in [-1, 1]."""
    height, width = size
    tall, wide, _ = frame.shape
    scale = max(height / tall, width / wide)
    rows, columns = max(height, round(tall * scale)), max(width, round(wide * scale))
    pixels = frame.permute(2, 0, 1)[None].float()
    if (rows, columns) != (tall, wide):
        pixels = torch.nn.functional.interpolate(pixels, (rows, columns), mode="bicubic", antialias=True)
    top, left = (rows - height) // 2, (columns - width) // 2
    return pixels[0, :, top : top + height, left : left + width].clamp(0, 255) / 127.5 - 1
