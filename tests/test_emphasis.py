"""Object masks in the loss: of mean 1, and gone when their steps are over."""

from __future__ import annotations

import pytest
import torch

from vgen.emphasis import emphasis


def test_the_weight_of_the_object_fades() -> None:
    mask = torch.zeros(1, 1, 1, 4, 4)
    mask[..., :2] = 1
    ratios = []
    for step in (0, 5, 9):
        weight = emphasis({"mask": mask, "progress": step}, 4.0, 10)
        assert weight is not None
        assert weight.mean() == pytest.approx(1)
        ratios.append((weight.max() / weight.min()).item())
    assert ratios == pytest.approx([5.0, 3.0, 1.4])
    assert emphasis({"mask": mask, "progress": 10}, 4.0, 10) is None
    assert emphasis({"progress": 0}, 4.0, 10) is None


def test_without_steps_it_stays() -> None:
    weight = emphasis(
        {"mask": torch.ones(1, 1, 1, 2, 2), "progress": 10**6}, 4.0, 0, lambda mask: mask.repeat(1, 1, 3, 1, 1)
    )
    assert weight is not None
    assert weight.shape == (1, 1, 3, 2, 2)
