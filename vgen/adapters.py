"""Low-rank adapters (LoRA, arXiv:2106.09685) on networks, by peft: which layers, new ones, loaded ones, merging."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from vgen import lean
from vgen.adapter_file import Adapter, Pairs
from vgen.errors import UsageError, VgenError, did_you_mean

TRAINED = "default"  # peft's name of the adapter that trains


def layers(network: nn.Module) -> dict[str, nn.Module]:
    """The layers of a network that can be adapted, linear ones and convolutions, by name, adapted already or not."""
    found: dict[str, nn.Module] = {}
    for name, module in network.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)) and ".lora_" not in name:
            found[name.removesuffix(".base_layer")] = module
    return found


def targets(network: nn.Module, wanted: Iterable[str]) -> list[str]:
    """The names of the layers that `wanted` means: whole names, their ends ("to_q"), or patterns ("*.attn1.to_?").

    Raises UsageError, with the names that are near, for one that means no layer.
    """
    names = list(layers(network))
    chosen: set[str] = set()
    for one in wanted:
        fit = {n for n in names if fnmatchcase(n, one) or fnmatchcase(n, f"*.{one}")}
        if not fit:
            raise UsageError(f"--target-modules {one} names no layer that can be adapted.", _near(one, names))
        chosen |= fit
    return [name for name in names if name in chosen]


def _near(wanted: str, names: Iterable[str]) -> str:
    """What could have been meant: the ends of the names after their last number, with what follows a list."""
    ends = {re.split(r"\.\d+\.", name)[-1] for name in names}
    return did_you_mean(wanted, ends | {".".join(end.split(".")[1:]) for end in ends if "." in end})


def add(network: nn.Module, names: list[str], *, rank: int, alpha: float, dropout: float, seed: int) -> nn.Module:
    """Put new adapters on layers of a network; A is drawn from `seed`, B is 0. Freezes all the rest.

    Returns the adapter as a module of fp32 weights, "<layer>.lora_A.weight" and "... lora_B.weight", that are
    the network's own: to train, save or load one is to do it to the other.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _inject(network, TRAINED, dict.fromkeys(names, rank), alpha / rank, dropout)
    weights = _tree(_parts(network, TRAINED))
    network.requires_grad_(False)
    weights.float().requires_grad_(True)
    return weights


def share_inputs(network: nn.Module) -> None:
    """Have adapted layers take their inputs as they are, for runs under autocast, which casts them as it needs them.

    peft would first cast the input of each layer to fp32; then autocast makes, and training keeps, a copy for each.
    """
    for _, layer in _adapted(network):
        layer.cast_input_dtype_enabled = False


def attach(network: nn.Module, adapter: Adapter, scale: float, name: str, dtype: torch.dtype) -> None:
    """Put a loaded adapter on a network, frozen, `scale` times its strength. Raises VgenError where it does not fit."""
    shapes = {n: _shapes(layer) for n, layer in layers(network).items()}
    for layer, (a, b) in adapter.pairs.items():
        if (a.shape[1], b.shape[0]) != shapes[layer]:
            raise VgenError(
                f"{adapter.path} does not fit: '{layer}' takes {shapes[layer][0]} numbers to {shapes[layer][1]},"
                f" the adapter {a.shape[1]} to {b.shape[0]}.",
                "It was trained on a larger or smaller model.",
            )
    _inject(network, name, {layer: len(a) for layer, (a, _) in adapter.pairs.items()}, 1.0, 0.0)
    put(_tree(_parts(network, name)).to(dtype).requires_grad_(False), adapter.pairs)
    for _, layer in _adapted(network, name):
        layer.set_scale(name, scale)


def put(weights: nn.Module, pairs: Pairs, scaling: float = 1.0) -> None:
    """Copy the weights of an adapter into a module of `add`, whose own scaling (alpha / rank) is `scaling`."""
    own, told = weights.state_dict(), dict[str, Tensor]()
    for layer, (a, b) in pairs.items():
        told |= {f"{layer}.lora_A.weight": a, f"{layer}.lora_B.weight": b / scaling}
    weights.load_state_dict({k: t.reshape(own[k].shape) for k, t in told.items()})  # 1x1 convolutions, or linear


