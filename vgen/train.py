"""Training: one loop for every part of every family."""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from vgen.dataset import Batch, ahead
from vgen.errors import UsageError, VgenError
from vgen.files import replacing
from vgen.machine import DTYPES, Machine, seeded
from vgen.model import OnStep, Part
from vgen.optimizers import optimizers
from vgen.options import TrainOptions
from vgen.tensorfile import load_tensors, save_tensors

STATE, LOG = "state.safetensors", "log.jsonl"


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
    state = _State.of(part, options, machine)
    done = state.restore(folder / STATE, options.seed) if options.resume else 0
    figures = _shorten(folder / LOG, done)
    if done >= options.max_train_steps:  # the run may have been killed between its last state and its export
        with state.averaged():
            export(part.modules)
        return figures
    micro = options.gradient_accumulation_steps
    batches = ahead(batch, range(done * micro, options.max_train_steps * micro))
    with _interruptible() as interrupted, (folder / LOG).open("a") as log:
        for step in range(done, options.max_train_steps):
            started = time.perf_counter()
            figures = _step(part, batches, options, machine, step, state)
            state.average(options.ema_decay, step)
            figures["seconds"] = round(time.perf_counter() - started, 4)
            log.write(json.dumps(figures) + "\n")
            on_step("train", step + 1, options.max_train_steps)
            last = step + 1 == options.max_train_steps
            if last or interrupted() or (step + 1) % options.checkpointing_steps == 0:
                log.flush()
                state.save(folder / STATE, step + 1, options.seed)
                with state.averaged():
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


def _step(
    part: Part, batches: Iterator[Batch], options: TrainOptions, machine: Machine, step: int, state: _State
) -> dict[str, Any]:
    """One optimizer step over `gradient_accumulation_steps` batches; the loss is their mean."""
    micro, total = options.gradient_accumulation_steps, 0.0
    names: list[str] = []
    for k in range(micro):
        batch = {n: v.to(machine.device) if isinstance(v, Tensor) else v for n, v in next(batches).items()}
        batch["progress"] = step
        names += map(str, batch.get("keys", ()))
        noise = seeded(options.seed, "noise", step, k)
        torch.manual_seed(noise.initial_seed())  # for dropout
        with _autocast(options, machine):
            loss = part.loss(batch, noise) / micro
        total += _finite("loss", loss.item(), step, names)
        state.scaler.scale(loss).backward()
    for optimizer in state.optimizers:
        state.scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(state.trained.values(), options.max_grad_norm or math.inf).item()
    if not state.scaler.is_enabled():  # the scaler leaves out a step that overflowed, and lowers its scale
        _finite("norm of the gradients", norm, step, names)
    rate = learning_rate(options, step)
    for optimizer in state.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
        state.scaler.step(optimizer)
        optimizer.zero_grad(set_to_none=True)
    state.scaler.update()
    return {"step": step + 1, "loss": total, "grad_norm": norm, "learning_rate": rate}


def _finite(what: str, value: float, step: int, names: list[str]) -> float:
    """The value. Raises VgenError, naming the clips, where it is not finite."""
    if math.isfinite(value):
        return value
    raise VgenError(
        f"The {what} became {value} at step {step + 1}, on: {', '.join(names)}.",
        "Lower --learning-rate, or look at these clips; --resume goes on from the last saved state.",
    )


def _autocast(options: TrainOptions, machine: Machine) -> Any:
    if options.mixed_precision == "no":
        return nullcontext()
    return torch.autocast(machine.device.type, DTYPES[options.mixed_precision])


def _shorten(path: Path, steps: int) -> dict[str, Any]:
    """Cut the log back to the steps that the state has seen. Returns the figures of the last of them."""
    lines = path.read_text().splitlines(keepends=True)[:steps] if path.exists() else []
    with replacing(path) as file:
        file.write("".join(lines).encode())
    return dict(json.loads(lines[-1])) if lines else {"step": steps}


