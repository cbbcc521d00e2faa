"""Convolutions of clips on the CPU: oneDNN's also where torch's rule of thumb picks its own slow kernel.

torch convolves a single clip of few elements (20,480, counting channels, frames and rows) with im2col, on the belief
that this is faster. In the layers of a small video autoencoder it is five times slower.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


def quick() -> AbstractContextManager[Any]:
    """Run networks in here to have their 3D convolutions done by oneDNN where it can; the results differ by rounding.

    Without gradients only.
    """
    return _OneDNN() if torch.backends.mkldnn.is_available() else nullcontext()


class _OneDNN(TorchFunctionMode):
    """Passes torch's 3D convolutions in float32 on the CPU to oneDNN, and every other function on."""

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.conv3d and len(args) == 7 and not isinstance(args[4], str):
            x, weight, bias, stride, padding, dilation, groups = args
            if x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and x.ndim == 5:
                return torch.mkldnn_convolution(x, weight, bias, padding, stride, dilation, groups)
        return func(*args, **(kwargs or {}))


def in_time(network: nn.Module) -> None:
    """Have a network on the CPU do its convolutions over frames alone as two-dimensional ones, over (T, H W).

    They give the same but for rounding, in fp32 three times as fast. In bf16 torch 2.13's own give gradients that are
    not numbers.
    """
    for layer in network.modules():
        if isinstance(layer, nn.Conv3d) and layer.kernel_size[1:] == layer.stride[1:] == (1, 1) and layer.groups == 1:
            vars(layer)["forward"] = partial(_over_time, layer)


def _over_time(layer: nn.Conv3d, x: Tensor) -> Tensor:
    if x.device.type != "cpu":
        return nn.Conv3d.forward(layer, x)
    time: tuple[int, ...] = (layer.stride[0], layer.dilation[0])
    flat = F.conv2d(x.flatten(3), layer.weight.flatten(3), layer.bias, (time[0], 1), _sides(layer), (time[1], 1))
    return flat.unflatten(3, x.shape[3:])


def _sides(layer: nn.Conv3d) -> tuple[int, int]:
    """The padding of a layer over (T, H W)."""
    if not isinstance(layer.padding[0], int):
        raise ValueError(f"Padding by name ({layer.padding}) is not expected here.")
    return layer.padding[0], 0
