"""Optimizers and learning rates by name, over named parameters."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from vgen.errors import UsageError

QUANTIZED = {  # bitsandbytes' class of each
    "adamw8bit": "AdamW8bit",
    "paged-adamw": "PagedAdamW",
    "paged-adamw8bit": "PagedAdamW8bit",
}
KERNELS = ("cpu", "cuda", "xpu")  # devices that bitsandbytes' optimizers run on; it pages memory on all but the first


def require(name: str, device: torch.device) -> None:
    """Raises UsageError where the optimizer cannot run here. Loads nothing heavy."""
    do = "Take --optimizer adamw."
    if name == "muon" and not hasattr(torch.optim, "Muon"):
        raise UsageError(f"--optimizer muon needs torch 2.9 or newer; this is {torch.__version__}.", do)
    if name not in QUANTIZED:
        return
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UsageError(f"--optimizer {name} needs bitsandbytes.", f"pip install bitsandbytes. Or: {do}")
    if device.type not in KERNELS:
        raise UsageError(f"--optimizer {name}: bitsandbytes does not run on '{device.type}'.", do)
    if name.startswith("paged") and device.type == "cpu":
        plain = name.removeprefix("paged-")
        raise UsageError(
            f"--optimizer {name} pages its state out of an accelerator's memory; this run has none.",
            f"Take --optimizer {plain}, which steps alike.",
        )


def optimizers(trained: Mapping[str, nn.Parameter], options: Any, device: torch.device) -> list[torch.optim.Optimizer]:
    """The optimizers of a run, which between them update every parameter once.

    "muon" orthogonalizes the updates of the matrices (Jordan et al. 2024), scaled to the size of AdamW's so that
    one learning rate serves both (Liu et al. 2025, arXiv:2502.16982). A convolution's kernels are the rows of a
    matrix; embeddings and vectors stay with AdamW.
    The 8-bit ones keep both moments in blocks of 256 bytes with a scale each (Dettmers et al. 2022, arXiv:2110.02861),
    those of tensors below 4096 numbers in fp32.
    """
    if options.optimizer in QUANTIZED:
        import bitsandbytes

        kind = getattr(bitsandbytes.optim, QUANTIZED[options.optimizer])
        return [kind(list(trained.values()), **_settings(options))]
    if options.optimizer == "adamw":
        return [_adamw(list(trained.values()), options, device)]
    matrices = [p for n, p in trained.items() if p.ndim > 1 and "embed_tokens" not in n and "shared" not in n]
    chosen = {id(p) for p in matrices}
    rest = [p for p in trained.values() if id(p) not in chosen]
    made: list[torch.optim.Optimizer] = []
    if matrices:
        told = {"lr": options.learning_rate, "weight_decay": options.adam_weight_decay}
        made.append(_muon(matrices, adjust_lr_fn="match_rms_adamw", **told))
    return [*made, _adamw(rest, options, device)] if rest else made


def _muon(weights: list[nn.Parameter], **told: Any) -> torch.optim.Optimizer:
    """torch's Muon, which takes matrices alone, for weights of which some are kernels of convolutions."""

    class Muon(torch.optim.Muon):
        def __init__(self) -> None:
            with _as_matrices(weights):
                super().__init__(weights, **told)

        def step(self, closure: Any = None) -> Any:
            with _as_matrices(weights):
                return super().step(closure)

    return Muon()


@contextmanager
def _as_matrices(weights: list[nn.Parameter]) -> Iterator[None]:
    """Weights and their gradients, in the same memory, as matrices with a row for each output."""
    shapes = [w.shape for w in weights]
    for w in weights:
        _shape(w, (len(w), -1))
    try:
        yield
    finally:
        for w, shape in zip(weights, shapes, strict=True):
            _shape(w, shape)


def _shape(w: nn.Parameter, shape: Sequence[int]) -> None:
    grad, w.grad = w.grad, None
    w.data = w.data.view(*shape)
    w.grad = None if grad is None else grad.contiguous().view(*shape)


def _settings(options: Any) -> dict[str, Any]:
    return {
        "lr": options.learning_rate,
        "betas": (options.adam_beta1, options.adam_beta2),
        "eps": options.adam_epsilon,
        "weight_decay": options.adam_weight_decay,
    }


def _adamw(parameters: list[nn.Parameter], options: Any, device: torch.device) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, **_settings(options), fused=device.type in ("cpu", "cuda", "mps"))


def learning_rate(options: Any, step: int) -> float:
    """The learning rate of a step, counted from 0."""
    if step < options.lr_warmup_steps:
        return float(options.learning_rate * (step + 1) / options.lr_warmup_steps)
    span = max(1, options.max_train_steps - options.lr_warmup_steps)
    u = (step - options.lr_warmup_steps) / span
    shapes = {"constant": 1.0, "linear": 1.0 - u, "cosine": 0.5 * (1 + math.cos(math.pi * u))}
    return float(options.learning_rate * shapes[options.lr_scheduler])
