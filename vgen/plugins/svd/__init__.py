"""Stable Video Diffusion: a picture to a clip, by a U-Net with layers in time and EDM's noise.

Paper: arXiv:2311.15127. This file is the card: options, checkpoints and rules. It imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from vgen.cache import read_json
from vgen.errors import UsageError, VgenError
from vgen.family import Checkpoint, Family, PartCard, Rule, described, installed, read_config
from vgen.family import family as family_of
from vgen.options import (
    CameraOptions,
    DecodeOptions,
    EncodeOptions,
    FinetuneOptions,
    InterpolateOptions,
    LoraOptions,
    SampleOptions,
    arg,
    opt,
)

if TYPE_CHECKING:
    from vgen.registry import Found

KIND = "Stable Video Diffusion"
VECTORS = {2: "fps, motion", 3: "fps, motion, noise", 4: "and elevation", 5: "and azimuth"}  # what a U-Net is told
NOISE = {  # P_mean, P_std of each part (arXiv:2311.15127, table of the appendix on training)
    "i2v": (1.0, 1.6),
    "t2v": (0.5, 1.4),
    "interpolate": (1.0, 1.2),
    "multiview": (1.0, 1.6),
}


@dataclass(kw_only=True)
class Sample(SampleOptions):
    """Options of `vgen sample svd`."""

    negative_prompt: ClassVar[str] = ""  # type: ignore[misc]
    guidance_scale: ClassVar[None] = None  # type: ignore[misc]
    vae_slicing: ClassVar[bool] = False  # type: ignore[misc]
    vae_tiling: ClassVar[bool] = False  # type: ignore[misc]
    image: Path | None = arg(
        None, help="Picture that the clip starts from; of a video, its first frame.", metavar="IMAGE"
    )
    prompt: str = opt("", help="Have the picture made from this text first; a text checkpoint takes it as it is.")
    image_checkpoint: str = opt(
        "sd", help="What makes that picture: a family of images, or one of its checkpoints.", metavar="FAMILY[.TAG]"
    )
    motion_bucket_id: int = opt(127, help="How much shall move.", low=0, high=255)
    noise_aug_strength: float = opt(0.02, help="Noise on the picture: more of it lets more move.", low=0.0)
    min_guidance_scale: float | None = opt(None, help="Classifier-free guidance of the first frame.", low=0.0)
    max_guidance_scale: float | None = opt(None, help="Classifier-free guidance where it is highest.", low=0.0)
    guidance_profile: Literal["linear", "triangular", "constant"] | None = opt(
        None, help="Over the frames: up to the last (SVD), up and down again (SV3D), or the highest for all."
    )
    sampler: Literal["euler", "heun"] = opt("euler", help="Heun calls the network twice a step.")
    decode_chunk_size: int | None = opt(None, help="Frames decoded at once; all when absent.", low=1, panel="Machine")
    temporal_image: Path | None = opt(
        None, help="Picture whose embedding the layers in time attend to, in place of the first one's."
    )
    temporal_prompt: str = opt("", help="Text for the layers in time alone (text checkpoints).")
    window: int | None = opt(None, help="Frames made at once: more are chained, window after window.", low=1)
    window_overlap: int = opt(1, help="Frames that a window shares with the one before.", low=1)
    orbit: bool = opt(False, help="Turn once around the object (multi-view checkpoints).")
    elevation: float = opt(0.0, help="Height of that camera in degrees above the object.", low=-90.0, high=90.0)
    views: int | None = opt(None, help="Views of the orbit; --num-frames when absent.", low=2)


@dataclass(kw_only=True)
class Encode(EncodeOptions):
    """Options of `vgen encode svd`."""


@dataclass(kw_only=True)
class Finetune(FinetuneOptions):
    """Options of `vgen finetune svd`."""

    caption_dropout: ClassVar[float] = 0.0  # type: ignore[misc]
    part: Literal["i2v", "t2v", "interpolate", "multiview", "decoder", "autoencoder"] = opt(
        "i2v", help="Which network to train, and for what."
    )
    condition_dropout: float = opt(0.15, help="Share of clips trained without picture, or text.", low=0.0, high=1.0)
    p_mean: float | None = opt(None, help="Mean of ln sigma in training; the paper's for the part when absent.")
    p_std: float | None = opt(None, help="Its standard deviation.", low=1e-3)


@dataclass(kw_only=True)
class TrainLora(CameraOptions, LoraOptions):
    """Options of `vgen train-lora svd`."""

    caption_dropout: ClassVar[float] = 0.0  # type: ignore[misc]
    part: Literal["i2v", "t2v"] = opt("i2v", help="Which network to adapt, and for what.")
    condition_dropout: float = opt(0.15, help="Share of clips trained without picture, or text.", low=0.0, high=1.0)
    p_mean: float | None = opt(None, help="Mean of ln sigma in training; the paper's for the part when absent.")
    p_std: float | None = opt(None, help="Its standard deviation.", low=1e-3)


@dataclass(kw_only=True)
class Interpolate(InterpolateOptions):
    """Options of `vgen interpolate svd`."""

    num_inference_steps: int | None = opt(None, help="Denoising steps.", low=1)
    guidance_scale: float = opt(1.0, help="Classifier-free guidance; 1 turns it off.", low=0.0)
    motion_bucket_id: int = opt(127, help="How much the network is told that moves.", low=0, high=255)
    noise_aug_strength: float = opt(0.02, help="Noise on the given frames, as the network sees them.", low=0.0)
    conditioning_fps: float | None = opt(
        None, help="Frame rate that the network is told of; that of its training when absent.", low=0.01
    )


def _native(frames: int, height: int, width: int, steps: int, guidance: tuple[float, float], **more: Any) -> Any:
    """What a checkpoint was made for; `more` replaces some of it."""
    defaults = {"num_frames": frames, "height": height, "width": width, "fps": 7.0, "num_inference_steps": steps}
    guided = {"min_guidance_scale": guidance[0], "max_guidance_scale": guidance[1], "guidance_profile": "linear"}
    step = more.pop("step", 64)  # the U-Net halves latents three times, of an eighth of the picture
    side = Rule(step, low=step)
    return {
        "modes": ("image",),
        "defaults": {**defaults, **guided, "window": frames, "conditioning_fps": 28.0, **more},
        "rules": {"num_frames": Rule(), "height": side, "width": side},
    }


LICENSE = "other (Stable Video Diffusion community)"
FACTS = {"vectors": 3, "text": False, "interpolates": False, "channels": (8, 4)}
CHECKPOINTS = (
    Checkpoint(
        tag="img2vid",
        repo="stabilityai/stable-video-diffusion-img2vid",
        license=LICENSE,
        summary="a picture to 14 frames, 576x1024",
        facts=FACTS,
        **_native(14, 576, 1024, 25, (1.0, 2.5)),
    ),
    Checkpoint(
        tag="img2vid-xt",
        repo="stabilityai/stable-video-diffusion-img2vid-xt",
        license=LICENSE,
        summary="a picture to 25 frames, 576x1024",
        facts=FACTS,
        **_native(25, 576, 1024, 30, (1.5, 3.0)),
    ),
    Checkpoint(
        tag="img2vid-xt-1-1",
        repo="stabilityai/stable-video-diffusion-img2vid-xt-1-1",
        license=LICENSE,
        summary="a picture to 25 frames, 576x1024, at 6 frames a second",
        facts=FACTS,
        **_native(25, 576, 1024, 30, (1.0, 3.0), fps=6.0),
    ),
)


def describe(folder: Path) -> Checkpoint:
    """What a folder in diffusers' layout was made for, read from its configurations. Raises VgenError."""
    unet, vae = read_config(folder, "unet/config.json", KIND), read_config(folder, "vae/config.json", KIND)
    if "num_frames" not in unet:
        made = unet.get("_class_name", "network of another kind")
        raise VgenError(
            f"{folder} is not a {KIND} checkpoint: its U-Net is a {made}.", "See: vgen checkpoints list svd"
        )
    stride = 2 ** (len(vae["block_out_channels"]) - 1)
    frames, size = int(unet["num_frames"]), int(unet.get("sample_size") or 32) * stride
    guidance = (1.0, 2.5) if frames <= 14 else (1.5, 3.0)
    step = stride * 2 ** (len(unet["block_out_channels"]) - 1)
    height, width = (576, 1024) if size == 768 else (size, size)  # the released configurations tell a square
    native = _native(frames, height, width, 25 if frames <= 14 else 30, guidance, step=step)
    native["defaults"] = _released(folder) or native["defaults"]
    text = int(unet["in_channels"]) == int(vae["latent_channels"])
    told = described(folder, **{**native, "modes": ("text",) if text else ("image",)})
    vectors = int(unet["projection_class_embeddings_input_dim"]) // int(unet["addition_time_embed_dim"])
    facts = {
        "vectors": vectors,
        "text": (folder / "text_encoder").is_dir(),
        "interpolates": (folder / "interpolator").is_dir(),
        "channels": (int(unet["in_channels"]), int(vae["latent_channels"])),
    }
    return Checkpoint(**{**vars(told), "facts": facts})


