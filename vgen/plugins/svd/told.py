"""What each part is told of the clips of a training batch; vectors are fps - 1, motion bucket, strength of noise."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Generator, Tensor

from vgen.errors import UsageError
from vgen.latents import unscale
from vgen.plugins.svd.pictures import LOG_MEAN, LOG_STD

if TYPE_CHECKING:
    from vgen.plugins.svd.model import StableVideoDiffusion

Batch = Mapping[str, Any]
BETWEEN = 5  # frames of the interpolation network: the first and the last are known


def vector(fps: Tensor, bucket: Tensor, noise: Tensor) -> Tensor:
    """The vector condition (B, 3)."""
    return torch.stack([fps - 1, bucket, noise], -1)


def turning(clip: Tensor, elevation: Tensor, frames: int) -> Tensor:
    """The vector condition (B, T, 5) of a camera that goes once around: of each frame also elevation and azimuth.

    Both in degrees; frame k of T stands at 360 k / T (SV3D's orbit; SVD-MV's elevation is the case of one clip).
    """
    azimuth = torch.arange(frames, device=clip.device) * (360 / frames)
    angles = torch.stack([elevation[:, None].expand(-1, frames), azimuth.expand(len(clip), -1)], -1)
    return torch.cat([clip[:, None].expand(-1, frames, -1), angles], -1)


def i2v(model: StableVideoDiffusion, batch: Batch, generator: Generator) -> dict[str, Tensor]:
    """The first frame: its embedding, and latents of one of its stored draws of noise."""
    conditioning, noise = _stored(batch, "conditioning"), _stored(batch, "noise")
    count, draws = noise.shape
    k = torch.randint(draws, (count,), generator=generator).to(noise.device)
    rows = torch.arange(count, device=noise.device)
    frames = batch["latents"].shape[2]
    return {
        "context": _stored(batch, "embedding")[:, :1],
        "vector": vector(_stored(batch, "fps")[:, 0], _stored(batch, "bucket")[:, 0], noise[rows, k]),
        "concat": conditioning[rows, k][:, :, None].expand(-1, -1, frames, -1, -1),
    }


def t2v(model: StableVideoDiffusion, batch: Batch, generator: Generator) -> dict[str, Tensor]:
    """The caption."""
    fps, bucket = _stored(batch, "fps")[:, 0], _stored(batch, "bucket")[:, 0]
    return {"context": batch["text"], "vector": vector(fps, bucket, torch.zeros_like(fps))}


def multiview(model: StableVideoDiffusion, batch: Batch, generator: Generator) -> dict[str, Tensor]:
    """The first view, and the angles of all."""
    cond = i2v(model, batch, generator)
    elevation = _stored(batch, "elevation", "Give a manifest to encode whose rows have a number 'elevation'.")[:, 0]
    return {**cond, "vector": turning(cond["vector"], elevation, batch["latents"].shape[2])}


def interpolate(model: StableVideoDiffusion, batch: Batch, generator: Generator) -> dict[str, Tensor]:
    """Both ends: their embeddings, and their latents with noise as strong as that of pictures, added to latents."""
    x = batch["latents"]
    if x.shape[2] != BETWEEN:
        raise UsageError(
            f"--part interpolate trains on clips of {BETWEEN} frames, not {x.shape[2]}.",
            f"Encode them anew: vgen encode svd CLIPS --num-frames {BETWEEN} -o latents/",
        )
    sigma = torch.exp(LOG_MEAN + LOG_STD * torch.randn(len(x), generator=generator)).to(x.device)
    ends = x[:, :, [0, -1]]
    noise = torch.randn(ends.shape, generator=generator).to(x)
    seen = unscale(model.space, ends + sigma.view(-1, 1, 1, 1, 1) * noise)
    fps, bucket = _stored(batch, "fps")[:, 0], _stored(batch, "bucket")[:, 0]
    return {
        "context": _stored(batch, "embedding"),
        "vector": vector(fps, bucket, sigma),
        "concat": model.networks.get("blank")(seen, BETWEEN),
    }


OF: Mapping[str, Callable[..., dict[str, Tensor]]] = {
    "i2v": i2v,
    "t2v": t2v,
    "multiview": multiview,
    "interpolate": interpolate,
}


def _stored(batch: Batch, name: str, do: str = "Encode the clips anew: vgen encode svd") -> Tensor:
    """A stream that every clip of the batch carries. Raises UsageError."""
    if name not in batch:
        raise UsageError(f"Clips of --data carry no '{name}'.", do)
    found: Tensor = batch[name]
    return found
