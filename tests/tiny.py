"""Tiny checkpoints of CogVideoX with random weights, in diffusers' layout, and what tests of all families share."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
from transformers import T5Config, T5EncoderModel

from vgen.clips import Item, Size
from vgen.encode import Encoded, embed_captions, encode
from vgen.family import Family, resolve
from vgen.machine import Machine
from vgen.plugins.cogvideox import describe, family
from vgen.plugins.cogvideox.model import CogVideoX, load
from vgen.store import Store

DEMO = family.demo
assert DEMO is not None
CPU = Machine(torch.device("cpu"), torch.float32)
KINDS: dict[str, dict[str, Any]] = {  # what each kind changes in the transformer's configuration
    "2b": {"use_rotary_positional_embeddings": False},
    "5b": {},
    "5b-i2v": {"in_channels": 8, "use_learned_positional_embeddings": True},
    "1.5-5b": {"patch_size_t": 2, "patch_bias": False, "sample_frames": 17},
    "1.5-5b-i2v": {
        "patch_size_t": 2,
        "patch_bias": False,
        "sample_frames": 17,
        "in_channels": 8,
        "ofs_embed_dim": 16,
    },
}


def _transformer(kind: str) -> CogVideoXTransformer3DModel:
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 4,
        "time_embed_dim": 16,
        "text_embed_dim": 16,
        "num_layers": 2,
        "sample_width": 8,
        "sample_height": 8,
        "sample_frames": 9,
        "max_text_seq_length": 8,
        "use_rotary_positional_embeddings": True,
    }
    return CogVideoXTransformer3DModel(**{**config, **KINDS[kind]})


def _vae(kind: str) -> AutoencoderKLCogVideoX:
    return AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 16),
        down_block_types=("CogVideoXDownBlock3D",) * 3,
        up_block_types=("CogVideoXUpBlock3D",) * 3,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=4,
        sample_height=32,
        sample_width=32,
        scaling_factor=0.7,
        invert_scale_latents=kind == "1.5-5b-i2v",
    )


def checkpoint(folder: Path, kind: str = "5b", *, sampler: str = "DDIM", seed: int = 0) -> Path:
    """Write a checkpoint of 9 frames of 32x32 pixels (latents 3x8x8) to `folder`; `sampler` is DDIM or DPM."""
    torch.manual_seed(seed)
    shutil.copytree(DEMO / "tokenizer", folder / "tokenizer")
    told = json.loads((DEMO / "text_encoder" / "config.json").read_text())
    t5 = T5EncoderModel(T5Config(**{**told, "d_model": 16, "d_kv": 8, "num_heads": 2, "d_ff": 32}))
    t5.save_pretrained(folder / "text_encoder")
    network = _transformer(kind)
    with torch.no_grad():  # the released initialisation is near the identity: make every term count
        for p in network.parameters():
            p.add_(0.05 * torch.randn_like(p))
    network.save_pretrained(folder / "transformer")
    _vae(kind).save_pretrained(folder / "vae")
    scheduler = json.loads((DEMO / "scheduler" / "scheduler_config.json").read_text())
    scheduler["_class_name"] = f"CogVideoX{sampler}Scheduler"
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    index = json.loads((DEMO / "model_index.json").read_text())
    (folder / "model_index.json").write_text(
        json.dumps({**index, "scheduler": ["diffusers", scheduler["_class_name"]]})
    )
    return folder


def model(folder: Path, machine: Machine = CPU) -> CogVideoX:
    """The model of a checkpoint folder."""
    return load(folder, describe(folder), machine)


def asked(folder: Path, verb: str = "sample", *, card: Family = family, **flags: Any) -> Any:
    """Options of a verb, filled and checked as the command line does it."""
    assert card.describe is not None
    told = {"seed": 3, "num_inference_steps": 4, "prompt": "a red ball rising"} if verb == "sample" else {"seed": 3}
    return resolve(card, card.verbs[verb](**{**told, **flags}), card.describe(folder))


def ignore(*_: Any) -> None:
    """Nobody watches."""


def opened(model: Any, place: Path) -> Store:
    """A store, made if it is not there."""
    return Store.open(place, space=model.space, text_space=model.text_space, create=True)


def fill(model: Any, place: Path, told: Any, *some: tuple[Sequence[Item], Size]) -> list[Encoded]:
    """Encode clips of several sizes, with their texts, into a store; `told` are options of encode."""
    store = opened(model, place)
    embed_captions(model, store, [item for items, _ in some for item in items], ignore)
    return [one for items, size in some for one in encode(model, store, items, [size], told, ignore)]
