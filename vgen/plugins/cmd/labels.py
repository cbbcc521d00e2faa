"""Classes in place of text: what the models are told of a clip, and of one whose class is left out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from vgen.errors import UsageError


@dataclass(frozen=True)
class Labels:
    """The classes 0 to count - 1 of a checkpoint; `count` itself stands for none. A share `dropout` trains without."""

    count: int = 0
    dropout: float = 0.0

    def of(self, batch: Mapping[str, Any], generator: Generator) -> dict[str, Tensor]:
        """The condition 'label' (B,) of a training batch. Raises UsageError."""
        if "label" not in batch:
            raise UsageError(
                "Clips of --data carry no 'label', which this checkpoint is told of them.",
                "Encode them from a manifest whose rows have a number 'label'.",
            )
        label = batch["label"][:, 0].long()
        if bool(((label < 0) | (label >= self.count)).any()):
            raise UsageError(f"A clip has the label {int(label.max())}.", f"Labels go from 0 to {self.count - 1}.")
        kept = torch.rand(len(label), generator=generator) >= self.dropout
        return {"label": torch.where(kept.to(label.device), label, self.count)}

    def asked(self, label: int | None, count: int, device: torch.device) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The condition of `count` clips of a class, and that of clips of none."""
        one = self.count if label is None else label
        return tuple({"label": torch.full((count,), k, device=device)} for k in (one, self.count))  # type: ignore[return-value]
