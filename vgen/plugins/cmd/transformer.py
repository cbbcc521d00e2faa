"""CMD's motion model: a diffusion transformer over the map of rows and columns, that sees the content frame.

The map (B, D, T, S) has the motion of all rows beside that of all columns. It is DiT (arXiv:2212.09748) with
positions for two grids: patches of the map, and large patches of the content frame, which are dropped at the end.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vgen import lean
from vgen.plugins.cmd.layers import Attention, grid, through
from vgen.temporal import waves

with lean.imports():
    from diffusers.configuration_utils import ConfigMixin, register_to_config
    from diffusers.models.modeling_utils import ModelMixin

WAVES = 256  # numbers that tell a time


class Block(nn.Module):
    """Attention and a feed-forward net over tokens (B, N, width), each shifted, scaled and gated by what is told.

    The gates are 0 at first: a new block changes nothing.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(width, elementwise_affine=False, eps=1e-6) for _ in range(2))
        self.attn = Attention(width, heads, width // heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(told)[:, None].chunk(6, -1)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class MotionTransformer(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """The motion model; its defaults are the paper's, DiT-XL/2. Its output is exactly 0 before training.

    It is told a text as one vector of `text_width`, or one of `classes`, the number `classes` standing for none; 0
    turns either off. `content_patch_size` 0 hides the content frame. With `learned_variance` it gives twice the
    channels: the noise, and where between its bounds the logarithm of the step's variance lies.
    """

    _supports_gradient_checkpointing = True

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        motion_channels: int = 8,
        patch_size: int = 2,
        width: int = 1152,
        depth: int = 28,
        heads: int = 16,
        content_channels: int = 4,
        content_patch_size: int = 8,
        text_width: int = 1024,
        classes: int = 0,
        learned_variance: bool = True,
    ) -> None:
        super().__init__()
        self.patch, self.width = patch_size, width
        self.gradient_checkpointing = False
        self.motion_in = nn.Conv2d(motion_channels, width, patch_size, stride=patch_size)
        wide = content_patch_size
        self.content_in = nn.Conv2d(content_channels, width, wide, stride=wide) if wide else None
        self.time_in = nn.Sequential(nn.Linear(WAVES, width), nn.SiLU(), nn.Linear(width, width))
        self.text_in = nn.Linear(text_width, width) if text_width else None
        self.class_in = nn.Embedding(classes + 1, width) if classes else None
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm_out = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulation_out = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        channels = motion_channels * (2 if learned_variance else 1)
        self.out = nn.Linear(width, patch_size**2 * channels)
        self.start()

    def start(self) -> None:
        """Draw new weights as DiT does; what ends in zero gates and in the output is zero."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                assert module.bias is not None
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        for name, weight in self.named_parameters():
            if name.startswith("time_in") and name.endswith("weight"):
                nn.init.normal_(weight, std=0.02)
            elif "modulation" in name or name.startswith("out."):
                nn.init.zeros_(weight)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        content: Tensor | None = None,
        text: Tensor | None = None,
        label: Tensor | None = None,
    ) -> Tensor:
        """The noise in a map (B, D, T, S) at times t (B,), and with learned variance as many channels more.

        `content` (B, C, h, w), `text` (B, text_width), `label` (B,): those that the network takes.
        """
        tokens = self._tokens(self.motion_in(x))
        if self.content_in is not None:
            assert content is not None
            tokens = torch.cat([tokens, self._tokens(self.content_in(content))], 1)
        told = self._told(t, text, label)
        tokens = through(self, tokens, told)
        rows, columns = x.shape[2] // self.patch, x.shape[3] // self.patch
        shift, scale = self.modulation_out(told)[:, None].chunk(2, -1)
        out = self.out(self.norm_out(tokens[:, : rows * columns]) * (1 + scale) + shift)
        out = out.unflatten(1, (rows, columns)).unflatten(-1, (self.patch, self.patch, -1))
        made: Tensor = out.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
        return made

    def _tokens(self, patches: Tensor) -> Tensor:
        """Patches (B, width, rows, columns) to tokens (B, N, width) that know their places."""
        _, _, rows, columns = patches.shape
        places = grid(rows, columns, self.width, patches.device).flatten(0, 1)
        return patches.flatten(2).transpose(1, 2) + places.to(patches.dtype)

    def _told(self, t: Tensor, text: Tensor | None, label: Tensor | None) -> Tensor:
        """What every token is told (B, width): the time, and the text or the class."""
        dtype = self.out.weight.dtype
        made: Tensor = self.time_in(waves(t, WAVES).to(dtype))
        if self.text_in is not None:
            assert text is not None
            made = made + self.text_in(text.to(dtype))
        if self.class_in is not None:
            assert label is not None
            made = made + self.class_in(label)
        return made
