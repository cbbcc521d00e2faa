"""Tiny checkpoints of Stable Video Diffusion with random weights, in diffusers' layout, and pictures to start from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import tiny
import torch
from diffusers import AutoencoderKLTemporalDecoder, EulerDiscreteScheduler, UNetSpatioTemporalConditionModel
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from vgen import world
from vgen.machine import Machine
from vgen.plugins.sd import family as sd
from vgen.plugins.svd import describe, family
from vgen.plugins.svd.model import StableVideoDiffusion, load

SCHEDULER = {  # as released
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "interpolation_type": "linear",
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "sigma_min": 0.002,
    "sigma_max": 700.0,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "timestep_type": "continuous",
    "use_karras_sigmas": True,
}
INDEX = {
    "_class_name": "StableVideoDiffusionPipeline",
    "_diffusers_version": "0.24.0.dev0",
    "feature_extractor": ["transformers", "CLIPImageProcessor"],
    "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
    "scheduler": ["diffusers", "EulerDiscreteScheduler"],
    "unet": ["diffusers", "UNetSpatioTemporalConditionModel"],
    "vae": ["diffusers", "AutoencoderKLTemporalDecoder"],
}


def unet(**change: Any) -> UNetSpatioTemporalConditionModel:
    config = {
        "sample_size": 8,
        "block_out_channels": (32, 64),
        "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        "layers_per_block": 1,
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 24,
        "cross_attention_dim": 16,
        "num_attention_heads": (1, 2),
        "num_frames": 4,
    }
    return UNetSpatioTemporalConditionModel(**{**config, **change})


def checkpoint(folder: Path, *, text: bool = False, **change: Any) -> Path:
    """Write a checkpoint of 4 frames of 32x32 pixels (latents 4x8x8) to `folder`; `change` goes to the U-Net.

    With `text` its U-Net takes captions, no picture.
    """
    torch.manual_seed(0)
    unet(**({"in_channels": 4} if text else {}), **change).save_pretrained(folder / "unet")
    vae = AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 3,
        latent_channels=4,
        layers_per_block=1,
        sample_size=32,
        scaling_factor=0.7,
    )
    vae.save_pretrained(folder / "vae")
    EulerDiscreteScheduler(**SCHEDULER).save_pretrained(folder / "scheduler")
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**small, image_size=224, patch_size=56, projection_dim=16)
    CLIPVisionModelWithProjection(vision).save_pretrained(folder / "image_encoder")
    CLIPImageProcessor().save_pretrained(folder / "feature_extractor")
    if text:
        assert sd.demo is not None
        shutil.copytree(sd.demo / "tokenizer", folder / "tokenizer")
        told = json.loads((sd.demo / "text_encoder" / "config.json").read_text())
        CLIPTextModel(CLIPTextConfig(**{**told, **small})).save_pretrained(folder / "text_encoder")
    (folder / "model_index.json").write_text(json.dumps(INDEX))
    return folder


def model(folder: Path, machine: Machine = tiny.CPU) -> StableVideoDiffusion:
    """The model of a checkpoint folder."""
    return load(folder, describe(folder), machine)


def asked(folder: Path, verb: str = "sample", **flags: Any) -> Any:
    """Options of a verb, filled and checked as the command line does it."""
    told = {"prompt": ""} if verb == "sample" else {}
    return tiny.asked(folder, verb, card=family, **{**told, **flags})


def picture(path: Path, seed: int = 3, size: tuple[int, int] = (32, 32)) -> Path:
    """Write the first frame of a clip of the world."""
    pixels = world.clip(0, seed, 1, *size)[0][:, 0]
    frame = ((pixels + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(np.ascontiguousarray(frame)).save(path)
    return path
