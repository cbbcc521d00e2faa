"""CogVideoX: text, image and video to video with a full-attention transformer over a causal 3D autoencoder.

Paper: arXiv:2408.06072. This file is the card: options, checkpoints and rules. It imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from vgen.errors import UsageError
from vgen.family import Checkpoint, Family, PartCard, Rule, described, read_config
from vgen.options import DecodeOptions, EncodeOptions, FinetuneOptions, LoraOptions, SampleOptions, arg, flag, opt


@dataclass(kw_only=True)
class Sample(SampleOptions):
    """Options of `vgen sample cogvideox`."""

    prompt: str = arg("", help="What the clip shows.", metavar="PROMPT")
    image: Path | None = opt(None, help="Picture that the clip starts from (image-to-video checkpoints).")
    video: Path | None = opt(None, help="Clip, or latents of one, to change (with --strength).")
    strength: float = opt(0.8, help="How far --video is changed: 0 keeps it, 1 ignores it.", low=0.0, high=1.0)
    sampler: Literal["ddim", "dpm"] | None = opt(None, help="DDIM, or DPM-Solver++(2M) SDE; as released when absent.")
    eta: float = opt(0.0, help="Noise that DDIM adds in each step.", low=0.0, high=1.0)
    use_dynamic_cfg: bool = opt(False, help="Let guidance rise over the steps along a cosine.")
    dynamic_cfg_quirk: bool = opt(False, help="With --use-dynamic-cfg: the curve as released, which oscillates.")
    window: int | None = opt(None, help="Frames denoised at once in a longer clip; native length when absent.", low=1)
    cache: Literal["none", "fbcache", "pab"] = opt(
        "none", help="Reuse activations between steps: faster, not the same bits.", panel="Machine"
    )


@dataclass(kw_only=True)
class Encode(EncodeOptions):
    """Options of `vgen encode cogvideox`."""

    fps: float | None = opt(None, help="Frame rate to read at; the checkpoint's own when absent.", low=0.01)
    bucket: list[str] = opt([], help="Allowed FRAMESxHEIGHTxWIDTH, any number of times.", metavar="FxHxW")


@dataclass(kw_only=True)
class OfTransformer:
    """What training the transformer takes beside the options of all families."""

    pack: int = opt(0, help="Fill batches up to so many tokens with clips of any shapes; 0 keeps shapes apart.", low=0)
    image_noise: float = opt(0.05, help="image-to-video: median of the noise on the picture.", low=0.0)
    image_dropout: float = opt(0.05, help="image-to-video: share of clips without picture.", low=0.0, high=1.0)


@dataclass(kw_only=True)
class Finetune(OfTransformer, FinetuneOptions):
    """Options of `vgen finetune cogvideox`."""

    part: Literal["transformer", "autoencoder"] = opt("transformer", help="Which network to train.")
    train_text_encoder: bool = opt(False, help="Train the text encoder along (checkpoints with a small one).")


@dataclass(kw_only=True)
class TrainLora(OfTransformer, LoraOptions):
    """Options of `vgen train-lora cogvideox`."""

    part: Literal["transformer"] = opt("transformer", help="Which network to adapt.")


COMFY_NAMES = (  # ComfyUI's own model of CogVideoX (comfy/ldm/cogvideo/model.py) names its layers otherwise
    (r"^transformer_blocks\.", "blocks."),
    (r"\.attn1\.to_(q|k|v)$", r".\1"),
    (r"\.attn1\.to_out\.0$", ".attn_out"),
    (r"\.ff\.net\.0\.proj$", ".ff_proj"),
    (r"\.ff\.net\.2$", ".ff_out"),
    (r"^(time|ofs)_embedding\.linear", r"\1_embedding_linear"),
)
KIND = "CogVideoX"
LICENSE_5B = "other (CogVideoX license: research free, commercial use by registration)"


def _released(
    tag: str, name: str, license: str, size: tuple[int, int, int], modes: tuple[str, ...], sampler: str, summary: str
) -> Checkpoint:
    """A checkpoint of the authors. `size` is (frames, height, width) as trained."""
    num_frames, height, width = size
    newer = num_frames == 81
    fixed = tag == "5b-i2v"  # its learned table of positions fits nothing else
    step = 16 if newer else 8
    return Checkpoint(
        tag=tag,
        repo=f"zai-org/{name}",
        license=license,
        summary=summary,
        modes=modes,
        defaults={
            "num_frames": num_frames,
            "height": height,
            "width": width,
            "fps": 16.0 if newer else 8.0,
            "num_inference_steps": 50,
            "guidance_scale": 6.0,
            "sampler": sampler,
            "window": num_frames,
        },
        rules={
            "num_frames": Rule(step, 1, low=num_frames, high=num_frames) if fixed else Rule(step, 1),
            "height": Rule(16, low=480, high=480) if fixed else Rule(16, low=16),
            "width": Rule(16, low=720, high=720) if fixed else Rule(16, low=16),
        },
    )


V1, V15 = (49, 480, 720), (81, 768, 1360)
TEXT, IMAGE = ("text", "video"), ("image",)
CHECKPOINTS = (
    _released("2b", "CogVideoX-2b", "apache-2.0", V1, TEXT, "ddim", "text to video, 6 s at 8 fps"),
    _released("5b", "CogVideoX-5b", LICENSE_5B, V1, TEXT, "dpm", "text to video, 6 s at 8 fps"),
    _released("5b-i2v", "CogVideoX-5b-I2V", LICENSE_5B, V1, IMAGE, "dpm", "image to video, 6 s at 8 fps"),
    _released("1.5-5b", "CogVideoX1.5-5B", LICENSE_5B, V15, TEXT, "dpm", "text to video, 5 s at 16 fps"),
    _released("1.5-5b-i2v", "CogVideoX1.5-5B-I2V", LICENSE_5B, V15, IMAGE, "dpm", "image to video, 5 s at 16 fps"),
)


def describe(folder: Path) -> Checkpoint:
    """What a folder in diffusers' layout was made for, read from its configurations. Raises VgenError."""
    transformer = read_config(folder, "transformer/config.json", KIND)
    vae = read_config(folder, "vae/config.json", KIND)
    scheduler = read_config(folder, "scheduler/scheduler_config.json", KIND)
    strides = 2 ** (len(vae["block_out_channels"]) - 1)
    size = strides * transformer["patch_size"]
    step = 2 * int(vae["temporal_compression_ratio"]) * (transformer.get("patch_size_t") or 1)
    image = transformer["in_channels"] == 2 * vae["latent_channels"]
    native = {"height": transformer["sample_height"] * strides, "width": transformer["sample_width"] * strides}
    num_frames = transformer["sample_frames"]
    fixed = bool(transformer.get("use_learned_positional_embeddings"))
    return described(
        folder,
        modes=IMAGE if image else TEXT,
        defaults={
            "num_frames": num_frames,
            **native,
            "fps": 16.0 if transformer.get("patch_size_t") else 8.0,
            "num_inference_steps": 50,
            "guidance_scale": 6.0,
            "sampler": "dpm" if "DPM" in scheduler["_class_name"] else "ddim",
            "window": num_frames,
        },
        rules={
            "num_frames": Rule(step, 1, low=num_frames, high=num_frames) if fixed else Rule(step, 1),
            **{k: Rule(size, low=v, high=v) if fixed else Rule(size, low=size) for k, v in native.items()},
        },
    )


