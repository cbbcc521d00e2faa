"""Frozen weights in 4 or 8 bits, by bitsandbytes: a base that adapters train on takes a quarter or half of the memory.

"nf4" is QLoRA's data type (arXiv:2305.14314), 0.5 bytes per weight and a scale for each 64; "int8" is LLM.int8()
(arXiv:2208.07339), 1 byte per weight and a scale for each row. Gradients pass through both, to the adapters.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn

from vgen.errors import VgenError

Kind = Literal["nf4", "int8"]


def quantize(network: nn.Module, kind: Kind, device: torch.device) -> int:
    """Store the linear layers of a network's blocks in `kind`, on `device`. Returns how many; embeddings stay.

    The layers compute in the precision that the network has. Raises VgenError without bitsandbytes, or where it
    cannot do this on the device.
    """
    library = _library()
    names = [name for name, module in network.named_modules() if type(module) is nn.Linear and _in_a_block(name)]
    if not names:
        raise VgenError("The network has no linear layers in blocks to quantize.", "Leave out --quantize.")
    try:
        for name in names:
            parent, _, last = name.rpartition(".")
            layer: Any = network.get_submodule(name)
            setattr(network.get_submodule(parent), last, _quantized(library, layer, kind).to(device))
    except (RuntimeError, NotImplementedError) as error:
        raise VgenError(
            f"bitsandbytes {library.__version__} cannot store weights as {kind} on {device.type}: {error}",
            "Leave out --quantize, or run on a CUDA device.",
        ) from error
    setattr(network, "is_loaded_in_4bit" if kind == "nf4" else "is_loaded_in_8bit", True)  # peft looks at these
    return len(names)


def _in_a_block(name: str) -> bool:
    """Whether a layer is in a list of blocks: what is not, the embeddings and the head, is small and sensitive."""
    return any(step.isdecimal() for step in name.split("."))


def _quantized(library: Any, layer: nn.Linear, kind: Kind) -> Any:
    """The same layer in bitsandbytes' class, which quantizes when it is moved to its device."""
    bias, dtype = layer.bias is not None, layer.weight.dtype
    if kind == "nf4":
        made = library.nn.Linear4bit(
            layer.in_features, layer.out_features, bias, compute_dtype=dtype, quant_type="nf4", device="meta"
        )
        made.weight = library.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4", module=made)
    else:
        made = library.nn.Linear8bitLt(
            layer.in_features, layer.out_features, bias, has_fp16_weights=False, device="meta"
        )
        made.weight = library.nn.Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
    made.bias = layer.bias
    return made.requires_grad_(False)


def _library() -> Any:
    try:
        import bitsandbytes
    except ImportError as error:
        raise VgenError("--quantize needs bitsandbytes, which is not installed.", "pip install bitsandbytes") from error
    return bitsandbytes
