"""CMD's video autoencoder: a clip as one picture and the motion of its rows and columns (arXiv:2403.14148).

The picture, the content frame, is a weighted mean of the frames, so it looks like one. Each patch of a clip is then
told by three parts: its place in the picture, its row over time, and its column over time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vgen import lean
from vgen.plugins.cmd.layers import Attention, grid, through
from vgen.temporal import waves

with lean.imports():
    from diffusers.configuration_utils import ConfigMixin, register_to_config
    from diffusers.models.modeling_utils import ModelMixin

Streams = tuple[Tensor, Tensor, Tensor]


class Block(nn.Module):
    """Attention over time at each place, then over each frame, then a feed-forward net; patches (B, T, H, W, width)."""

    def __init__(self, width: int, heads: int, head_width: int) -> None:
        super().__init__()
        self.norm_time, self.norm_space, self.norm_ff = (nn.LayerNorm(width) for _ in range(3))
        self.time, self.space = (Attention(width, heads, head_width) for _ in range(2))
        self.ff_in, self.ff_out = nn.Linear(width, 8 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, frames, rows, columns, _ = x.shape
        seen = self.norm_time(x).permute(0, 2, 3, 1, 4).flatten(0, 2)
        x = x + self.time(seen).unflatten(0, (batch, rows, columns)).permute(0, 3, 1, 2, 4)
        seen = self.norm_space(x).flatten(2, 3).flatten(0, 1)
        x = x + self.space(seen).unflatten(1, (rows, columns)).unflatten(0, (batch, frames))
        value, gate = self.ff_in(self.norm_ff(x)).chunk(2, -1)
        return x + self.ff_out(value * F.gelu(gate))


class _Half(nn.Module):
    """What the encoder and the decoder share: blocks, and the weights that turn patches into pictures again."""

    def __init__(self, channels: int, patch: int, width: int, depth: int, heads: int, head_width: int) -> None:
        super().__init__()
        self.patch_in = nn.Conv2d(channels, width, patch, stride=patch)
        self.blocks = nn.ModuleList(Block(width, heads, head_width) for _ in range(depth))
        self.patch_out = nn.ConvTranspose2d(width, channels, patch, stride=patch)
        self.gradient_checkpointing = False
        assert self.patch_out.bias is not None
        for weight in (self.patch_out.weight, self.patch_out.bias):  # a content frame is at first the mean of frames,
            nn.init.zeros_(weight)  # and a decoded clip, which has no norm before it, does not begin too large

    def run(self, x: Tensor) -> Tensor:
        """Patches (B, T, H, W, width) through all blocks; each is told its time and its place."""
        _, frames, rows, columns, width = x.shape
        when = waves(torch.arange(frames, device=x.device), width)[:, None, None]
        return through(self, x + (when + grid(rows, columns, width, x.device)).to(x.dtype))

    def patches(self, clip: Tensor) -> Tensor:
        """A clip (B, C, T, h, w) to patches (B, T, H, W, width)."""
        made: Tensor = self.patch_in(clip.transpose(1, 2).flatten(0, 1))
        return made.permute(0, 2, 3, 1).unflatten(0, (len(clip), clip.shape[2]))

    def clip(self, x: Tensor) -> Tensor:
        """Patches (B, T, H, W, width) to a clip (B, C, T, h, w)."""
        made: Tensor = self.patch_out(x.flatten(0, 1).permute(0, 3, 1, 2))
        return made.unflatten(0, x.shape[:2]).transpose(1, 2)


class Encoder(_Half):
    """A clip to its content frame and motion."""

    def __init__(self, motion_channels: int, mean_content: bool, *sizes: int) -> None:
        super().__init__(*sizes)
        width = self.patch_in.out_channels
        self.mean_content = mean_content
        self.rows_out, self.columns_out = (nn.Linear(width, motion_channels) for _ in range(2))

    def forward(self, clip: Tensor) -> Streams:
        """A clip (B, C, T, h, w) to content (B, C, 1, h, w) and motion (B, D, T, H, 1), (B, D, T, 1, W) in [-1, 1]."""
        x = self.run(self.patches(clip))
        by_row = self.rows_out(x.mean(3)).tanh().permute(0, 3, 1, 2)[..., None]
        by_column = self.columns_out(x.mean(2)).tanh().permute(0, 3, 1, 2)[..., None, :]
        return (clip * self.weights(x)).sum(2, keepdim=True), by_row, by_column

    def weights(self, x: Tensor) -> Tensor:
        """How much each frame counts in the content frame (B, C, T, h, w): over the frames weights sum to 1."""
        logits = self.clip(x)
        logits = torch.zeros_like(logits) if self.mean_content else logits
        return logits.float().softmax(2).to(x.dtype)


class Decoder(_Half):
    """Content frame and motion to the clip."""

    def __init__(self, motion_channels: int, pixels: bool, *sizes: int) -> None:
        super().__init__(*sizes)
        width = self.patch_in.out_channels
        self.rows_in, self.columns_in = (nn.Linear(motion_channels, width) for _ in range(2))
        self.pixels = pixels

    def forward(self, content: Tensor, motion_x: Tensor, motion_y: Tensor) -> Tensor:
        """The clip (B, C, T, h, w) of the streams that the encoder gives."""
        made = self.clip(self.run(self.told(content, motion_x, motion_y)))
        return 2 * made.sigmoid() - 1 if self.pixels else made

    def told(self, content: Tensor, motion_x: Tensor, motion_y: Tensor) -> Tensor:
        """What is known of each patch (B, T, H, W, width): the sum of its place, its row and its column."""
        by_row = self.rows_in(motion_x.permute(0, 2, 3, 4, 1))
        by_column = self.columns_in(motion_y.permute(0, 2, 3, 4, 1))
        made: Tensor = self.patches(content) + by_row + by_column
        return made


class FactoredAutoencoder(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """The whole autoencoder, of a clip of `in_channels`: latents of single frames, or `pixels` in [-1, 1].

    Its defaults are the paper's sizes. Height and width are multiples of `patch_size`; lengths are any. `mean_content`
    has all frames count alike in the content frame. `scaling_factor` brings motion to unit size.
    """

    _supports_gradient_checkpointing = True

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        in_channels: int = 4,
        motion_channels: int = 8,
        patch_size: int = 2,
        width: int = 384,
        depth: int = 8,
        heads: int = 8,
        head_width: int = 48,
        pixels: bool = False,
        mean_content: bool = False,
        scaling_factor: float = 1.0,
    ) -> None:
        super().__init__()
        sizes = (in_channels, patch_size, width, depth, heads, head_width)
        self.encoder = Encoder(motion_channels, mean_content, *sizes)
        self.decoder = Decoder(motion_channels, pixels, *sizes)

    def forward(self, clip: Tensor) -> Any:
        """A clip (B, C, T, h, w), encoded and decoded."""
        return self.decoder(*self.encoder(clip))
