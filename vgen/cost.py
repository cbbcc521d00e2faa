"""What a clip costs before anything is loaded: weights, multiplications and memory, counted on tensors without content.

Two ways to count are told. As papers mostly do: multiplications (MACs) of convolutions and linear layers, one pass a
step, which is what the tool fvcore gives where attention is fused. And truly: floating-point operations, two for a
multiplication and its addition, with the products of attention and with every pass that guidance makes.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention  # that of the CPU, which torch leaves out, costs as much
FORMULAS = {**flop_registry, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[ATTENTION]}
PRODUCTS = ("attention", "bmm")  # in the names of operations that multiply activations with each other


@dataclass(frozen=True)
class Call:
    """What one network does for a clip: `run` calls it once, on the meta device, and it is called `calls` times.

    Each call makes `passes` passes at once. `stays` says that the network is still in memory when the next one runs.
    """

    name: str
    network: nn.Module
    run: Callable[[], Any]
    calls: int = 1
    passes: int = 1
    stays: bool = True


@dataclass(frozen=True)
class Cost:
    """What a clip takes: calls in their order, and the shapes of its streams of latents."""

    calls: Sequence[Call]
    streams: Mapping[str, Sequence[int]]


def empty(*shape: int) -> Tensor:
    """A tensor of a shape, without content."""
    return torch.empty(shape, device="meta")


@dataclass
class Count:
    """What was counted: MACs without and with products of activations, and the most bytes that were there at once."""

    plain: float = 0.0
    products: float = 0.0
    bytes: int = 0

    @property
    def flops(self) -> float:
        """All floating-point operations."""
        return 2 * (self.plain + self.products)


@dataclass
class Meter(TorchDispatchMode):
    """Counts what is computed within, on any device; the results of each operation count as memory while they live.

    Batches of products with one of the `weights` (their storages) are linear layers, however they are computed.
    """

    weights: frozenset[int] = frozenset()
    count: Count = field(default_factory=Count)

    def __post_init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}  # how many tensors look at each storage
        self.held = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        known = FORMULAS.get(func._overloadpacket)
        if known is None:
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        if known is not None:
            macs = known(*args, **kwargs, out_val=out) / 2
            if any(word in str(func) for word in PRODUCTS) and not self._weighs(args):
                self.count.products += macs
            else:
                self.count.plain += macs
        for one in tree_leaves(out):
            if isinstance(one, Tensor):
                self._hold(one)
        return out

    def _weighs(self, args: Any) -> bool:
        return any(isinstance(one, Tensor) and _storage(one) in self.weights for one in args)

    def _hold(self, tensor: Tensor) -> None:
        place, size = _storage(tensor), tensor.untyped_storage().nbytes()
        if place not in self.live:
            self.live[place] = 0
            self.held += size
            self.count.bytes = max(self.count.bytes, self.held)
        self.live[place] += 1
        weakref.finalize(tensor, self._let_go, place, size).atexit = False

    def _let_go(self, place: int, size: int) -> None:
        self.live[place] -= 1
        if not self.live[place]:
            del self.live[place]
            self.held -= size


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


@torch.no_grad()
def counted(run: Callable[[], Any], *networks: nn.Module) -> Count:
    """What one call of `run` costs, which calls these networks."""
    weights = frozenset(_storage(p) for network in networks for p in network.parameters())
    with Meter(weights) as meter:
        run()
    return meter.count


def report(cost: Cost, *, offload: bool) -> dict[str, Any]:
    """The bill of a clip as JSON: each network, the whole clip, its latents. Memory is in bytes, an estimate.

    With `offload`, only the network at work is on the device.
    """
    parts = [_told(call, counted(call.run, call.network)) for call in cost.calls]
    shapes = {name: list(shape) for name, shape in cost.streams.items()}
    numbers = sum(torch.Size(shape).numel() for shape in shapes.values())
    own = {id(call.network): part["parameters"] for call, part in zip(cost.calls, parts, strict=True)}
    clip = {
        "parameters": sum(own.values()),
        "macs_fvcore_like": sum(part["calls"] * part["macs_fvcore_like"] for part in parts),
        "flops_true": sum(part["calls"] * part["flops_true"] for part in parts),
        "peak_memory": _peak(zip(cost.calls, parts, strict=True), offload),
    }
    return {"parts": parts, "clip": clip, "latents": {"streams": shapes, "numbers": numbers}}


def _told(call: Call, count: Count) -> dict[str, Any]:
    weights = list(call.network.parameters())
    held = sum(p.numel() * p.element_size() for p in weights)
    return {
        "name": call.name,
        "network": type(call.network).__name__,
        "parameters": sum(p.numel() for p in weights),
        "calls": call.calls,
        "passes": call.passes,
        "macs_fvcore_like": round(count.plain / call.passes),
        "flops_true": round(count.flops),
        "weights_memory": held,
        "peak_memory": held + count.bytes,
    }


def _peak(parts: Iterable[tuple[Call, Mapping[str, Any]]], offload: bool) -> int:
    """The most memory at once, over calls in their order."""
    peak, held = 0, dict[int, int]()
    for call, told in parts:
        peak = max(peak, told["peak_memory"] + sum(size for one, size in held.items() if one != id(call.network)))
        if call.stays and not offload:
            held[id(call.network)] = told["weights_memory"]
    return peak


def lines(bill: Mapping[str, Any]) -> list[str]:
    """A bill for people."""
    rows = [("network", "weights", "calls", "TMACs (as papers count)", "TFLOPs (true)", "memory, GB")]
    for part in [*bill["parts"], {"name": "clip", "calls": "", **bill["clip"]}]:
        figures = (part["macs_fvcore_like"] / 1e12, part["flops_true"] / 1e12, part["peak_memory"] / 1e9)
        calls = f"{part['calls']} x {part['passes']}" if part["calls"] else ""
        rows.append((part["name"], f"{part['parameters']:,}", calls, *(f"{one:.4g}" for one in figures)))
    wide = [max(len(row[k]) for row in rows) for k in range(6)]
    table = ["  " + "  ".join(cell.ljust(w) for cell, w in zip(row, wide, strict=True)).rstrip() for row in rows]
    latents = ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in bill["latents"]["streams"].items())
    return [*table, f"  latents: {latents} ({bill['latents']['numbers']:,} numbers)"]