@dataclass(frozen=True, eq=False)
class _State:
    """What a run changes. `ema` is the moving average of `trained`, `own` what the part keeps by itself."""

    modules: nn.ModuleDict
    trained: dict[str, nn.Parameter]
    optimizers: list[torch.optim.Optimizer]
    scaler: torch.amp.GradScaler
    ema: dict[str, Tensor]
    own: Mapping[str, Tensor]

    @classmethod
    def of(cls, part: Part, options: TrainOptions, machine: Machine) -> _State:
        """The state before the first step, on the device."""
        modules = nn.ModuleDict(dict(part.modules)).to(machine.device)
        trained = {name: p for name, p in modules.named_parameters() if p.requires_grad}
        scaler = torch.amp.GradScaler(machine.device.type, enabled=options.mixed_precision == "fp16")
        ema = {n: p.detach().clone() for n, p in trained.items()} if options.ema_decay else {}
        return cls(
            modules, trained, optimizers(trained, options, machine.device), scaler, ema, getattr(part, "state", {})
        )

    def _owner(self, p: nn.Parameter) -> torch.optim.Optimizer:
        return next(o for o in self.optimizers if any(p is q for group in o.param_groups for q in group["params"]))

    @torch.no_grad()
    def average(self, decay: float, step: int) -> None:
        """Move the average towards the weights; a young one forgets faster, so that it does not keep the start."""
        if self.ema:
            d = min(decay, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(self.ema.values()), [p.detach() for p in self.trained.values()], 1 - d)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Have the moving average, where one is kept, in the networks for a while."""
        kept = {name: self.trained[name].data for name in self.ema}
        for name, average in self.ema.items():
            self.trained[name].data = average
        try:
            yield
        finally:
            for name, weight in kept.items():
                self.trained[name].data = weight

    def save(self, path: Path, step: int, seed: int | None) -> None:
        """Write everything to one file, atomically."""
        tensors = {f"weights/{n}": t for n, t in self.modules.state_dict().items()}
        tensors |= {f"ema/{n}": t for n, t in self.ema.items()} | {f"own/{n}": t for n, t in self.own.items()}
        for name, p in self.trained.items():
            tensors |= {f"optimizer/{name}/{k}": t for k, t in self._owner(p).state[p].items()}
        told = {"format": "vgen-training/1", "step": step, "seed": seed, "scaler": self.scaler.state_dict()}
        save_tensors(path, tensors, told)

    def restore(self, path: Path, seed: int | None) -> int:
        """Load the saved state, if there is one. Returns the steps done. Raises VgenError where it does not fit."""
        if not path.exists():
            return 0
        tensors, record = load_tensors(path)
        if record.get("seed", seed) != seed:
            do = f"Resume with --seed {record['seed']}: it decides the order of the data."
            raise UsageError(f"{path} is of a run with another seed.", do)
        held: dict[str, dict[str, Tensor]] = {"weights": {}, "ema": {}, "own": {}, "optimizer": {}}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition("/")
            held[kind][rest] = tensor
        have = {n: t.shape for n, t in held["weights"].items()}
        if have != {n: t.shape for n, t in self.modules.state_dict().items()}:
            raise VgenError(f"{path} holds the state of another network.", "Resume with the settings it had.")
        if held["ema"].keys() != self.ema.keys():
            was = "with" if held["ema"] else "without"
            raise VgenError(f"{path} was trained {was} --ema-decay.", "Resume with the settings it had.")
        self.modules.load_state_dict(held["weights"])
        for kind, mine in (("ema", self.ema), ("own", self.own)):
            for name in held[kind].keys() & mine.keys():
                mine[name].copy_(held[kind][name])
        for name, p in self.trained.items():
            prefix = f"{name}/"
            its = {n.removeprefix(prefix): t for n, t in held["optimizer"].items() if n.startswith(prefix)}
            self._owner(p).state[p] = {n: t.to(p.device) for n, t in its.items()}
        if self.scaler.is_enabled() and record.get("scaler"):
            self.scaler.load_state_dict(record["scaler"])
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
