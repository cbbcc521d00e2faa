"""What MagicVideo's denoisers are asked for: key frames of a text, and frames between two, both by DDIM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vgen import generate, samplers
from vgen.diffusion import initial
from vgen.latents import scale, unscale
from vgen.model import Draw, Sampler
from vgen.plugins.magicvideo import BETWEEN, keyframes

if TYPE_CHECKING:
    from vgen.plugins.magicvideo.model import MagicVideo

Pair = tuple[dict[str, Tensor], dict[str, Tensor]]  # conditions with and without the text


def keys(model: MagicVideo, options: Any) -> Draw:
    """`num_videos_per_prompt` clips of key frames, with seeds that count up from `seed`."""
    count = options.num_videos_per_prompt
    _, h, w = model.space.strides
    shape = (model.space.channels, options.num_frames, options.height // h, options.width // w)
    seeds = [options.seed + i for i in range(count)]
    cond, uncond = _told(model, (options.prompt, options.negative_prompt), float(options.fps), count)
    noise = samplers.clip_noise(shape, seeds, model.machine.device)()
    sampler: Sampler = samplers.dpmpp_2m if options.sampler == "dpmpp-2m" else samplers.ddim
    times = model.process.times(options.num_inference_steps)
    x = initial(model.process, times[0], noise)
    return Draw(x, times, cond, uncond, float(options.guidance_scale), sampler)


def _told(model: MagicVideo, texts: tuple[str, str], fps: float, count: int) -> Pair:
    """The text, or the one to keep away from, and the frame rate, of `count` clips."""
    device = model.machine.device
    found, rate = model.texts.cached(texts), torch.full((count,), fps, device=device)
    one, other = ({"text": torch.stack([found[text]] * count).to(device), "fps": rate} for text in texts)
    return one, other


def between(model: MagicVideo, ends: Tensor, options: Any, seeds: Sequence[int]) -> Tensor:
    """New frames (B, 3, 3, H, W) of pairs of frames (B, 3, 2, H, W), both in [-1, 1]; a seed for each pair."""
    part, device = model.denoiser(BETWEEN, options), model.machine.device
    seen = keyframes.known(scale(model.space, model.moments(ends.float())["mean"]).float(), keyframes.SPAN)
    cond, uncond = _told(model, (options.prompt, ""), float(options.conditioning_fps), len(seeds))
    cond, uncond = ({**one, "concat": seen.to(device)} for one in (cond, uncond))
    shape = (model.space.channels, *seen.shape[2:])
    times = model.process.times(options.num_inference_steps)
    x = initial(model.process, times[0], samplers.clip_noise(shape, seeds, device)())
    asked = Draw(x, times, cond, uncond, float(options.guidance_scale), samplers.ddim)
    with model.machine.holding(*part.modules.values()):
        made = generate.draw(part, asked, lambda name, i, n: None)
    pixels = model.decode({"latents": unscale(model.space, made)})
    return pixels[:, :, 1:-1].float().cpu()
