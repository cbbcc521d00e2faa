"""CogVideoX's transformer on a pack: clips of any sizes in one sequence, each attending to itself alone.

The untouched network works token by token but for attention and the modulation by time. So its own layers run on all
tokens at once, modulation and attention on one clip at a time: attention is block-diagonal without a mask, and takes
memory that grows with the longest clip and not with the pack. Packed and separate calls differ by rounding alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vgen.plugins.cogvideox.attention import Positions, attend

Streams = list[tuple[Tensor, Tensor]]  # of each clip: video (1, N, D) and text (1, L, D)


def predict(
    network: Any,
    clips: Sequence[Tensor],
    text: Tensor,
    times: Tensor,
    positions: Sequence[Positions],
    ofs: Tensor | None,
) -> list[Tensor]:
    """The network's output for each of n clips (1, T, C, H, W), every one with a text, a time and positions of its own.

    `text` is (n, L, D), `times` (n,), `positions` what each clip's video tokens are turned by, `ofs` (1,) or None.
    """
    told = _told(network, times, ofs, text.dtype)
    streams = [_embedded(network, text[i : i + 1], clip) for i, clip in enumerate(clips)]
    for block in network.transformer_blocks:
        if torch.is_grad_enabled() and network.gradient_checkpointing:
            streams = network._gradient_checkpointing_func(_block, block, streams, told, positions)
        else:
            streams = _block(block, streams, told, positions)
    outputs = []
    for clip, one, (video, _) in zip(clips, told, streams, strict=True):
        out = network.proj_out(network.norm_out(network.norm_final(video), temb=one))
        outputs.append(_unpatched(out, clip.shape, network.config))
    return outputs


def _told(network: Any, times: Tensor, ofs: Tensor | None, dtype: torch.dtype) -> list[Tensor]:
    """What modulates each clip's tokens, (1, E): its time, and the offset that some checkpoints are told."""
    told = network.time_embedding(network.time_proj(times).to(dtype))
    if network.ofs_embedding is not None:
        told = told + network.ofs_embedding(network.ofs_proj(ofs).to(dtype))
    return list(told.split(1))


def _embedded(network: Any, text: Tensor, clip: Tensor) -> tuple[Tensor, Tensor]:
    """The first streams of a clip; the network lays out its text first."""
    x = network.embedding_dropout(network.patch_embed(text, clip))
    return x[:, text.shape[1] :], x[:, : text.shape[1]]


def _block(block: Any, streams: Streams, told: Sequence[Tensor], positions: Sequence[Positions]) -> Streams:
    """One block of the network on all clips."""
    normed = [block.norm1(*pair, one) for pair, one in zip(streams, told, strict=True)]
    streams = _added(streams, normed, attend(block.attn1, _joined(normed), normed[0][1].shape[1], positions))
    normed = [block.norm2(*pair, one) for pair, one in zip(streams, told, strict=True)]
    tokens = _joined(normed)
    return _added(streams, normed, block.ff(torch.cat(tokens, 1)).split([x.shape[1] for x in tokens], 1))


def _joined(normed: Sequence[tuple[Tensor, ...]]) -> list[Tensor]:
    """Text before video, (1, L + N, D), for each clip."""
    return [torch.cat([text, video], 1) for video, text, _, _ in normed]


def _added(streams: Streams, normed: Sequence[tuple[Tensor, ...]], out: Sequence[Tensor]) -> Streams:
    """Both streams of each clip with what a layer made of them, through their gates."""
    added = []
    for (video, text), (_, _, gate, text_gate), one in zip(streams, normed, out, strict=True):
        made_text, made_video = one.split([text.shape[1], video.shape[1]], 1)
        added.append((video + gate * made_video, text + text_gate * made_text))
    return added


def _unpatched(x: Tensor, shape: torch.Size, config: Any) -> Tensor:
    """Patches (1, N, C' p_t p p) to the clip's frames (1, T, C', H, W)."""
    _, frames, _, height, width = shape
    p, p_t = config.patch_size, config.patch_size_t or 1
    x = x.reshape(frames // p_t, height // p, width // p, -1, p_t, p, p)
    return x.permute(0, 4, 3, 1, 5, 2, 6).reshape(1, frames, -1, height, width)