def _released(folder: Path) -> Mapping[str, Any]:
    """The defaults of the released checkpoint that the one in a folder was made of; nothing for others."""
    told = read_json(folder / "vgen.json").get("base")
    repo = str(told.get("reference", "")).partition("@")[0] if isinstance(told, dict) else ""
    return next((c.defaults for c in CHECKPOINTS if c.repo == repo), {})


def check(options: Any, checkpoint: Checkpoint) -> None:
    """Refuse settings that cannot go together, or would do nothing, before weights load. Raises UsageError."""
    if isinstance(options, Sample):
        _check_sample(options, checkpoint)
    elif isinstance(options, (Finetune, TrainLora)):
        _check_training(options, checkpoint)
    elif isinstance(options, Interpolate) and not checkpoint.facts.get("interpolates"):
        raise UsageError(
            "This checkpoint has no network for frames between frames; the released ones do not.",
            "Train one: vgen finetune svd --part interpolate. Or take another family: vgen interpolate classic",
        )


def _check_sample(options: Sample, checkpoint: Checkpoint) -> None:
    text = "text" in checkpoint.modes
    if text:
        _check_text(options)
    else:
        _check_picture(options)
    if options.temporal_prompt and not text:
        raise UsageError("--temporal-prompt is for checkpoints that take text.", "Give --temporal-image instead.")
    low, high = options.min_guidance_scale or 0.0, options.max_guidance_scale or 0.0
    if low > high:
        raise UsageError(f"--min-guidance-scale {low} is above --max-guidance-scale {high}.", "Swap them.")
    _check_windows(options)
    _check_orbit(options, int(checkpoint.facts.get("vectors", 3)))


