"""Training: one loop for every part of every family."""

from __future__ import annotations

import math
import secrets
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from vgen import fingerprint, lean, logs, record
from vgen.dataset import Batch, ahead
from vgen.errors import VgenError
from vgen.evaluation import evaluate
from vgen.machine import DTYPES, Machine, seeded
from vgen.model import OnStep, Part
from vgen.optimizers import learning_rate
from vgen.options import TrainOptions
from vgen.state import State

STATE, LOG = "state.safetensors", "log.jsonl"
Held = Sequence[Callable[[], Batch]]


@dataclass(frozen=True)
class Between:
    """What is done between steps. `export` writes the weights whenever the state is saved.

    The loss on the batches of `held` is logged every `eval_steps`; `show(step)` is called every `validation_steps`,
    with the networks as they are exported, and the optimizers' state out of the way.
    """

    export: Callable[[Mapping[str, nn.Module]], None]
    held: Held = ()
    show: Callable[[int], None] | None = None
    on_step: OnStep = lambda name, i, n: None


@lean.untraced()
def fit(
    part: Part,
    batch: Callable[[int], Batch],
    options: TrainOptions,
    machine: Machine,
    folder: Path,
    between: Between,
    identity: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Train `part` on batch(0), batch(1), ... and keep state and log in `folder`.

    Noise and data are functions of (seed, step), so a resumed run repeats the undisturbed one bit for bit on the
    CPU; one of another `identity` (see `fingerprint`) is refused. Ctrl-C finishes the step, saves and raises
    KeyboardInterrupt. Returns the figures of the last step; of a resumed run also, under "resumed", which run went
    before and at which step it ended.
    """
    told = identity or fingerprint.identity(options, {}, {})
    if options.resume:
        fingerprint.require(folder / STATE, told)
    folder.mkdir(parents=True, exist_ok=True)
    state = State.of(part, options, machine)
    before = state.restore(folder / STATE) if options.resume and (folder / STATE).exists() else {}
    done, run = int(before.get("step", 0)), secrets.token_hex(8)
    chain = [*before.get("resumed", []), {"run": before.get("run", ""), "step": done}] if before else []
    kept = {"seed": options.seed, "run": run, "resumed": chain, "identity": told}
    first = str(chain[0]["run"]) if chain else run
    with logs.opened(folder / LOG, done, options.report_to, first, record.plain(options)) as log:
        loop = _Loop(part, options, machine, folder, between, state, log, kept)
        if done < options.max_train_steps:
            figures = loop.run(batch, range(done, options.max_train_steps))
        else:  # the run may have been killed between its last state and its export
            loop.export()
            figures = logs.last(folder / LOG) or {"step": done}
    return {**figures, "resumed": chain[-1]} if chain else figures


@dataclass(frozen=True, eq=False)
class _Loop:
    """A run: what it trains, with what, and where it keeps what. `kept` is saved with the state."""

    part: Part
    options: TrainOptions
    machine: Machine
    folder: Path
    between: Between
    state: State
    log: logs.Log
    kept: Mapping[str, Any]

    def run(self, batch: Callable[[int], Batch], steps: range) -> dict[str, Any]:
        """The steps, and what is due between them. Returns the figures of the last."""
        micro, most = self.options.gradient_accumulation_steps, self.options.max_train_steps
        batches = ahead(batch, range(steps.start * micro, steps.stop * micro))
        figures: dict[str, Any] = {}
        with _interruptible() as interrupted:
            if not steps.start:
                self.evaluate(0, False)
            for step in steps:
                started = time.perf_counter()
                figures = self.step([next(batches) for _ in range(micro)], step)
                self.state.average(self.options.ema_decay, step)
                self.log.write({**figures, "seconds": round(time.perf_counter() - started, 4)})
                self.between.on_step("train", step + 1, most)
                last = step + 1 == steps.stop
                self.evaluate(step + 1, last)
                stop = interrupted()
                if _due(self.options.checkpointing_steps, step + 1, last or stop):
                    self.save(step + 1)
                if stop:
                    raise KeyboardInterrupt
                self.show(step + 1, last)
        return figures

    def step(self, batches: list[Batch], step: int) -> dict[str, Any]:
        """One optimizer step over some batches; its loss is the mean over all their clips."""
        scaler, most = self.state.scaler, self.options.max_grad_norm or math.inf
        loss = gradients(self.part, batches, self.options, self.machine, step, scaler)
        for optimizer in self.state.optimizers:
            scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.state.trained.values(), most).item()
        if not scaler.is_enabled() and not math.isfinite(norm):  # else the scaler skips the step and scales less
            names = _guilty(self.part, batches, self.options, self.machine, step)
            raise _not_finite("norm of the gradients", norm, step, names)
        rate = learning_rate(self.options, step) * batches[0].get("rate", 1.0)
        for optimizer in self.state.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        scaler.update()
        return {"step": step + 1, "loss": loss, "grad_norm": norm, "learning_rate": rate}

    def evaluate(self, step: int, last: bool) -> None:
        """Log the loss on what is held out, where that is due."""
        if self.between.held and _due(self.options.eval_steps, step, last):
            held = [partial(_fetched, make, self.machine) for make in self.between.held]
            with self.resting():
                self.log.write({"step": step, **evaluate(self.part, held, self.options.seed)})

    @contextmanager
    def resting(self) -> Iterator[None]:
        """The networks as they are used once exported: at rest, averaged, without gradients."""
        network = getattr(self.part, "network", None)  # around an adapter, the network that it is on
        with self.state.resting(*([network] if network is not None else [])), autocast(self.options, self.machine):
            yield

    def save(self, step: int) -> None:
        """Save the state, then the weights."""
        self.log.flush()
        self.state.save(self.folder / STATE, {**self.kept, "step": step})
        self.export()

    def export(self) -> None:
        """Write the weights, or their moving average."""
        with self.state.averaged():
            self.between.export(self.part.modules)

    def show(self, step: int, last: bool) -> None:
        """Show what the networks do, where that is due."""
        if self.between.show is not None and _due(self.options.validation_steps, step, last):
            with self.resting(), self.state.parked():
                self.between.show(step)


def _due(every: int, step: int, last: bool) -> bool:
    return bool(every) and (last or step % every == 0)


def gradients(
    part: Part,
    batches: Sequence[Batch],
    options: TrainOptions,
    machine: Machine,
    step: int,
    scaler: torch.amp.GradScaler,
) -> float:
    """Add to the gradients those of the mean loss over all clips of `batches`, however they are spread. Returns it.

    With explicit uniform sampling batch k draws its times from the k-th part of their distribution
    (arXiv:2408.06072, section 2). Raises VgenError, naming the clips, where the loss is not finite.
    """
    clips, total = sum(map(_count, batches)), 0.0
    for k, batch in enumerate(batches):
        loss = _loss(part, batch, options, machine, step, (k, len(batches))) * (_count(batch) / clips)
        value = loss.item()
        if not math.isfinite(value):
            raise _not_finite("loss", value, step, _guilty(part, [batch], options, machine, step))
        total += value
        scaler.scale(loss).backward()
    return total


def _loss(
    part: Part, batch: Batch, options: TrainOptions, machine: Machine, step: int, share: tuple[int, int]
) -> Tensor:
    """The loss of a batch, the share[0]-th of share[1] of its step."""
    noise = seeded(options.seed, "noise", step, share[0])
    torch.manual_seed(noise.initial_seed())  # for dropout
    explicit = options.timestep_sampling == "explicit-uniform"
    told = {**_moved(batch, machine), "progress": step, "share": share if explicit else None}
    with autocast(options, machine):
        return part.loss(told, noise)


def _count(batch: Batch) -> int:
    """Clips in a batch."""
    return len(batch.get("keys", ())) or 1


def _moved(batch: Batch, machine: Machine) -> Batch:
    return {n: v.to(machine.device) if isinstance(v, Tensor) else v for n, v in batch.items()}


def _fetched(make: Callable[[], Batch], machine: Machine) -> Batch:
    return _moved(make(), machine)


def autocast(options: TrainOptions, machine: Machine) -> Any:
    """The precision of the forward pass."""
    if options.mixed_precision == "no":
        return nullcontext()
    return torch.autocast(machine.device.type, DTYPES[options.mixed_precision])


def _not_finite(what: str, value: float, step: int, names: Sequence[str]) -> VgenError:
    return VgenError(
        f"The {what} became {value} at step {step + 1}, on: {', '.join(names)}.",
        "Lower --learning-rate, or look at these clips; --resume goes on from the last saved state.",
    )


def _guilty(part: Part, batches: Sequence[Batch], options: TrainOptions, machine: Machine, step: int) -> list[str]:
    """The clips that by themselves have a loss or a gradient that is not finite; all of them where none has."""
    names = [str(key) for batch in batches for key in batch.get("keys", ())]
    found = []
    for batch in batches if len(names) > 1 else ():
        count = _count(batch)
        for i in range(count):
            alone = {n: v[i : i + 1] if _one_each(v, count) else v for n, v in batch.items()}
            loss = _loss(part, alone, options, machine, step, (0, 1))
            weights = [p for m in part.modules.values() for p in m.parameters() if p.requires_grad]
            grads = torch.autograd.grad(loss, weights, allow_unused=True)
            if not all(bool(one.isfinite().all()) for one in (loss, *grads) if one is not None):
                found.append(str(batch["keys"][i]))
    return found or names


def _one_each(value: Any, count: int) -> bool:
    """Whether a value of a batch has an entry for each clip."""
    return isinstance(value, (list, Tensor)) and len(value) == count


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
