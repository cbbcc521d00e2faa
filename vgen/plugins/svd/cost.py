"""What a clip of Stable Video Diffusion takes: which networks are called, how often, on what."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from vgen import clip_image
from vgen.cost import Call, Cost, empty
from vgen.plugins.svd import autoencoder, draw

if TYPE_CHECKING:
    from vgen.plugins.svd.model import StableVideoDiffusion


def cost(model: StableVideoDiffusion, options: Any) -> Cost:
    """The calls for `num_videos_per_prompt` clips, in their order, and the latents of one.

    What makes a picture of a prompt is another checkpoint's cost. Of windows in a chain, the frames that are decoded
    for the next one to start from are left out.
    """
    _, h, w = model.space.strides
    count, windows = options.num_videos_per_prompt, draw.chain(options)
    scale = draw.guidance(options, windows.size)
    passes = 1 if not isinstance(scale, Tensor) and scale == 1 else 2
    shape = (model.space.channels, windows.size, options.height // h, options.width // w)
    batch, vae, unet = count * passes, model.network("vae"), model.networks.config("unet")
    context = empty(batch, 1, unet["cross_attention_dim"])
    vector = empty(batch, unet["projection_class_embeddings_input_dim"] // unet["addition_time_embed_dim"])
    vector = vector[:, None].expand(-1, windows.size, -1) if options.orbit else vector
    cond = {"context": context, "vector": vector}
    calls = []
    if model.takes_text:
        encoder = model.networks.get("text_encoder")
        calls.append(Call("text_encoder", encoder, lambda: model.texts.of([""]), 1, stays=False))
        cond["context"] = empty(batch, model.texts.length, unet["cross_attention_dim"])
    else:
        encoder, picture = model.networks.get("image_encoder"), empty(count, 3, options.height, options.width)
        calls.append(Call("image_encoder", encoder, lambda: clip_image.embedding(encoder, picture), windows.count))
        calls.append(Call("vae, picture", vae, lambda: autoencoder.mode(vae, picture), windows.count))
        cond["concat"] = empty(batch, *shape)
    part, x, t = model.denoiser("unet", options), empty(batch, *shape), empty(batch)
    steps = (2 * options.num_inference_steps - 1) if options.sampler == "heun" else options.num_inference_steps
    calls.append(Call("unet", part.network, lambda: part.predict(x, t, cond), steps * windows.count, passes))
    made = (shape[0], windows.frames, *shape[2:])
    z, chunk = empty(1, *made), options.decode_chunk_size
    calls.append(Call("vae", vae, lambda: autoencoder.decode(vae, z, chunk), count))
    return Cost(calls, {"latents": made})