def check(options: Any, checkpoint: Checkpoint) -> None:
    """Refuse what cannot be drawn, before weights load. Raises UsageError."""
    if isinstance(options, Sample):
        _check_start(options, checkpoint)
        _check_sample(options, checkpoint)
    if isinstance(options, (Finetune, TrainLora)):
        check_of_transformer(options, checkpoint)
    if isinstance(options, Encode):
        for size in options.bucket:
            _check_bucket(size, checkpoint)


def check_of_transformer(options: Any, checkpoint: Checkpoint) -> None:
    """Refuse settings (OfTransformer, TrainOptions) that would do nothing."""
    usual = {f.name: f.default for f in fields(OfTransformer)} | {"train_batch_size": 1, "compile": False}
    if options.pack:
        for name in ("train_batch_size", "compile"):
            if getattr(options, name) != usual[name]:
                raise UsageError(f"{flag(name)} does nothing with --pack.", "Leave one of them out.")
    if "image" not in checkpoint.modes:
        for name in ("image_noise", "image_dropout"):
            if getattr(options, name) != usual[name]:
                raise UsageError(
                    f"{flag(name)} does nothing: '{checkpoint.tag}' does not start from images.", "Leave it out."
                )


def _check_bucket(text: str, checkpoint: Checkpoint) -> None:
    numbers = text.lower().split("x")
    if len(numbers) != 3 or not all(n.isdecimal() for n in numbers):
        raise UsageError(f"--bucket {text} is not FRAMESxHEIGHTxWIDTH.", "For example: --bucket 49x480x720")
    for name, number in zip(("num_frames", "height", "width"), numbers, strict=True):
        if name in checkpoint.rules:
            checkpoint.rules[name].check(name, int(number))