def baked(weights: nn.Module, scaling: float) -> dict[str, tuple[Tensor, Tensor]]:
    """A and `scaling` * B of each layer of a module of `add`, fp32. Raises VgenError where they say nothing."""
    state = {name: t.detach().float() for name, t in weights.state_dict().items()}
    names = [name.removesuffix(".lora_A.weight") for name in state if name.endswith(".lora_A.weight")]
    pairs = {n: (state[f"{n}.lora_A.weight"], scaling * state[f"{n}.lora_B.weight"]) for n in names}
    if not all(t.isfinite().all() for pair in pairs.values() for t in pair):
        raise VgenError("The adapter holds numbers that are not finite.", "Lower --learning-rate.")
    if not any(b.any() for _, b in pairs.values()):
        raise VgenError(
            "The adapter has learnt nothing: all its weights that start at 0 still are.",
            "Raise --learning-rate, or train longer.",
        )
    return pairs


def effect(network: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """A and scaled B of each adapted layer of a network that carries one adapter, fp32."""
    found = {}
    for path, layer in _adapted(network):
        (name,) = layer.lora_A
        a, b = (part[name].weight.detach().float() for part in (layer.lora_A, layer.lora_B))
        found[path] = (a, layer.scaling[name] * b)
    return found


def merge(network: nn.Module) -> None:
    """Add the changes of all adapters, at their scales, to the weights, and take the adapters off."""
    for path, layer in list(_adapted(network)):
        parent, _, last = path.rpartition(".")
        layer.merge(adapter_names=list(layer.lora_A))
        setattr(network.get_submodule(parent), last, layer.get_base_layer())
    if hasattr(network, "peft_config"):
        del network.peft_config


def _shapes(layer: Any) -> tuple[int, int]:
    """How many numbers, or channels, a layer takes and gives."""
    if isinstance(layer, nn.Conv2d):
        return layer.in_channels, layer.out_channels
    return layer.in_features, layer.out_features


def _adapted(network: nn.Module, name: str | None = None) -> Iterator[tuple[str, Any]]:
    """The layers that carry an adapter (of that name), as peft's."""
    with lean.imports("peft", "transformers"):
        from peft.tuners.lora import LoraLayer

    for path, module in network.named_modules():
        if isinstance(module, LoraLayer) and (name is None or name in module.lora_A):
            yield path, module


def _inject(network: nn.Module, name: str, ranks: Mapping[str, int], scaling: float, dropout: float) -> None:
    """Have peft wrap layers of these ranks, with random weights, and turn all adapters of the network on."""
    rank = max(ranks.values())
    other = {f"^{re.escape(layer)}": r for layer, r in ranks.items() if r != rank}
    with lean.imports("peft", "transformers"), warnings.catch_warnings(action="ignore", category=UserWarning):
        from peft import LoraConfig, inject_adapter_in_model

        config = LoraConfig(
            r=rank,
            lora_alpha=scaling * rank,  # type: ignore[arg-type]
            rank_pattern=other,
            alpha_pattern={layer: scaling * r for layer, r in other.items()},
            target_modules=list(ranks),
            lora_dropout=dropout,
        )
        inject_adapter_in_model(config, network, name)  # warns that it is not the first
    placed = {path for path, _ in _adapted(network, name)}
    if placed != set(ranks):
        raise VgenError(f"{len(ranks)} layers were to be adapted, {len(placed)} could be.", "Name other layers.")
    for _, layer in _adapted(network):
        layer.set_adapter(list(layer.lora_A))


def _parts(network: nn.Module, name: str) -> dict[str, nn.Module]:
    """The modules of an adapter by the names that files give them; its dropout, which has no weights, among them."""
    found: dict[str, nn.Module] = {}
    for path, layer in _adapted(network, name):
        found |= {f"{path}.{which}": getattr(layer, which)[name] for which in ("lora_A", "lora_B", "lora_dropout")}
    return found


def _tree(parts: Mapping[str, nn.Module]) -> nn.Module:
    """A module that holds others under dotted names."""
    root = nn.Module()
    for path, part in parts.items():
        here = root
        *above, last = path.split(".")
        for name in above:
            if name not in here._modules:
                here.add_module(name, nn.Module())
            here = here.get_submodule(name)
        here.add_module(last, part)
    return root
