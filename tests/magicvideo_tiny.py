"""Tiny checkpoints of MagicVideo with random weights, in diffusers' layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cmd_tiny
import tiny
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from vgen.family import resolve
from vgen.grow import grown
from vgen.machine import Machine
from vgen.plugins.magicvideo import describe, family, plan
from vgen.plugins.magicvideo.decoder import VideoDecoder
from vgen.plugins.magicvideo.model import MagicVideo, load
from vgen.temporal import Temporal

FRAMES = 4
FEW = {"num_frames": FRAMES, "num_inference_steps": 2}


def image(folder: Path, *, pictures: bool = True) -> Path:
    """Write an image model for 32x32 pixels (latents 8x8), maybe with an image encoder: what training starts from."""
    cmd_tiny.image(folder)
    if pictures:
        small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        vision = CLIPVisionConfig(**small, image_size=32, patch_size=16, projection_dim=16)
        CLIPVisionModelWithProjection(vision).save_pretrained(folder / "image_encoder")
    return folder


def checkpoint(folder: Path, mask: str = "pre") -> Path:
    """Write a checkpoint with all networks, whose layers in time do something."""
    image(folder)
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    cmd_tiny.awake(Temporal(plan.unet(unet, FRAMES, mask, "frame"))).save_pretrained(folder / "temporal")
    wide = grown(unet, in_channels=9)
    cmd_tiny.awake(wide).save_pretrained(folder / "interpolator")
    layers = Temporal(plan.unet(wide, 5, mask, "frame"))
    cmd_tiny.awake(layers).save_pretrained(folder / "interpolator_temporal")
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    told = json.loads((folder / "vae" / "config.json").read_text())
    decoder = VideoDecoder(told, plan.decoder(vae, mask)).copy_of(vae)
    cmd_tiny.awake(decoder).save_pretrained(folder / "video_decoder")
    (folder / "vgen.json").write_text(json.dumps({"family": "magicvideo", "tag": "tiny", "defaults": FEW}))
    return folder


def model(folder: Path, machine: Machine = tiny.CPU) -> MagicVideo:
    """The model of a checkpoint folder."""
    return load(folder, describe(folder), machine)


def asked(folder: Path, verb: str = "sample", **flags: Any) -> Any:
    """Options of a verb, filled and checked as the command line does it."""
    told: dict[str, Any] = {"seed": 3, **({"prompt": "a red ball rising"} if verb == "sample" else {})}
    return resolve(family, family.verbs[verb](**{**told, **flags}), describe(folder))


def noise(*shape: int) -> torch.Tensor:
    """The same noise each time."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(7))
