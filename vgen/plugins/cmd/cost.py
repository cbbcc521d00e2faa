"""What a clip of CMD takes: which networks are called, how often, on what."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vgen import framewise
from vgen.cost import Call, Cost, empty
from vgen.plugins.cmd import autoencoder, sizes

if TYPE_CHECKING:
    from vgen.plugins.cmd.model import CMD


def cost(model: CMD, options: Any) -> Cost:
    """The calls for `num_videos_per_prompt` clips, in their order, and the streams of one."""
    _, h, w = model.space.strides
    count, channels = options.num_videos_per_prompt, model.space.channels
    height, width, frames = options.height // h, options.width // w, options.num_frames
    streams = {"content": (channels, 1, height, width)}
    rows, columns = sizes.motion(model, options)
    if not options.still:
        wide = int(model.config("motion")["motion_channels"])
        streams |= {"motion_x": (wide, frames, rows, 1), "motion_y": (wide, frames, 1, columns)}
    calls = []
    if not model.classes:
        encoder = model.networks.get("text_encoder")
        calls.append(Call("text_encoder", encoder, lambda: model.texts.of([""]), 2, stays=False))
    if not options.content_image:
        calls.append(_content(model, options, count, streams["content"]))
    if not options.still:
        calls.append(_motion(model, options, count, (rows, columns), streams["content"]))
        network = model.networks.get("autoencoder")
        stored = {name: empty(1, *shape) for name, shape in streams.items()}
        calls.append(Call("autoencoder", network, lambda: autoencoder.decode(network, stored), count))
    if model.has("vae"):
        vae, z = model.networks.get("vae"), empty(1, channels, 1 if options.still else frames, height, width)
        calls.append(Call("vae", vae, lambda: framewise.decode(vae, z), count))
    return Cost(calls, streams)


def _content(model: CMD, options: Any, count: int, shape: tuple[int, ...]) -> Call:
    part, passes = model.denoiser("unet", options), 1 if options.guidance_scale == 1 else 2
    cond = {"label": empty(count * passes).long()} if model.classes else {"text": _text(model, count * passes)}
    x = empty(count * passes, *shape)
    return Call("content", part.network, lambda: part.predict(x, empty(len(x)), cond), options.content_steps, passes)


def _motion(model: CMD, options: Any, count: int, size: tuple[int, int], content: tuple[int, ...]) -> Call:
    part, passes = model.denoiser("motion", options), 1 if options.motion_guidance_scale == 1 else 2
    batch = count * passes
    cond = {"label": empty(batch).long()} if model.classes else {"text": _text(model, batch).mean(1)}
    cond["content"] = empty(batch, content[0], *content[2:])
    x = empty(batch, int(model.config("motion")["motion_channels"]), options.num_frames, sum(size), 1)
    return Call("motion", part.network, lambda: part.predict(x, empty(batch), cond), options.motion_steps, passes)


def _text(model: CMD, count: int) -> Any:
    told = model.networks.config("text_encoder")
    return empty(count, told["max_position_embeddings"], told["hidden_size"])
