"""CogVideoX's joint attention over text and video: as plain matrix products, and over packs of clips.

On a CPU without AMX, torch's fused attention runs bf16 at a fraction of the speed of its matrix products; at the
demo's size (336 tokens, heads of 48) forward and backward take 2.5 times as long as they do here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from vgen import lean

with lean.imports():
    from diffusers.models.embeddings import apply_rotary_emb

Positions = tuple[Tensor, Tensor] | None  # cosines and sines (N, D), where a checkpoint has rotary positions


class Products:
    """Attention processor: text (B, L, D) before video (B, N, D), positions on the video's queries and keys."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Positions = None,
    ) -> tuple[Tensor, Tensor]:
        """Both streams after attention; `attention_mask`, broadcastable to (B, heads, L + N, L + N), is added."""
        length = encoder_hidden_states.shape[1]
        q, k, v = _projected(attn, torch.cat([encoder_hidden_states, hidden_states], 1))
        q, k = (_turned(one, length, image_rotary_emb) for one in (q, k))
        out = _out(attn, _products(q, k, v, attention_mask))
        return out[:, length:], out[:, :length]


def attend(attn: Any, clips: Sequence[Tensor], length: int, positions: Sequence[Positions]) -> list[Tensor]:
    """Attention of each clip to itself, for clips (1, L + N, D) of any N whose first L = `length` tokens are text.

    The projections run on all tokens at once. The products are those of the network's processor.
    """
    product = _products if isinstance(attn.processor, Products) else scaled_dot_product_attention
    counts = [clip.shape[1] for clip in clips]
    split = [one.split(counts, 2) for one in _projected(attn, torch.cat(list(clips), 1))]
    made = []
    for q, k, v, where in zip(*split, positions, strict=True):
        made.append(product(_turned(q, length, where), _turned(k, length, where), v))
    return list(_out(attn, torch.cat(made, 2)).split(counts, 1))


def _projected(attn: Any, x: Tensor) -> list[Tensor]:
    """Queries, keys and values (B, heads, tokens, D) of x (B, tokens, heads * D), normed where the network does so."""
    q, k, v = (layer(x).unflatten(2, (attn.heads, -1)).transpose(1, 2) for layer in (attn.to_q, attn.to_k, attn.to_v))
    q, k = (norm(one) if norm is not None else one for norm, one in ((attn.norm_q, q), (attn.norm_k, k)))
    return [q, k, v]


def _turned(x: Tensor, length: int, positions: Positions) -> Tensor:
    """Queries or keys (B, heads, L + N, D) with rotary positions on the N of the video."""
    if positions is None:
        return x
    turned: Any = apply_rotary_emb(x[:, :, length:], cast(Any, positions))
    return torch.cat([x[:, :, :length], turned], 2)


def _products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """What scaled_dot_product_attention computes, in v's precision."""
    scores = (q * q.shape[-1] ** -0.5).to(v.dtype) @ k.to(v.dtype).transpose(-1, -2)
    if mask is not None:
        scores = scores + mask
    return scores.softmax(-1).to(v.dtype) @ v


def _out(attn: Any, x: Tensor) -> Tensor:
    """Heads (B, heads, tokens, D) to tokens (B, tokens, heads * D)."""
    out: Tensor = attn.to_out[1](attn.to_out[0](x.transpose(1, 2).flatten(2)))
    return out
