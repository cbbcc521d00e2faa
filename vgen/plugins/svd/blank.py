"""What the interpolation network sees where frames are not known: latents that are learned, the same everywhere."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vgen import lean

with lean.imports():
    from diffusers.configuration_utils import ConfigMixin, register_to_config
    from diffusers.models.modeling_utils import ModelMixin


class Blank(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """One learned number for each of `channels`, stored as a network of its own."""

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.zeros(channels))

    def forward(self, ends: Tensor, frames: int) -> Tensor:
        """The condition (B, C + 1, T, H, W) of clips of which `ends` (B, C, 2, H, W), unscaled latents, are known.

        The last channel says of each frame whether it is.
        """
        batch, _, _, height, width = ends.shape
        middle = self.embedding.view(1, -1, 1, 1, 1).expand(batch, -1, frames - 2, height, width).to(ends)
        known = torch.zeros(batch, 1, frames, height, width).to(ends)
        known[:, :, [0, -1]] = 1
        return torch.cat([torch.cat([ends[:, :, :1], middle, ends[:, :, 1:]], 2), known], 1)