def _check_start(options: Sample, checkpoint: Checkpoint) -> None:
    """Refuse a clip that cannot start from what is given."""
    if not options.prompt.strip() and options.image is None:
        raise UsageError("The prompt is empty.", 'Say what the clip shows, as in: "a teddy bear skating"')
    given = "image" if options.image else "video" if options.video else "text"
    if given not in checkpoint.modes:
        fit = ", ".join(c.tag for c in CHECKPOINTS if given in c.modes)
        takes = " or ".join(checkpoint.modes)
        raise UsageError(
            f"The checkpoint '{checkpoint.tag}' starts from {takes}, not from {given} alone.",
            f"Checkpoints that start from {given}: {fit}." if given != "text" else "Give --image.",
        )
    if options.image and options.video:
        raise UsageError("--image and --video exclude each other.", "Give one of them.")
    if options.strength != _default("strength") and not options.video:
        raise UsageError("--strength says how far --video is changed, and there is none.", "Give both.")


def _default(name: str) -> Any:
    return next(f.default for f in fields(Sample) if f.name == name)


def _check_sample(options: Sample, checkpoint: Checkpoint) -> None:
    """Refuse settings that would do nothing, or harm."""
    if options.eta and options.sampler == "dpm":
        raise UsageError("--eta belongs to DDIM; this runs DPM-Solver++.", "Leave it out, or give --sampler ddim.")
    if options.negative_prompt and options.guidance_scale == 1 and not options.use_dynamic_cfg:
        raise UsageError("--negative-prompt does nothing at --guidance-scale 1.", "Raise the scale.")
    if options.dynamic_cfg_quirk and not options.use_dynamic_cfg:
        raise UsageError("--dynamic-cfg-quirk shapes --use-dynamic-cfg, which is off.", "Give both.")
    if options.window and checkpoint.rules:
        checkpoint.rules["num_frames"].check("window", options.window)
    windows = bool(options.window and options.num_frames and options.num_frames > options.window)
    if windows and options.image:
        raise UsageError(
            f"--image makes clips of at most {options.window} frames: only the first window would start from it.",
            f"Set --num-frames {options.window} or less.",
        )
    if options.cache != "none" and (windows or options.use_dynamic_cfg):
        other = "--num-frames beyond one --window" if windows else "--use-dynamic-cfg"
        raise UsageError(
            f"--cache and {other} exclude each other: the cached activations would be another pass's.", "Leave one out."
        )


family = Family(
    name="cogvideox",
    summary="Text, image and video to video: a transformer over a causal 3D autoencoder.",
    paper="arXiv:2408.06072",
    verbs={"encode": Encode, "decode": DecodeOptions, "finetune": Finetune, "train-lora": TrainLora, "sample": Sample},
    load="vgen.plugins.cogvideox.model:load",
    checkpoints=CHECKPOINTS,
    default="2b",
    demo=Path(__file__).parent / "demo",
    parts=(
        PartCard("transformer", "the denoiser, on latents", options=("pack", "image_noise", "image_dropout")),
        PartCard("autoencoder", "the causal 3D autoencoder, on pixels", trains_on="pixels"),
    ),
    lora_targets=("to_q", "to_k", "to_v", "to_out.0"),
    comfy_names=COMFY_NAMES,
    check=check,
    describe=describe,
    examples={
        "sample": (
            'vgen sample cogvideox "a teddy bear skating"',
            'vgen sample cogvideox "a red ball rising" --checkpoint demo --seed 7 -o ball.mp4 --contact-sheet',
        ),
        "encode": (
            "vgen encode cogvideox clips/ -o latents/",
            "vgen encode cogvideox clips/ --captions captions.csv --bucket 49x480x720 --check -o latents/",
        ),
        "decode": (
            "vgen decode cogvideox latents.safetensors -o clip.mp4",
            "vgen decode cogvideox latents/ -o clips/clip.mp4 --contact-sheet",
        ),
        "train-lora": (
            "vgen train-lora cogvideox --data latents/ --max-train-steps 1000 -o look/",
            "vgen train-lora cogvideox --data latents/ --rank 64 --quantize nf4 --export comfy -o look/",
        ),
        "finetune": (
            "vgen finetune cogvideox --data latents/ --max-train-steps 1000 -o tuned/",
            "vgen finetune cogvideox --part autoencoder --data clips/ -o tuned/",
        ),
    },
)
