"""LoRA files: one that every reader gets right, the names of other programs, and reading those of others.

A layer's adapter is a pair (A (r, in), B (out, r)), and its whole change of the weight is B @ A: alpha / rank is baked
into B. diffusers takes alpha = rank where a file does not tell, and then loads anything else too strong or too weak.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from vgen.cache import read_json
from vgen.errors import VgenError
from vgen.files import replacing

WEIGHTS = "pytorch_lora_weights.safetensors"  # the name that diffusers looks for
FOREIGN = {"comfy": "comfy.safetensors", "kohya": "kohya.safetensors"}
ABOUT, CONFIG = "vgen_adapter", "lora_adapter_metadata"  # keys of the header: ours, and diffusers'
Pairs = Mapping[str, tuple[Tensor, Tensor]]
Rename = Callable[[str], str]
KEY = re.compile(
    r"(?P<stem>.+?)[._](?P<which>lora_A|lora_B|lora_down|lora_up|lora\.down|lora\.up|alpha)"
    r"(\.default(_\d+)?)?(\.weight)?"
)
DOWN = ("lora_A", "lora_down", "lora.down")
PREFIXES = ("base_model.model.", "diffusion_model.", "lora_unet_", "lora_transformer_")
TEXT = ("text_encoder.", "text_encoder_2.", "lora_te_", "lora_te1_", "lora_te2_")


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter as read. `about` is what vgen wrote of it, or nothing; `of_text` are weights of a text encoder."""

    path: Path
    pairs: Pairs
    about: Mapping[str, Any] = field(default_factory=dict)
    of_text: tuple[str, ...] = ()

    @property
    def ranks(self) -> set[int]:
        """The ranks of its layers."""
        return {len(a) for a, _ in self.pairs.values()}


def kohya_name(layer: str) -> str:
    """The key of a layer in kohya's sd-scripts: the diffusers name, with underscores."""
    return "lora_unet_" + layer.replace(".", "_")


