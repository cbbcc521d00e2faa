"""What both of CMD's own networks are made of: attention, and positions that take no weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vgen.temporal import waves


class Attention(nn.Module):
    """Attention of the tokens (B, N, width) of each row to each other."""

    def __init__(self, width: int, heads: int, head_width: int) -> None:
        super().__init__()
        inner = heads * head_width
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, inner) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(inner, width)])  # layers are named as diffusers names them: for adapters

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, N, width) to what each gathers from all."""
        layers = self.to_q, self.to_k, self.to_v
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in layers)
        out: Tensor = self.to_out[0](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out


def through(network: Any, x: Tensor, *told: Tensor) -> Tensor:
    """Tokens through the `blocks` of a network, each computed again for gradients where its checkpointing is on."""
    again = network.gradient_checkpointing and torch.is_grad_enabled()
    for block in network.blocks:
        x = network._gradient_checkpointing_func(block, x, *told) if again else block(x, *told)
    return x


def grid(rows: int, columns: int, width: int, device: torch.device | None = None) -> Tensor:
    """Positions (rows, columns, width) on a grid: half of each tells the row, half the column."""
    down, across = (waves(torch.arange(n, device=device), width // 2) for n in (rows, columns))
    half = width // 2
    return torch.cat([down[:, None].expand(-1, columns, half), across[None].expand(rows, -1, half)], -1)
