"""The machine a run has: device, precision, threads, and moving networks on and off the device."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from vgen.errors import UsageError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Machine:
    """Where networks run and in which precision. With `offload`, a network is on the device only at work."""

    device: torch.device
    dtype: torch.dtype
    offload: bool = False

    @contextlib.contextmanager
    def holding(self, *networks: nn.Module) -> Iterator[None]:
        """Have the networks on the device; take them off again when offloading."""
        for network in networks:
            network.to(self.device)
        try:
            yield
        finally:
            if self.offload:
                for network in networks:
                    network.to("cpu")


def accelerator() -> torch.device:
    """The best device at hand."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def machine(device: str = "auto", dtype: str = "auto", *, threads: int | None = None, offload: bool = False) -> Machine:
    """The machine of a run. 'auto' precision is bf16 on an accelerator and fp32 on the CPU. Raises UsageError."""
    if threads:
        torch.set_num_threads(threads)
    try:
        chosen = accelerator() if device == "auto" else torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise UsageError(
            f"--device {device} cannot be used here: {first}", "See what there is with: vgen doctor"
        ) from error
    auto = "fp32" if chosen.type == "cpu" else "bf16"
    return Machine(chosen, DTYPES[auto if dtype == "auto" else dtype], offload)


def seeded(*parts: object) -> torch.Generator:
    """A CPU generator whose draws are a pure function of `parts`, on every machine and after every resume."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
