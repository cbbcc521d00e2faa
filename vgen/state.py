"""The state of a training run: what it changes, saved whole and brought back to the bit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vgen.errors import VgenError
from vgen.machine import Machine
from vgen.model import Part
from vgen.optimizers import optimizers
from vgen.options import TrainOptions
from vgen.tensorfile import load_tensors, save_tensors

FORMAT = "vgen-training/1"
AGAIN = "Resume with the settings it had."


@dataclass(frozen=True, eq=False)
class State:
    """What a run changes. `ema` is the moving average of `trained`, `own` what the part keeps by itself.

    Weights that take no gradients are not part of it: they are the base's.
    """

    modules: nn.ModuleDict
    trained: dict[str, nn.Parameter]
    optimizers: list[torch.optim.Optimizer]
    scaler: torch.amp.GradScaler
    ema: dict[str, Tensor]
    own: Mapping[str, Tensor]

    @classmethod
    def of(cls, part: Part, options: TrainOptions, machine: Machine) -> State:
        """The state before the first step, on the device."""
        modules = nn.ModuleDict(dict(part.modules)).to(machine.device)
        trained = {name: p for name, p in modules.named_parameters() if p.requires_grad}
        scaler = torch.amp.GradScaler(machine.device.type, enabled=options.mixed_precision == "fp16")
        ema = {n: p.detach().clone() for n, p in trained.items()} if options.ema_decay else {}
        made = optimizers(trained, options, machine.device)
        return cls(modules, trained, made, scaler, ema, getattr(part, "state", {}))

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

    @contextmanager
    def resting(self, *frozen: nn.Module) -> Iterator[None]:
        """The networks, and `frozen` ones around them, as they are used once exported.

        Nothing that is done with them meanwhile changes the run.
        """
        networks = [self.modules, *frozen]
        modes = {module: module.training for network in networks for module in network.modules()}
        own = {name: tensor.clone() for name, tensor in self.own.items()}
        for network in networks:
            network.eval()
        try:
            with self.averaged(), torch.no_grad():
                yield
        finally:
            for module, mode in modes.items():
                module.training = mode
            for name, tensor in own.items():
                self.own[name].copy_(tensor)

    @contextmanager
    def parked(self) -> Iterator[None]:
        """Have the optimizers' state in the host's memory for a while, where the networks have memory of their own."""
        moved = []
        for entries in map(self._entries, self.trained.values()):
            for name, value in entries.items():
                if isinstance(value, Tensor) and value.device.type != "cpu":
                    moved.append((entries, name, value.device))
                    entries[name] = value.to("cpu")
        if moved and moved[0][2].type == "cuda":
            torch.cuda.empty_cache()
        try:
            yield
        finally:
            for entries, name, device in moved:
                entries[name] = entries[name].to(device)

    def _owner(self, p: nn.Parameter) -> Any:
        return next(o for o in self.optimizers if any(p is q for group in o.param_groups for q in group["params"]))

    def _entries(self, p: nn.Parameter) -> dict[str, Any]:
        """What the optimizer keeps of a parameter."""
        entries: dict[str, Any] = self._owner(p).state[p]
        return entries

    def _weights(self) -> dict[str, Tensor]:
        """What trains, and the buffers that are saved with it."""
        saved = self.modules.state_dict()
        buffers = {name: t for name, t in self.modules.named_buffers() if name in saved}
        return {**{name: p.detach() for name, p in self.trained.items()}, **buffers}

    def save(self, path: Path, record: Mapping[str, Any]) -> None:
        """Write everything to one file, atomically, with a `record` that JSON can say. Raises VgenError."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # paged state is read where it lies, without a copy that would wait
        tensors = {f"weights/{n}": t for n, t in self._weights().items()}
        tensors |= {f"ema/{n}": t for n, t in self.ema.items()} | {f"own/{n}": t for n, t in self.own.items()}
        for name, p in self.trained.items():
            for k, value in self._entries(p).items():
                tensors[f"optimizer/{name}/{k}"] = value if isinstance(value, Tensor) else torch.tensor(value)
        told = {**record, "format": FORMAT, "scaler": self.scaler.state_dict()}
        save_tensors(path, tensors, told)

    def restore(self, path: Path) -> dict[str, Any]:
        """Load the saved state. Returns the record it was saved with. Raises NoFile, and VgenError where it misfits."""
        tensors, record = load_tensors(path)
        if record.get("format") != FORMAT:
            raise VgenError(f"{path} was not written by this version of vgen.", "Start anew with --overwrite.")
        held: dict[str, dict[str, Tensor]] = {"weights": {}, "ema": {}, "own": {}, "optimizer": {}}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition("/")
            held[kind][rest] = tensor
        mine = self._weights()
        if {n: t.shape for n, t in held["weights"].items()} != {n: t.shape for n, t in mine.items()}:
            raise VgenError(f"{path} holds the state of another network.", AGAIN)
        if held["ema"].keys() != self.ema.keys():
            was = "with" if held["ema"] else "without"
            raise VgenError(f"{path} was trained {was} --ema-decay.", AGAIN)
        with torch.no_grad():
            for kind, these in (("weights", mine), ("ema", self.ema), ("own", self.own)):
                for name in held[kind].keys() & these.keys():
                    these[name].copy_(held[kind][name])
        for name, p in self.trained.items():
            prefix = f"{name}/"
            self._give(p, {n.removeprefix(prefix): t for n, t in held["optimizer"].items() if n.startswith(prefix)})
        if self.scaler.is_enabled() and record.get("scaler"):
            self.scaler.load_state_dict(record["scaler"])
        return record

    def _give(self, p: nn.Parameter, entries: Mapping[str, Tensor]) -> None:
        """Hand an optimizer what it kept of a parameter: counts as numbers, paged moments in pages again."""
        owner, given = self._owner(p), dict[str, Any]()
        for name, tensor in entries.items():
            if tensor.dtype == torch.int64 and not tensor.ndim:
                given[name] = int(tensor)
            elif tensor.shape == p.shape and getattr(owner, "is_paged", False):
                given[name] = owner.get_state_buffer(p, dtype=tensor.dtype)
                given[name].copy_(tensor)
            else:
                given[name] = tensor.to(p.device)
        owner.state[p] = given
