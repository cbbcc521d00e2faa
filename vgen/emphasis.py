"""Where a training loss looks harder: the masks of objects that clips of the world carry."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor


def emphasis(
    batch: Mapping[str, Any], weight: float, steps: int, fit: Callable[[Tensor], Tensor] = lambda mask: mask
) -> Tensor | None:
    """What the error of each element is multiplied with, where a batch has masks of objects: 1 + w * mask, of mean 1.

    w is `weight` and fades to nothing over `steps` (0: never): it teaches objects early, then it would bias them.
    `fit` brings a mask (B, 1, T, H, W) to the shape of what is trained. None where nothing is to be multiplied.
    """
    if "mask" not in batch or not weight:
        return None
    fade = 1 - batch["progress"] / steps if steps else 1.0
    if fade <= 0:
        return None
    made: Tensor = 1 + weight * fade * fit(batch["mask"])
    return made / made.mean()
