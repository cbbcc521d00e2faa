"""The options of the verbs: plain dataclasses from which flags, settings files and records are made.

A field is declared with `opt` (a flag) or `arg` (a positional argument). `None` as a default means
"what the checkpoint was made for"; `vgen.family.resolve` fills it in before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import Field, dataclass, field, fields
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar, Literal

Device = str
Dtype = Literal["auto", "fp32", "bf16", "fp16"]


def opt(
    default: Any,
    *,
    help: str,
    short: str | None = None,
    panel: str = "Options",
    low: float | None = None,
    high: float | None = None,
    metavar: str | None = None,
    positional: bool = False,
    needs: str = "",
    native: bool = True,
) -> Any:
    """A flag. `low` and `high` bound its value, `panel` groups it in the help page; without `needs` it does nothing.

    One that is not `native` stays open, whatever the checkpoint was made for.
    """
    told = {
        "help": help,
        "short": short,
        "panel": panel,
        "low": low,
        "high": high,
        "metavar": metavar,
        "positional": positional,
        "needs": needs,
        "native": native,
    }
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=told)
    return field(default=default, metadata=told)


def arg(default: Any, *, help: str, metavar: str | None = None) -> Any:
    """A positional argument. A list takes any number of them."""
    return opt(default, help=help, metavar=metavar, positional=True)


def declared(options: type | object) -> Iterator[Field[Any]]:
    """The fields of an options class that become flags or arguments, in order of declaration."""
    return (f for f in fields(options) if "help" in f.metadata)  # type: ignore[arg-type]


def flag(name: str) -> str:
    """The flag of a field: num_frames -> --num-frames."""
    return "--" + name.replace("_", "-")


@dataclass(kw_only=True)
class RunOptions:
    """What every verb takes."""

    checkpoint: str | None = opt(
        None, help="family.tag, owner/repo[@revision][:subfolder], a folder, or 'demo'.", panel="Checkpoint"
    )
    output: Path | None = opt(None, short="-o", help="Where the result goes.", panel="Output")
    overwrite: bool = opt(False, help="Replace the output if it exists.", panel="Output")
    seed: int | None = opt(None, help="Seed of every random draw; drawn and printed when absent.", low=0)
    device: Device = opt("auto", help="auto, cpu, cuda, cuda:1, mps ...", panel="Machine")
    dtype: Dtype = opt("auto", help="Precision of the weights while they run.", panel="Machine")
    threads: int | None = opt(None, help="CPU threads; all of them when absent.", low=1, panel="Machine")


@dataclass(kw_only=True)
class SampleOptions(RunOptions):
    """Text (and whatever a family adds) to a clip. `still` says that these make one picture, not `num_frames`."""

    still: ClassVar[bool] = False

    prompt: str = arg("", help="What the clip shows.")
    negative_prompt: str = opt("", help="What the clip shall not show.")
    num_frames: int | None = opt(None, short="-n", help="Frames to make.", low=1)
    height: int | None = opt(None, help="Height in pixels.", low=1)
    width: int | None = opt(None, help="Width in pixels.", low=1)
    fps: float | None = opt(None, help="Frame rate of the written clip.", low=0.01)
    num_inference_steps: int | None = opt(None, help="Denoising steps.", low=1)
    guidance_scale: float | None = opt(None, help="Classifier-free guidance; 1 turns it off.", low=0.0)
    num_videos_per_prompt: int = opt(1, help="Clips to make of each prompt.", low=1)
    lora: list[str] = opt([], help="Adapter to add, any number of times.", metavar="PATH[:SCALE]")
    cpu_offload: bool = opt(False, help="Keep on the device only the network at work.", panel="Machine")
    vae_slicing: bool = opt(False, help="Decode one clip at a time.", panel="Machine")
    vae_tiling: bool = opt(False, help="Decode in overlapping tiles.", panel="Machine")
    compile: bool = opt(False, help="torch.compile the denoiser.", panel="Machine")
    contact_sheet: bool = opt(False, help="Also write a PNG of all frames, for people.", panel="Output")


@dataclass(kw_only=True)
class EncodeOptions(RunOptions):
    """Clips to a store of latent files."""

    inputs: list[str] = arg([], help="Clips, images, folders of them, or 'world:COUNT'.", metavar="INPUT...")
    num_frames: int | None = opt(None, short="-n", help="Frames per clip.", low=1)
    height: int | None = opt(None, help="Height in pixels.", low=1)
    width: int | None = opt(None, help="Width in pixels.", low=1)
    fps: float | None = opt(None, help="Frame rate to read at; the clip's own when absent.", low=0.01)
    captions: Path | None = opt(None, help="CSV or JSONL with 'file' and 'caption'; else NAME.txt beside a clip.")
    posterior: Literal["moments", "mean", "sample"] = opt("moments", help="What of the posterior is stored.")
    batch_size: int = opt(4, help="Clips encoded at once.", low=1)
    check: bool = opt(False, help="Decode again and report PSNR for each clip.")
    verify: bool = opt(False, help="Hash every tensor of the store and compare.")
    contact_sheet: bool = opt(False, help="Also write a PNG of the decoded clips.", panel="Output")


@dataclass(kw_only=True)
class DecodeOptions(RunOptions):
    """Latents to clips."""

    inputs: list[str] = arg([], help="Latent files, or stores of them.", metavar="LATENTS...")
    fps: float | None = opt(None, help="Frame rate of the written clip; the latents' own when absent.", low=0.01)
    contact_sheet: bool = opt(False, help="Also write a PNG of all frames, for people.", panel="Output")


@dataclass(kw_only=True)
class TrainOptions(RunOptions):
    """What finetune and train-lora share."""

    data: list[str] = opt([], help="A latent store; or clips, or 'world:COUNT', for parts that train on pixels.")
    part: str = opt("", help="Which network to train.")
    max_train_steps: int = opt(1000, help="Optimizer steps.", low=1)
    train_batch_size: int = opt(1, help="Clips in one forward pass.", low=1)
    gradient_accumulation_steps: int = opt(1, help="Forward passes in one step.", low=1)
    optimizer: Literal["adamw", "muon", "adamw8bit", "paged-adamw", "paged-adamw8bit"] = opt(
        "adamw", help="What makes steps of gradients; those of 8 bits and paged ones are bitsandbytes'."
    )
    learning_rate: float = opt(1e-4, help="Peak learning rate.", low=1e-12)
    lr_scheduler: Literal["constant", "cosine", "linear"] = opt("cosine", help="Shape of the learning rate.")
    lr_warmup_steps: int = opt(0, help="Steps over which it rises.", low=0)
    adam_beta1: float = opt(0.9, help="AdamW beta 1.", low=0.0, high=1.0)
    adam_beta2: float = opt(0.95, help="AdamW beta 2.", low=0.0, high=1.0)
    adam_epsilon: float = opt(1e-8, help="AdamW epsilon.", low=0.0)
    adam_weight_decay: float = opt(1e-4, help="AdamW weight decay.", low=0.0)
    max_grad_norm: float = opt(1.0, help="Gradients are clipped to this norm; 0 turns it off.", low=0.0)
    ema_decay: float = opt(0.0, help="Keep a moving average with this decay; 0 turns it off.", low=0.0, high=1.0)
    timestep_sampling: Literal["explicit-uniform", "uniform"] = opt(
        "explicit-uniform", help="Times of a step: one from each equal part of their range, or each by itself."
    )
    eval_steps: int = opt(500, help="Log the loss on held-out clips every so many steps; 0 turns it off.", low=0)
    eval_share: float = opt(0.02, help="Share of the clips held out: 1 to 4, none of fewer than 16.", low=0.0, high=0.5)
    validation_prompt: list[str] = opt([], help="Sample a clip of this prompt while training; any number of times.")
    validation_image: Path | None = opt(None, help="Picture that those clips start from (image-to-video checkpoints).")
    validation_steps: int = opt(500, help="Sample them every so many steps.", low=1)
    report_to: Literal["none", "tensorboard", "trackio", "wandb"] = opt(
        "none", help="Also send the figures to a tracker.", panel="Output"
    )
    mixed_precision: Literal["no", "bf16", "fp16"] = opt("no", help="Autocast of the forward pass.", panel="Machine")
    gradient_checkpointing: bool = opt(False, help="Recompute activations to save memory.", panel="Machine")
    compile: bool = opt(False, help="torch.compile the network.", panel="Machine")
    checkpointing_steps: int = opt(500, help="Save the state of training every so many steps.", low=1)
    resume: bool = opt(False, help="Go on from the last state in the output folder.")
    save_dtype: Literal["fp32", "bf16", "fp16"] = opt("fp32", help="Precision of the written weights.", panel="Output")
    curriculum: Path | None = opt(None, help="TOML file of stages: which clips at which step.", metavar="FILE.toml")
    caption_dropout: float = opt(0.1, help="Share of clips trained without caption.", low=0.0, high=1.0)


READ_ON = {  # training options that only parts on such data read
    "latents": (
        *("train_text_encoder", "mask_weight", "mask_steps", "caption_dropout", "curriculum"),
        *("timestep_sampling", "validation_prompt", "validation_image"),
    ),
    "pixels": ("num_frames", "height", "width", "l1_weight", "kl_weight"),
}


@dataclass(kw_only=True)
class FinetuneOptions(TrainOptions):
    """The weights of a part: a denoiser on latents, or an autoencoder on pixels."""

    trainable: list[str] = opt(
        [], help="Train only weights of these names, or patterns as in 'attn*'; any number of times.", metavar="PATTERN"
    )
    from_scratch: bool = opt(False, help="Start the part from random weights of the checkpoint's configuration.")
    mask_weight: float = opt(0.0, help="Extra loss weight where clips carry an object mask.", low=0.0)
    mask_steps: int = opt(0, help="Steps over which that weight fades to nothing.", low=0)
    num_frames: int | None = opt(None, short="-n", help="autoencoder: frames per clip.", low=1)
    height: int | None = opt(None, help="autoencoder: height in pixels.", low=1)
    width: int | None = opt(None, help="autoencoder: width in pixels.", low=1)
    l1_weight: float = opt(0.2, help="autoencoder: weight of the L1 term beside the squared error.", low=0.0)
    kl_weight: float = opt(1e-6, help="autoencoder: weight of the KL term.", low=0.0)


CameraWord = Literal[
    "pan",
    "pan-left",
    "pan-right",
    "tilt",
    "tilt-up",
    "tilt-down",
    "zoom",
    "zoom-in",
    "zoom-out",
    "roll",
    "roll-left",
    "roll-right",
    "static",
]


@dataclass(kw_only=True)
class CameraOptions:
    """What train-lora takes to train a motion of the camera from ordinary clips, beside LoraOptions."""

    camera: CameraWord | None = opt(
        None,
        help="Train this motion of the camera: --data are then clips, those that show it are found. 'pan', 'tilt',"
        " 'zoom', 'roll' train both ways, an adapter each; or pan-left, tilt-up, zoom-in, roll-right ...; or static.",
        metavar="WORD",
    )
    synthesize: int = opt(0, help="Make so many more, of still clips and images.", low=0, needs="camera")
    min_clips: int = opt(16, help="Refuse to train on fewer clips.", low=1, needs="camera")
    clip_size: str = opt(
        "", help="Size that clips are trained at; the checkpoint's own when absent.", metavar="FxHxW", needs="camera"
    )
    clip_fps: float | None = opt(
        None, help="Frame rate that they are read at; the checkpoint's own when absent.", low=0.01, needs="camera"
    )
    check_samples: int = opt(
        8, help="Samples, with the adapter and without, whose camera is compared; 0 for none.", low=0, needs="camera"
    )


@dataclass(kw_only=True)
class LoraOptions(TrainOptions):
    """Low-rank adapters on chosen layers of a frozen network."""

    from_scratch: ClassVar[bool] = False  # an adapter changes a trained network
    train_text_encoder: ClassVar[bool] = False
    rank: int | None = opt(None, help="Rank of the adapter; 16, or that of --init-lora, when absent.", low=1)
    lora_alpha: float | None = opt(None, help="Strength is alpha / rank; alpha = rank when absent.", low=1e-6)
    lora_dropout: float = opt(0.0, help="Share of an adapter's input left out at random.", low=0.0, high=1.0)
    target_modules: list[str] = opt(
        [], help="Layers to adapt, by name, end of name or pattern, any number of times; the family's own when absent."
    )
    init_lora: str | None = opt(None, help="Adapter to start from.", metavar="PATH")
    lora: list[str] = opt([], help="Adapter to train on top of, frozen, any number of times.", metavar="PATH[:SCALE]")
    mask_weight: float = opt(0.0, help="Extra loss weight where clips carry an object mask.", low=0.0)
    mask_steps: int = opt(0, help="Steps over which that weight fades to nothing.", low=0)
    quantize: Literal["nf4", "int8"] | None = opt(None, help="Keep the frozen weights in 4 or 8 bits.", panel="Machine")
    export: list[Literal["comfy", "kohya"]] = opt(
        [], help="Also write the adapter under these names.", panel="Output", metavar="comfy|kohya"
    )


@dataclass(kw_only=True)
class InterpolateOptions(RunOptions):
    """A clip to one with more frames."""

    input: str = arg("", help="A video.", metavar="CLIP")
    factor: int | None = opt(None, help="Frames for each one of the clip; 4 when --fps is absent.", low=2)
    fps: Fraction | None = opt(None, help="Or a frame rate to reach, such as 60 or 60000/1001.", low=0.01, native=False)
    batch_size: int = opt(1, help="Pairs of frames in one call of the network.", low=1, panel="Machine")
    audio: bool = opt(True, help="Leave the sound out, which is copied else.", panel="Output")
    measure: bool = opt(False, help="Also leave every second frame out, make it again, and compare.", panel="Output")
    contact_sheet: bool = opt(False, help="Also write a PNG of some new frames between given ones.", panel="Output")
    seed: int | None = opt(0, help="Seed of every random draw.", low=0)


@dataclass(kw_only=True)
class UpscaleOptions(RunOptions):
    """A clip to a larger one."""

    input: str = arg("", help="A video.", metavar="CLIP")
    factor: int = opt(4, help="How many times as high and as wide.", low=2)