def write(path: Path, part: str, pairs: Pairs, about: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> None:
    """Write the file for diffusers, peft and vgen, whole or not at all. Raises VgenError.

    Keys are "<part>.<layer>.lora_A.weight" and "... lora_B.weight"; the header repeats rank and layers as diffusers'
    own metadata does, so that readers of either agree.
    """
    tensors = {}
    for name, (a, b) in pairs.items():
        tensors[f"{part}.{name}.lora_A.weight"] = _stored(a, dtype)
        tensors[f"{part}.{name}.lora_B.weight"] = _stored(b, dtype)
    config = {f"{part}.{k}": v for k, v in _peft_config(pairs).items()}
    header = {"format": "pt", CONFIG: json.dumps(config, sort_keys=True), ABOUT: json.dumps(about, sort_keys=True)}
    _write(path, tensors, header)


def write_foreign(path: Path, pairs: Pairs, rename: Rename, dtype: torch.dtype = torch.float32) -> None:
    """Write the file for ComfyUI, kohya's sd-scripts and musubi-tuner. Raises VgenError.

    "<rename(layer)>.lora_down.weight", "... .lora_up.weight" and "... .alpha", a number, equal to the rank: all of
    them scale by alpha / rank where that tensor is there, and some by 1 / rank or 1 where it is not.
    """
    tensors = {}
    for name, (a, b) in pairs.items():
        stem = rename(name)
        tensors[f"{stem}.lora_down.weight"] = _stored(a, dtype)
        tensors[f"{stem}.lora_up.weight"] = _stored(b, dtype)
        tensors[f"{stem}.alpha"] = torch.tensor(float(len(a)), dtype=dtype)
    rank = str(max(len(a) for a, _ in pairs.values()))
    told = {"ss_network_module": "networks.lora", "ss_network_dim": rank, "ss_network_alpha": rank}
    _write(path, tensors, {"format": "pt", **told})


def _stored(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to("cpu", dtype).contiguous()


def _write(path: Path, tensors: dict[str, Tensor], header: dict[str, str]) -> None:
    data = save(tensors)
    start = 8 + int.from_bytes(data[:8], "little")
    # safetensors writes metadata in a random order; here equal adapters are equal files
    told = json.dumps({"__metadata__": header, **json.loads(data[8:start])}).encode()
    told += b" " * (-len(told) % 8)
    with replacing(path) as file:
        file.write(len(told).to_bytes(8, "little") + told + data[start:])


def _peft_config(pairs: Pairs) -> dict[str, Any]:
    """What peft needs to put the adapter in place: rank = alpha, exact layers; the ranks of layers that differ."""
    ranks = {name: len(a) for name, (a, _) in pairs.items()}
    rank = max(ranks.values())
    pattern = {f"^{re.escape(name)}": r for name, r in ranks.items() if r != rank}
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "target_modules": sorted(pairs),
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
    }


def about(path: Path) -> dict[str, Any]:
    """What vgen wrote of an adapter into its header; nothing for the files of others. Raises VgenError."""
    told = _open(path)[1].get(ABOUT)
    try:
        read = json.loads(told) if told else {}
    except ValueError:
        read = {}
    return read if isinstance(read, dict) else {}


def read(path: Path, part: str, layers: Iterable[str], rename: Rename = kohya_name) -> Adapter:
    """The adapter in a file for a network with such layers, under diffusers', peft's, kohya's or ComfyUI's names.

    Every weight must find its layer and its other half. Raises VgenError for a file that cannot be used as a whole.
    """
    tensors, header = _open(path)
    known = {name.replace(".", "_"): name for name in layers}
    known |= {_bare(rename(name), part): name for name in list(known.values())}
    halves: dict[str, dict[str, Tensor]] = {}
    lost, of_text = [], []
    for key, tensor in tensors.items():
        match = KEY.fullmatch(key)
        if key.startswith(TEXT):
            of_text.append(key)
        elif match is None or _bare(match["stem"], part) not in known:
            lost.append(key)
        else:
            kind = "alpha" if match["which"] == "alpha" else "A" if match["which"] in DOWN else "B"
            halves.setdefault(known[_bare(match["stem"], part)], {})[kind] = tensor
    if lost or not halves:
        raise VgenError(
            f"{path} holds nothing for '{part}'."
            if not halves
            else f"{path} holds {len(lost)} weights that have no place in '{part}': {lost[0]}, ...",
            "It is an adapter of another model, or of another kind than LoRA (DoRA, LoHa, LoKr are not read).",
        )
    config = _config(path, header, part)
    pairs = {name: _pair(path, name, found, config) for name, found in halves.items()}
    return Adapter(path, pairs, about(path), tuple(of_text))


def _bare(stem: str, part: str) -> str:
    """The stem of a key without prefixes, all dots underscored, old diffusers' attention processors taken out."""
    for prefix in (f"{part}.", *PREFIXES):
        stem = stem.removeprefix(prefix)
    stem = stem.replace(".processor.", ".")
    return re.sub(r"_to_out$", "_to_out_0", stem.replace(".", "_"))


def _pair(path: Path, name: str, found: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """A and baked B of a layer. Raises VgenError where one is missing or they do not fit together."""
    if not {"A", "B"} <= found.keys() or len(found["A"]) != found["B"].shape[1]:
        raise VgenError(f"{path} is not whole: the two halves of '{name}' do not fit together.", "Fetch it again.")
    a, b = found["A"].float(), found["B"].float()
    rank = len(a)
    alpha = found["alpha"].item() if "alpha" in found else _alpha(config, name, rank)
    return a, b * (alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _alpha(config: Mapping[str, Any], name: str, rank: int) -> float:
    """The alpha that peft's configuration gives a layer; the rank where there is none."""
    for pattern, alpha in (config.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", name):
            return float(alpha)
    return float(config.get("lora_alpha", rank))


def _config(path: Path, header: Mapping[str, str], part: str) -> dict[str, Any]:
    """peft's configuration: from the header as diffusers writes it, or from adapter_config.json as peft does."""
    try:
        told = json.loads(header.get(CONFIG) or "null")
    except ValueError:
        told = None
    if isinstance(told, dict):
        return {k.removeprefix(f"{part}."): v for k, v in told.items()}
    return read_json(path.parent / "adapter_config.json") if path.name.startswith("adapter_model") else {}


def _open(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header of a safetensors file. Raises VgenError."""
    if path.suffix != ".safetensors":
        raise VgenError(
            f"{path} is not a .safetensors file; pickled weights can run any code when they are read.",
            "Ask its author for safetensors, or convert it on a machine that you can spare.",
        )
    try:
        with safe_open(path, "pt") as file:
            opened = cast(Any, file)
            return {key: opened.get_tensor(key) for key in opened.keys()}, dict(opened.metadata() or {})  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise VgenError(f"{path} cannot be read: {error}", "Check the path, or fetch it again.") from error