def _check_text(options: Sample) -> None:
    if not options.prompt.strip():
        raise UsageError("This checkpoint makes clips from text; none was given.", "Give --prompt TEXT.")
    for name in ("image", "temporal_image"):
        if getattr(options, name):
            raise UsageError(f"This checkpoint takes text, no {name.replace('_', ' ')}.", "Give --prompt instead.")


def _check_picture(options: Sample) -> None:
    if options.image and options.prompt:
        raise UsageError("IMAGE and --prompt exclude each other: each says what the first frame is.", "Leave one out.")
    if options.prompt:
        image_checkpoint(options.image_checkpoint)
    elif not options.image:
        raise UsageError("The picture is missing.", "vgen sample svd IMAGE, or: vgen sample svd --prompt TEXT")


def image_checkpoint(reference: str) -> tuple[Family, Found]:
    """The family and the weights that make a picture of a text. Raises UsageError."""
    from vgen import registry

    name, _, tag = reference.partition(".")
    if name not in installed():
        known = ", ".join(installed())
        raise UsageError(f"--image-checkpoint {reference}: there is no family '{name}'.", f"Families: {known}.")
    card = family_of(name)
    options = card.options("sample")
    if not {"prompt", "num_frames"} <= set(options.__dataclass_fields__) or name == family.name:
        raise UsageError(f"--image-checkpoint {reference}: '{name}' makes no pictures from text.", "Take sd.")
    return card, registry.resolve(card, reference if tag else None, accelerator=registry.accelerator())


