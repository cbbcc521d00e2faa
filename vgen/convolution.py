"""Convolutions of clips on the CPU: oneDNN's also where torch's rule of thumb picks its own slow kernel.

torch convolves a single clip of few elements (20,480, counting channels, frames and rows) with im2col, on the belief
that this is faster. In the layers of a small video autoencoder it is five times slower.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
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
