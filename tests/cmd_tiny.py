"""Tiny checkpoints of CMD with random weights, in diffusers' layout."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import tiny
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from vgen.family import resolve
from vgen.machine import Machine
from vgen.plugins.cmd import describe, family
from vgen.plugins.cmd.factored import FactoredAutoencoder
from vgen.plugins.cmd.model import CMD, load
from vgen.plugins.cmd.transformer import MotionTransformer
from vgen.plugins.sd import family as sd

CLASSES = 3
AUTOENCODER = {"width": 16, "depth": 1, "heads": 2, "head_width": 8, "motion_channels": 4}
MOTION = {"width": 32, "depth": 2, "heads": 2, "motion_channels": 4, "content_patch_size": 4, "text_width": 16}
INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.42.1",
    "feature_extractor": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "unet": ["diffusers", "UNet2DConditionModel"],
}
TEXT = {
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def image(folder: Path) -> Path:
    """Write an image model for 32x32 pixels (latents 8x8), which is what CMD starts from."""
    torch.manual_seed(0)
    small = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8, "sample_size": 8}
    UNet2DConditionModel(
        **small,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=8,
        cross_attention_dim=16,
    ).save_pretrained(folder / "unet")
    AutoencoderKL(
        block_out_channels=(8, 8, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4,
        scaling_factor=0.7,
    ).save_pretrained(folder / "vae")
    assert sd.demo is not None
    shutil.copytree(sd.demo / "tokenizer", folder / "tokenizer")
    told = json.loads((sd.demo / "text_encoder" / "config.json").read_text())
    text = CLIPTextConfig(**{**told, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2})
    CLIPTextModel(text).save_pretrained(folder / "text_encoder")
    DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False).save_pretrained(
        folder / "scheduler"
    )
    (folder / "model_index.json").write_text(json.dumps({**INDEX, **TEXT}))
    return folder


def awake(network: Any) -> Any:
    """A network whose terms all count: those that start at zero do no more."""
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return network


def checkpoint(folder: Path, **motion: Any) -> Path:
    """Write a checkpoint of clips of 4 frames of 32x32 pixels; `motion` changes the motion model."""
    image(folder)
    awake(FactoredAutoencoder(**AUTOENCODER, scaling_factor=1.5)).save_pretrained(folder / "autoencoder")
    awake(MotionTransformer(**{**MOTION, **motion})).save_pretrained(folder / "motion")
    (folder / "vgen.json").write_text(json.dumps({"family": "cmd", "tag": "tiny", "defaults": FEW}))
    return folder


FEW = {"num_frames": 4, "content_steps": 2, "motion_steps": 2}


def classes(folder: Path) -> Path:
    """Write a checkpoint on pixels, 16x16, that is told classes in place of text."""
    torch.manual_seed(0)
    UNet2DConditionModel(
        in_channels=3,
        out_channels=3,
        sample_size=16,
        block_out_channels=(16, 16),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        mid_block_type=None,
        up_block_types=("UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        num_class_embeds=CLASSES + 1,
    ).save_pretrained(folder / "unet")
    DDIMScheduler(clip_sample=False).save_pretrained(folder / "scheduler")
    awake(FactoredAutoencoder(**AUTOENCODER, in_channels=3, pixels=True)).save_pretrained(folder / "autoencoder")
    told = {"content_channels": 3, "text_width": 0, "classes": CLASSES, "learned_variance": False}
    awake(MotionTransformer(**{**MOTION, **told})).save_pretrained(folder / "motion")
    (folder / "model_index.json").write_text(json.dumps(INDEX))
    (folder / "vgen.json").write_text(json.dumps({"family": "cmd", "tag": "classes", "defaults": FEW}))
    return folder


def model(folder: Path, machine: Machine = tiny.CPU) -> CMD:
    """The model of a checkpoint folder."""
    return load(folder, describe(folder), machine)


def asked(folder: Path, verb: str = "sample", **flags: Any) -> Any:
    """Options of a verb, filled and checked as the command line does it."""
    told: dict[str, Any] = {"seed": 3, **({"prompt": "a red ball rising"} if verb == "sample" else {})}
    return resolve(family, family.verbs[verb](**{**told, **flags}), describe(folder))
