"""What an image of Stable Diffusion takes: which networks are called, how often, on what."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vgen import framewise
from vgen.cost import Call, Cost, empty

if TYPE_CHECKING:
    from vgen.plugins.sd.model import StableDiffusion


def cost(model: StableDiffusion, options: Any) -> Cost:
    """The calls for `num_videos_per_prompt` images, in their order, and the latents of one."""
    _, h, w = model.space.strides
    count, passes = options.num_videos_per_prompt, 1 if options.guidance_scale == 1 else 2
    shape = (model.space.channels, options.num_frames, options.height // h, options.width // w)
    told = model.networks.config("text_encoder")
    text = empty(count * passes, told["max_position_embeddings"], told["hidden_size"])
    part, x, t = model.denoiser("unet", options), empty(count * passes, *shape), empty(count * passes)
    encoder, vae = model.networks.get("text_encoder"), model.networks.get("vae")
    calls = [
        Call("text_encoder", encoder, lambda: model.texts.of([""]), 2, stays=False),
        Call("unet", part.network, lambda: part.predict(x, t, {"text": text}), options.num_inference_steps, passes),
        Call("vae", vae, lambda: framewise.decode(vae, empty(1, *shape)), count),
    ]
    return Cost(calls, {"latents": shape})
