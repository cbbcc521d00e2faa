"""Optimizers by name, over named parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


def optimizers(trained: Mapping[str, nn.Parameter], options: Any, device: torch.device) -> list[torch.optim.Optimizer]:
    """The optimizers of a run, which between them update every parameter once.

    "muon" orthogonalizes the updates of the matrices (Jordan et al. 2024), scaled to the size of AdamW's so that
    one learning rate serves both (Liu et al. 2025, arXiv:2502.16982); embeddings and vectors stay with AdamW.
    """
    if options.optimizer == "adamw":
        return [_adamw(list(trained.values()), options, device)]
    matrices = [p for n, p in trained.items() if p.ndim == 2 and "embed_tokens" not in n and "shared" not in n]
    chosen = {id(p) for p in matrices}
    rest = [p for p in trained.values() if id(p) not in chosen]
    muon = torch.optim.Muon(
        matrices, lr=options.learning_rate, weight_decay=options.adam_weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    return [muon, _adamw(rest, options, device)]


def _adamw(parameters: list[nn.Parameter], options: Any, device: torch.device) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        parameters,
        lr=options.learning_rate,
        betas=(options.adam_beta1, options.adam_beta2),
        eps=options.adam_epsilon,
        weight_decay=options.adam_weight_decay,
        fused=device.type in ("cpu", "cuda", "mps"),
    )