def _check_windows(options: Sample) -> None:
    frames, window = options.num_frames or 1, options.window or 1
    if window < 2 and frames > window:
        raise UsageError("--window 1 cannot be chained.", "Set --window to 2 frames or more.")
    if frames > window and options.window_overlap >= window:
        raise UsageError(
            f"--window-overlap {options.window_overlap} leaves nothing new in a window of {window}.",
            f"Set it between 1 and {window - 1}.",
        )


def _check_orbit(options: Sample, vectors: int) -> None:
    if not options.orbit:
        for name in ("elevation", "views"):
            if getattr(options, name):
                raise UsageError(f"--{name} belongs to --orbit.", "Add --orbit, or leave it out.")
    elif vectors < 4:
        raise UsageError(
            f"--orbit needs a multi-view checkpoint; this one is told {VECTORS.get(vectors, vectors)}, no angles.",
            "Train one: vgen finetune svd --part multiview",
        )


def _check_training(options: Finetune | TrainLora, checkpoint: Checkpoint) -> None:
    channels, latent = checkpoint.facts.get("channels", (8, 4))
    if options.part == "t2v" and not checkpoint.facts.get("text"):
        raise UsageError(
            "--part t2v trains with captions; this checkpoint has no text encoder.",
            "Add the folders text_encoder and tokenizer, of Stable Diffusion 2.1 say, or train --part i2v.",
        )
    adapted = isinstance(options, TrainLora)
    if adapted and (options.part == "t2v") != (channels == latent):
        raise UsageError(f"--part {options.part} is not what this checkpoint does.", "Name the other part.")


OWN = ("condition_dropout", "p_mean", "p_std")
family = Family(
    name="svd",
    summary="A picture to a clip; camera moves as adapters; frames between frames.",
    paper="arXiv:2311.15127",
    verbs={
        "encode": Encode,
        "decode": DecodeOptions,
        "finetune": Finetune,
        "train-lora": TrainLora,
        "sample": Sample,
        "interpolate": Interpolate,
    },
    load="vgen.plugins.svd.model:load",
    checkpoints=CHECKPOINTS,
    default="img2vid-xt",
    demo=Path(__file__).parent / "demo",
    parts=(
        PartCard("i2v", "the U-Net, from a picture to a clip", options=OWN),
        PartCard("t2v", "the U-Net, from text to a clip", options=OWN),
        PartCard("interpolate", "the U-Net for frames between two, nine channels wide", options=OWN),
        PartCard("multiview", "the U-Net, told the angles of a camera around an object", options=OWN),
        PartCard("decoder", "the autoencoder's decoder, on pixels; the encoder stays", trains_on="pixels"),
        PartCard("autoencoder", "the whole autoencoder, on pixels", trains_on="pixels"),
    ),
    lora_targets=("temporal_transformer_blocks.*.attn1.to_[qkv]", "temporal_transformer_blocks.*.attn1.to_out.0"),
    check=check,
    describe=describe,
    examples={
        "sample": (
            "vgen sample svd photo.jpg -o clip.mp4",
            'vgen sample svd --prompt "a red ball on a dark background" --motion-bucket-id 180',
        ),
        "encode": (
            "vgen encode svd clips/ --num-frames 14 --fps 7 -o latents/",
            "vgen encode svd manifest.jsonl --check -o latents/",
        ),
        "decode": (
            "vgen decode svd latents.safetensors -o clip.mp4",
            "vgen decode svd latents/ -o clips/clip.mp4",
        ),
        "finetune": (
            "vgen finetune svd --data latents/ --max-train-steps 1000 -o tuned/",
            "vgen finetune svd --part decoder --data clips/ --num-frames 8 -o tuned/",
        ),
        "train-lora": (
            "vgen train-lora svd --camera pan-left --data clips/ -o pan-left/",
            "vgen train-lora svd --data latents/ --max-train-steps 1000 -o moves/",
        ),
        "interpolate": (
            "vgen interpolate svd clip.mp4 --factor 4 -o smooth.mp4",
            "vgen interpolate svd clip.mp4 --fps 60000/1001 --measure -o smooth.mp4",
        ),
    },
)
