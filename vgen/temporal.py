"""Layers in time, hung on an image network that stays as it is: its code, its weights and their names.

A plan says which kind of layer goes where. `Temporal` holds the layers, and is saved as a network of its own;
`Inflated` hangs them on an image network and shows it clips as batches of frames. Every kind leaves its input as it is
at first, bit for bit, so that a network just inflated is the image model, frame by frame.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vgen import framewise, lean
from vgen.errors import VgenError

with lean.imports():
    from diffusers.configuration_utils import ConfigMixin, register_to_config
    from diffusers.models.modeling_utils import ModelMixin

Mask = Literal["pre", "post", "none"]
Plan = Sequence[Mapping[str, Any]]
AT_ONCE = 1 << 14  # places of a picture at which attention looks along time at once: kernels have their limits


@dataclass
class Clip:
    """What the layers know of the clips of a call: frames of each, and conditions by name, (B, ...) each.

    It is set before each call and stays: activations that are computed again for gradients need it once more.
    """

    frames: int = 1
    told: Mapping[str, Tensor] = field(default_factory=dict)


class FrameAdaptor(nn.Module):
    """A scale and a shift for each frame and channel: S^i y^i + B^i (arXiv:2211.11018); y^i at first."""

    def __init__(self, channels: int, frames: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(frames, channels))
        self.shift = nn.Parameter(torch.zeros(frames, channels))

    def forward(self, before: Tensor, after: Tensor, clip: Clip) -> Tensor:
        """(B T, C, H, W) to the same. Raises VgenError for clips of more frames than it has."""
        if clip.frames > len(self.scale):
            told = f"These layers tell {len(self.scale)} frames apart; the clip has {clip.frames}."
            raise VgenError(told, "Take shorter clips, or train layers for longer ones.")
        scale, shift = (one[: clip.frames, :, None, None].to(after.dtype) for one in (self.scale, self.shift))
        return (after.unflatten(0, (-1, clip.frames)) * scale + shift).flatten(0, 1)


class Convolution(nn.Module):
    """A convolution over three frames, which at first gives the middle one (arXiv:2209.14792)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, (3, 1), padding=(1, 0))
        nn.init.dirac_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]

    def forward(self, before: Tensor, after: Tensor, clip: Clip) -> Tensor:
        """(B T, C, H, W) to the same."""
        x = after.unflatten(0, (-1, clip.frames)).transpose(1, 2)
        made: Tensor = self.conv(x.flatten(3).to(self.conv.weight.dtype)).unflatten(3, x.shape[3:])
        return made.transpose(1, 2).flatten(0, 1).to(after.dtype)


class Attention(nn.Module):
    """Attention of each place of a picture along time, beside what the site does; it adds nothing at first.

    With the mask "pre" a frame knows itself and those before it: other scores are left out of the softmax. "post" sets
    them to zero after it, so that later frames still change the sum, and rows do not add up to one; "none" looks both
    ways.
    """

    def __init__(self, channels: int, head_width: int = 64, mask: Mask = "pre") -> None:
        super().__init__()
        self.heads, self.mask = channels // head_width, mask
        self.gradient_checkpointing = False
        self.norm = nn.LayerNorm(channels)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels, bias=False) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])  # named as in diffusers: for adapters
        nn.init.zeros_(self.to_out[0].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.to_out[0].bias)  # type: ignore[arg-type]

    def forward(self, before: Tensor, after: Tensor, clip: Clip) -> Tensor:
        """(B T, C, H, W) to the same."""
        tokens = before.unflatten(0, (-1, clip.frames)).permute(0, 3, 4, 1, 2)  # (B, H, W, T, C)
        rows = [self._again(some) for some in tokens.flatten(0, 2).split(AT_ONCE)]
        made = torch.cat(rows).unflatten(0, tokens.shape[:3])
        return after + made.permute(0, 3, 4, 1, 2).flatten(0, 1).to(after.dtype)

    def _again(self, tokens: Tensor) -> Tensor:
        if not (self.gradient_checkpointing and torch.is_grad_enabled()):
            return self.along(tokens)
        made: Tensor = torch.utils.checkpoint.checkpoint(self.along, tokens, use_reentrant=False)
        return made

    def along(self, tokens: Tensor) -> Tensor:
        """Tokens (N, T, C) of N places to what each gathers from the others of its place."""
        _, frames, channels = tokens.shape
        x = self.norm(tokens.to(self.norm.weight.dtype))
        x = x + waves(torch.arange(frames, device=x.device), channels).to(x)
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.to_q, self.to_k, self.to_v)
        )
        made: Tensor = self.to_out[0](attended(q, k, v, self.mask).transpose(1, 2).flatten(2))
        return made


def attended(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """What queries (N, heads, T, D) gather from values of the same shape under a mask of `Attention`."""
    if mask == "none":
        return F.scaled_dot_product_attention(q, k, v)
    known = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()
    if mask == "pre":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=known)
    weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
    return (weights * known.to(weights)) @ v


