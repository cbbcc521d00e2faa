"""What a clip of CogVideoX takes: which networks are called, how often, on what. A cache of layers is left out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vgen.cost import Call, Cost, empty
from vgen.plugins.cogvideox import autoencoder
from vgen.samplers import window_starts

if TYPE_CHECKING:
    from vgen.plugins.cogvideox.model import CogVideoX


def cost(model: CogVideoX, options: Any) -> Cost:
    """The calls for `num_videos_per_prompt` clips, in their order, and the latents of one."""
    count, passes = options.num_videos_per_prompt, 1 if options.guidance_scale == 1 else 2
    shape, skip = model.shape(options)
    size, stride = model.window(options, shape[1]) or (shape[1], shape[1])
    windows = len(window_starts(shape[1], size, stride))
    told = model.networks.config("transformer")
    cond = {"text": empty(count * passes, told["max_text_seq_length"], told["text_embed_dim"])}
    x, t = empty(count * passes, shape[0], size, *shape[2:]), empty(count * passes)
    cond |= {"image": x} if options.image else {}
    part, vae = model.denoiser("transformer", options), model.networks.get("vae")
    encoder, steps = model.networks.get("text_encoder"), options.num_inference_steps
    made = (shape[0], shape[1] - skip, *shape[2:])
    calls = [
        Call("text_encoder", encoder, lambda: model.texts.of([""]), 2, stays=False),
        Call("transformer", part.network, lambda: part.predict(x, t, cond), steps * windows, passes),
        Call("vae", vae, lambda: autoencoder.decode(vae, empty(1, *made)), count),
    ]
    return Cost(calls, {"latents": made})
