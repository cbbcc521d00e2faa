"""Training: one loop for every part of every family."""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from vgen.dataset import Batch, ahead
from vgen.errors import VgenError
from vgen.machine import DTYPES, Machine, seeded
from vgen.model import OnStep, Part
from vgen.options import TrainOptions
from vgen.tensorfile import load_tensors, save_tensors

STATE = "state.safetensors"


def fit(
    part: Part,
    batch: Callable[[int], Batch],
    options: TrainOptions,
    machine: Machine,
    folder: Path,
    *,
    export: Callable[[Mapping[str, nn.Module]], None],
    on_step: OnStep = lambda name, i, n: None,
) -> dict[str, Any]:
    """Train `part` on batch(0), batch(1), ... and keep state and log in `folder`.

    `export` writes the weights (the moving average where one is kept) whenever the state is saved.
    Noise and data are functions of (seed, step), so a resumed run repeats the undisturbed one bit for bit on the
    CPU. Ctrl-C finishes the step, saves and raises KeyboardInterrupt. Returns the figures of the last step.
    """
    folder.mkdir(parents=True, exist_ok=True)
    modules = nn.ModuleDict(dict(part.modules)).to(machine.device)
    weights = dict(modules.named_parameters())
    trained = {name: p for name, p in weights.items() if p.requires_grad}
    optimizer = _adamw(trained, options, machine)
    ema = {n: p.detach().clone() for n, p in trained.items()} if options.ema_decay else {}
    done = _restore(folder / STATE, modules, trained, optimizer, ema) if options.resume else 0
    micro = options.gradient_accumulation_steps
    figures: dict[str, Any] = {"step": done}
    batches = ahead(batch, range(done * micro, options.max_train_steps * micro))
    with _interruptible() as interrupted, (folder / "log.jsonl").open("a") as log:
        for step in range(done, options.max_train_steps):
            started = time.perf_counter()
            figures = _step(part, batches, options, machine, step, trained, optimizer)
            _average(ema, trained, options.ema_decay, step)
            figures["seconds"] = round(time.perf_counter() - started, 4)
            log.write(json.dumps(figures) + "\n")
            on_step("train", step + 1, options.max_train_steps)
            last = step + 1 == options.max_train_steps
            if last or interrupted() or (step + 1) % options.checkpointing_steps == 0:
                log.flush()
                _save(folder / STATE, step + 1, modules, trained, optimizer, ema)
                with _swapped(trained, ema):
                    export(part.modules)
            if interrupted():
                raise KeyboardInterrupt
    return figures


def learning_rate(options: TrainOptions, step: int) -> float:
    """The learning rate of a step, counted from 0."""
    if step < options.lr_warmup_steps:
        return options.learning_rate * (step + 1) / options.lr_warmup_steps
    span = max(1, options.max_train_steps - options.lr_warmup_steps)
    u = (step - options.lr_warmup_steps) / span
    shapes = {"constant": 1.0, "linear": 1.0 - u, "cosine": 0.5 * (1 + math.cos(math.pi * u))}
    return options.learning_rate * shapes[options.lr_scheduler]


def _adamw(trained: Mapping[str, nn.Parameter], options: TrainOptions, machine: Machine) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        trained.values(),
        lr=options.learning_rate,
        betas=(options.adam_beta1, options.adam_beta2),
        eps=options.adam_epsilon,
        weight_decay=options.adam_weight_decay,
        fused=machine.device.type in ("cpu", "cuda"),
    )


def _step(
    part: Part,
    batches: Iterator[Batch],
    options: TrainOptions,
    machine: Machine,
    step: int,
    trained: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
) -> dict[str, Any]:
    """One optimizer step over `gradient_accumulation_steps` batches; the loss is their mean."""
    micro, total = options.gradient_accumulation_steps, 0.0
    for k in range(micro):
        batch = next(batches)
        batch["progress"] = step
        with _autocast(options, machine):
            loss = part.loss(batch, seeded(options.seed, "noise", step, k)) / micro
        if not math.isfinite(loss.item()):
            clips = ", ".join(map(str, batch.get("keys", ())))
            raise VgenError(
                f"The loss became {loss.item()} at step {step + 1}, on: {clips}.",
                "Lower --learning-rate, or look at these clips; --resume goes on from the last saved state.",
            )
        loss.backward()
        total += loss.item()
    norm = torch.nn.utils.clip_grad_norm_(trained.values(), options.max_grad_norm or math.inf)
    rate = learning_rate(options, step)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {"step": step + 1, "loss": total, "grad_norm": float(norm), "learning_rate": rate}


def _autocast(options: TrainOptions, machine: Machine) -> Any:
    if options.mixed_precision == "no":
        return nullcontext()
    return torch.autocast(machine.device.type, DTYPES[options.mixed_precision])


@torch.no_grad()
def _average(ema: Mapping[str, Tensor], trained: Mapping[str, nn.Parameter], decay: float, step: int) -> None:
    """Move the average towards the weights; young averages forget faster, so that they do not keep the start."""
    if ema:
        d = min(decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(ema.values()), [p.detach() for p in trained.values()], 1 - d)


@contextmanager
def _swapped(trained: Mapping[str, nn.Parameter], ema: Mapping[str, Tensor]) -> Iterator[None]:
    """Have the moving average in the network for a while."""
    kept = {name: trained[name].data for name in ema}
    for name, average in ema.items():
        trained[name].data = average
    try:
        yield
    finally:
        for name, weight in kept.items():
            trained[name].data = weight


def _save(
    path: Path,
    step: int,
    modules: nn.ModuleDict,
    trained: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    ema: Mapping[str, Tensor],
) -> None:
    tensors = {f"weights/{n}": t for n, t in modules.state_dict().items()}
    tensors |= {f"ema/{n}": t for n, t in ema.items()}
    for name, p in trained.items():
        tensors |= {f"adamw/{name}/{k}": t for k, t in optimizer.state[p].items()}
    save_tensors(path, tensors, {"format": "vgen-training/1", "step": step})


def _restore(
    path: Path,
    modules: nn.ModuleDict,
    trained: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    ema: Mapping[str, Tensor],
) -> int:
    """Load the saved state, if there is one. Returns the steps done. Raises VgenError where it does not fit."""
    if not path.exists():
        return 0
    tensors, record = load_tensors(path)
    weights = {n.removeprefix("weights/"): t for n, t in tensors.items() if n.startswith("weights/")}
    if weights.keys() != modules.state_dict().keys() or {n for n in tensors if n.startswith("ema/")} != {
        f"ema/{n}" for n in ema
    }:
        raise VgenError(
            f"{path} holds the state of another network or another --ema-decay.", "Resume with the settings it had."
        )
    modules.load_state_dict(weights)
    for name, average in ema.items():
        average.copy_(tensors[f"ema/{name}"])
    for name, p in trained.items():
        prefix = f"adamw/{name}/"
        optimizer.state[p] = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    return int(record["step"])


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Note the first Ctrl-C instead of stopping in the middle of a step; a second one stops at once."""
    seen: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        seen.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(seen)
    finally:
        signal.signal(signal.SIGINT, before)