class Told(nn.Module):
    """Adds the embedding of a number of each clip, its frame rate say, to that of the time; nothing at first."""

    def __init__(self, channels: int, name: str = "fps", width: int = 256) -> None:
        super().__init__()
        self.name, self.width = name, width
        self.linear_1, self.linear_2 = nn.Linear(width, channels), nn.Linear(channels, channels)
        nn.init.zeros_(self.linear_2.weight)
        nn.init.zeros_(self.linear_2.bias)

    def forward(self, before: Tensor, after: Tensor, clip: Clip) -> Tensor:
        """(B T, C) to the same; the number, (B,), is told under its name."""
        x = waves(clip.told[self.name], self.width).to(self.linear_1.weight.dtype)
        made: Tensor = self.linear_2(F.silu(self.linear_1(x)))
        return after + made.to(after).repeat_interleave(clip.frames, 0)


def waves(numbers: Tensor, width: int, longest: float = 10000.0) -> Tensor:
    """Cosines and sines (N, width) of numbers (N,), float32; the frequencies fall from 1 to 1 / `longest`."""
    half = torch.arange(width // 2, dtype=torch.float32, device=numbers.device) / (width // 2)
    angles = numbers.float()[:, None] * torch.exp(-math.log(longest) * half)
    return F.pad(torch.cat([angles.cos(), angles.sin()], -1), (0, width % 2))


class Temporal(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """The layers of a plan, each under its kind and the name of its site in the image network.

    A plan is a list of groups: 'kind', 'sites' (names of modules, with the channels of each), and what the kind is
    made with. A family with a kind of its own extends `kinds`; one is called as kind(channels, **settings), and its
    forward as forward(before, after, clip), with what goes into the site and what comes out of it.
    """

    kinds: ClassVar[Mapping[str, Callable[..., nn.Module]]] = {
        "adaptor": FrameAdaptor,
        "convolution": Convolution,
        "attention": Attention,
        "told": Told,
    }
    _supports_gradient_checkpointing = True

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, plan: list[dict[str, Any]]) -> None:
        super().__init__()
        self.gradient_checkpointing = False  # attention's own counts; plans without any are as they are
        self.hung: list[tuple[str, str]] = []
        for group in plan:
            told = {name: value for name, value in group.items() if name not in ("kind", "sites")}
            for site, channels in group["sites"].items():
                path = f"{group['kind']}.{site}"
                _put(self, path, self.kinds[group["kind"]](channels, **told))
                self.hung.append((site, path))


def _put(root: nn.Module, path: str, layer: nn.Module) -> None:
    """Add a layer under a dotted name."""
    *above, last = path.split(".")
    for name in above:
        if name not in root._modules:
            root.add_module(name, nn.Module())
        root = root.get_submodule(name)
    root.add_module(last, layer)


def sites(
    network: nn.Module, *patterns: str, channels: Callable[[Any], int] = lambda module: int(module.out_channels)
) -> dict[str, int]:
    """The modules of a network whose names match any of the patterns (*, ?, [...]), with the channels of each."""
    found = {name: module for name, module in network.named_modules() if any(fnmatchcase(name, p) for p in patterns)}
    return {name: channels(module) for name, module in found.items()}


class _Hook:
    """Sends what leaves a site through a layer. An object, no function: copies of a network then have copies of it."""

    def __init__(self, layer: nn.Module, clip: Clip) -> None:
        self.layer, self.clip = layer, clip

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], output: Any) -> Any:
        several = isinstance(output, tuple)
        made = self.layer(args[0], output[0] if several else output, self.clip)
        return (made, *output[1:]) if several else made


class Inflated(nn.Module):
    """An image network on which layers in time hang, for clips.

    The image network has no weight more than before. It is never called by itself: `begin` says first what it will be
    shown. Layers are hung when it first does, on top of adapters, if there are any by then.
    """

    def __init__(self, image: Any, temporal: Temporal) -> None:
        super().__init__()
        self.image, self.temporal = image, temporal
        self.clip, self.ready = Clip(), False

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the image network."""
        found: torch.dtype = self.image.dtype
        return found

    def begin(self, frames: int, **told: Tensor) -> None:
        """Say that the next batch of images is clips of so many frames, and what is known of each, (B, ...)."""
        if not self.ready:
            self._hang()
        self.clip.frames, self.clip.told = frames, told

    def _hang(self) -> None:
        modules = dict(self.image.named_modules())
        for site, path in self.temporal.hung:
            if site not in modules:
                told = f"These layers in time do not fit the image network, which has no '{site}'."
                raise VgenError(told, "Take both from one checkpoint.")
            modules[site].register_forward_hook(_Hook(self.temporal.get_submodule(path), self.clip))
        self.ready = True

    def forward(self, x: Tensor, t: Tensor, context: Tensor, **told: Tensor) -> Tensor:
        """A U-Net's output (B, C', T, H, W) for x (B, C, T, H, W) at times t (B,), given a context (B, L, D)."""
        frames = x.shape[2]
        self.begin(frames, **told)
        each = (t.repeat_interleave(frames), context.repeat_interleave(frames, 0))
        made: Tensor = self.image(framewise.images(x), *each, return_dict=False)[0]
        return framewise.clips(made, x)
