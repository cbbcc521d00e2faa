"""What SVD's U-Net is asked for: picture, guidance over frames, windows, orbits, as the released pipeline does it.

Random numbers are drawn in the order and layout of diffusers' pipeline, so that a seed gives the clip it gives there.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Generator, Tensor

from vgen import clips, diffusion, samplers
from vgen.model import Chain, Draw
from vgen.picture import picture
from vgen.plugins.svd import image_checkpoint
from vgen.plugins.svd.told import turning, vector
from vgen.plugins.svd.unet import without

if TYPE_CHECKING:
    from vgen.plugins.svd.model import StableVideoDiffusion

MUCH = 0.25  # of a picture: more than that cut away is told
SAMPLERS = {"euler": samplers.euler, "heun": samplers.heun}


def draw(model: StableVideoDiffusion, options: Any, before: Tensor | None) -> Draw:
    """The first window of a clip, or the one after `before`, unscaled latents (B, C, T, H, W)."""
    frames, device = chain(options).size, model.machine.device
    window = 0 if before is None else _windows(before.shape[2], options)
    seeds = [options.seed + i + window * 1_000_003 for i in range(options.num_videos_per_prompt)]
    generators = [Generator().manual_seed(seed) for seed in seeds]
    cond = _text(model, options) if model.takes_text else _picture(model, options, before, generators)
    cond["vector"] = _vector(model, options, frames).expand(len(seeds), *[-1] * (2 if options.orbit else 1))
    if "concat" in cond:
        cond["concat"] = cond["concat"][:, :, None].expand(-1, -1, frames, -1, -1)
    _, h, w = model.space.strides
    shape = (frames, model.space.channels, options.height // h, options.width // w)
    noise = torch.stack([torch.randn(shape, generator=g).transpose(0, 1) for g in generators])
    times = model.process.times(options.num_inference_steps)
    cond = {name: value.to(device) for name, value in cond.items()}
    return Draw(
        x=diffusion.initial(model.process, times[0], noise.to(device)),
        times=times,
        cond=cond,
        uncond=without(cond),
        guidance=guidance(options, frames),
        sampler=SAMPLERS[options.sampler],
    )


def guidance(options: Any, frames: int) -> float | Tensor:
    """The guidance scale of each frame (T,): linear (arXiv:2311.15127), triangular (SV3D), or one number for all."""
    low, high = float(options.min_guidance_scale), float(options.max_guidance_scale)
    if options.guidance_profile == "constant" or low == high:
        return high
    ramp = torch.linspace(0, 1, frames)
    return low + (high - low) * (ramp if options.guidance_profile == "linear" else 1 - (2 * ramp - 1).abs())


def _vector(model: StableVideoDiffusion, options: Any, frames: int) -> Tensor:
    """The vector condition (1, n) of a clip, or (1, T, 5) on an orbit."""
    told = [torch.tensor([float(v)]) for v in (options.fps, options.motion_bucket_id, options.noise_aug_strength)]
    config = model.networks.config("unet")
    count = config["projection_class_embeddings_input_dim"] // config["addition_time_embed_dim"]
    clip = vector(*told)
    if options.orbit:
        return turning(clip, torch.tensor([options.elevation]), frames)[..., :count]
    return torch.nn.functional.pad(clip, (0, max(0, count - 3)))[:, :count]


def _text(model: StableVideoDiffusion, options: Any) -> dict[str, Tensor]:
    """The context of a checkpoint that takes text."""
    wanted = {"context": options.prompt, "temporal": options.temporal_prompt}
    texts = model.texts.cached([text for text in wanted.values() if text])
    count = options.num_videos_per_prompt
    return {name: torch.stack([texts[text]] * count) for name, text in wanted.items() if text}


def _picture(
    model: StableVideoDiffusion, options: Any, before: Tensor | None, generators: list[Generator]
) -> dict[str, Tensor]:
    """The context and the latents of the picture that a window starts from."""
    images = _given(model, options) if before is None else _last(model, options, before)
    noise = torch.stack([torch.randn(image.shape, generator=g) for image, g in zip(images, generators, strict=True)])
    cond = {
        "context": model.embedding(images),
        "concat": model.conditioning(images + options.noise_aug_strength * noise),
    }
    if options.temporal_image:
        cond["temporal"] = model.embedding(_read(options.temporal_image, options)[None].expand_as(images))
    return cond


def _given(model: StableVideoDiffusion, options: Any) -> Tensor:
    """The picture (B, 3, H, W) that the user gives, or has made, the same for each clip."""
    if options.image:
        one = _read(options.image, options)
    else:
        card, found = image_checkpoint(options.image_checkpoint)
        one = picture(card, found, options.prompt, options.seed, (options.height, options.width), model.machine)
    return one[None].expand(options.num_videos_per_prompt, -1, -1, -1)


def cut_away(path: Path, options: Any, step: int) -> list[str]:
    """A line where much of a picture is outside the frame, with a size of about as many pixels, in steps, that fits it.

    Raises BadClip for a picture that cannot be read.
    """
    area = options.height * options.width
    rows, columns = clips.load_file(path, 1, options.height, options.width)[1]["resize_hw"]
    cut = 1 - area / (rows * columns)
    if cut <= MUCH:
        return []
    height, width = (
        max(step, round(math.sqrt(area * a / b) / step) * step) for a, b in ((rows, columns), (columns, rows))
    )
    fits = f"--height {height} --width {width} cuts less"
    return [f"{cut:.0%} of {path} is outside the frame of {options.height}x{options.width} and is cut away; {fits}."]


def _read(path: Path, options: Any) -> Tensor:
    pixels, _ = clips.load_file(path, 1, options.height, options.width)
    return pixels[:, 0]


def _last(model: StableVideoDiffusion, options: Any, before: Tensor) -> Tensor:
    """The frame (B, 3, H, W) that the next window starts from: the first that both share."""
    start = before.shape[2] - options.window_overlap
    return model.decode({"latents": before})[:, :, start].float().cpu().clamp(-1, 1)


def chain(options: Any) -> Chain:
    """The windows of a clip; an orbit is one window."""
    frames = (options.views or options.num_frames) if options.orbit else options.num_frames
    if options.orbit or frames <= options.window:
        return Chain(1, frames, 0, frames)
    stride = options.window - options.window_overlap
    return Chain(-(-(frames - options.window) // stride) + 1, options.window, options.window_overlap, frames)


def _windows(frames: int, options: Any) -> int:
    """How many windows a chain of so many frames is made of."""
    return (frames - options.window) // (options.window - options.window_overlap) + 1


def drift(windows: Chain, frames: Tensor) -> dict[str, Any]:
    """Mean colour and sharpness of each window of a long clip, frames (T, H, W, 3) of 8 bits; nothing for one window.

    Sharpness is the mean absolute difference of neighbouring pixels, in steps of 8 bits.
    """
    if windows.count == 1:
        return {}
    stride = windows.size - windows.overlap
    told = []
    for k in range(windows.count):
        part = frames[k * stride : k * stride + windows.size].float()
        sharp = torch.stack([part.diff(dim=d).abs().mean() for d in (1, 2)]).mean()
        told.append(
            {"colour": [round(c, 1) for c in part.mean((0, 1, 2)).tolist()], "sharpness": round(sharp.item(), 2)}
        )
    return {"window": told}
