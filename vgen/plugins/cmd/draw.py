"""What CMD's models are asked for: a content frame, and motion given the frame, both by DDIM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vgen import clips, samplers
from vgen.diffusion import from_scheduler_config, initial
from vgen.latents import scale, unscale
from vgen.machine import seeded
from vgen.model import Draw
from vgen.plugins.cmd import sizes
from vgen.plugins.cmd.labels import Labels

if TYPE_CHECKING:
    from vgen.plugins.cmd.model import CMD

Pair = tuple[dict[str, Tensor], dict[str, Tensor]]  # conditions with and without


def told(model: CMD, options: Any) -> Pair:
    """The texts (B, L, D) or classes (B,) of the clips."""
    count, device = options.num_videos_per_prompt, model.machine.device
    if model.classes:
        return Labels(model.classes).asked(options.class_label, count, device)
    wanted = options.prompt, options.negative_prompt
    texts = model.texts.cached(wanted)
    one, other = ({"text": torch.stack([texts[text]] * count).to(device)} for text in wanted)
    return one, other


def content(model: CMD, options: Any) -> Draw:
    """What the content model is asked for; noise as diffusers' image pipeline draws it, so that a seed is the same."""
    cond, uncond = told(model, options)
    process = from_scheduler_config(model.networks.config("scheduler"))
    _, h, w = model.space.strides
    seeds = [options.seed + i for i in range(options.num_videos_per_prompt)]
    shape = (model.space.channels, 1, options.height // h, options.width // w)
    noise = samplers.clip_noise(shape, seeds, model.machine.device)()
    times = process.times(options.content_steps)
    x = initial(process, times[0], noise)
    return Draw(x, times, cond, uncond, float(options.guidance_scale), samplers.ddim)


def motion(model: CMD, options: Any, streams: Mapping[str, Tensor]) -> Draw:
    """What the motion model is asked for, given the stream 'content'; its noise is drawn from the motion's own seed."""
    device = model.machine.device
    seen = scale(model.space, streams["content"].to(device))[:, :, -1]
    cond, uncond = (
        {"content": seen, **{name: value.mean(1) if name == "text" else value for name, value in one.items()}}
        for one in told(model, options)
    )
    config = model.config("motion")
    process = from_scheduler_config(sizes.noise(config))
    shape = (config["motion_channels"], options.num_frames, sum(sizes.motion(model, options)), 1)
    first = options.seed if options.motion_seed is None else options.motion_seed
    drawn = [torch.randn(shape, generator=seeded("motion", first + i)) for i in range(len(seen))]
    times = process.times(options.motion_steps)
    x = initial(process, times[0], torch.stack(drawn).to(device))
    return Draw(x, times, cond, uncond, float(options.motion_guidance_scale), samplers.ddim)


def given(model: CMD, options: Any) -> Tensor:
    """The content frame (B, C, 1, h, w), unscaled, that is the picture of --content-image, the same for each clip."""
    pixels, _ = clips.load_file(options.content_image, 1, options.height, options.width)
    frame = unscale(model.space, model.images(pixels[None])).cpu()
    return frame.expand(options.num_videos_per_prompt, -1, -1, -1, -1)
