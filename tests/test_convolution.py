"""oneDNN's convolutions equal torch's own to rounding, and only those are replaced that it can do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vgen.convolution import quick


@pytest.mark.parametrize(
    ("stride", "padding", "dilation", "groups"), [(1, 0, 1, 1), ((1, 2, 2), (1, 0, 1), 1, 1), (1, 2, 2, 4)]
)
def test_results_differ_by_rounding(stride, padding, dilation, groups):
    torch.manual_seed(0)
    layer = nn.Conv3d(8, 12, 3, stride=stride, padding=padding, dilation=dilation, groups=groups)
    x = torch.randn(1, 8, 7, 9, 10)
    with torch.no_grad():
        plain = layer(x)
        with quick():
            assert torch.allclose(layer(x), plain, atol=1e-5)
    assert plain.abs().max() > 0.1


def kernels(layer: nn.Module, x: Tensor) -> set[str]:
    """The names of the kernels that a layer runs."""
    with torch.no_grad(), torch.profiler.profile() as seen:
        layer(x)
    return {event.name for event in seen.events()}


def test_a_single_small_clip_goes_to_onednn():
    layer, x = nn.Conv3d(4, 4, 3), torch.randn(1, 4, 3, 8, 8)
    with quick():
        names = kernels(layer, x)
    assert ("aten::mkldnn_convolution" in names) == torch.backends.mkldnn.is_available()


def test_what_it_cannot_do_is_left_to_torch():
    x, weight = torch.randn(1, 4, 5, 8, 8), torch.randn(4, 4, 3, 3, 3)
    with quick():
        assert F.conv3d(x, weight, padding="same").shape == x.shape
        assert F.conv3d(x.double(), weight.double()).dtype == torch.float64
        assert nn.Conv3d(4, 4, 3)(x[0]).shape == (4, 3, 6, 6)  # without a batch
