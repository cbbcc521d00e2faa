"""Where MagicVideo's layers in time hang: on an image U-Net, and on the decoder of an image autoencoder."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from vgen.temporal import sites

Groups = list[dict[str, Any]]
HEAD = 64  # width of a head of attention, where the channels are multiples of it


def unet(network: nn.Module, frames: int, mask: str, adaptor: str) -> Groups:
    """Adaptors after the convolutions of residual blocks, attention beside that of pictures, and the frame rate."""
    convolutions = sites(network, "*.resnets.*.conv[12]")
    if adaptor == "frame":
        first = {"kind": "adaptor", "frames": frames, "sites": convolutions}
    else:
        first = {"kind": "convolution", "sites": convolutions}
    rate = sites(network, "time_embedding", channels=lambda module: int(module.linear_2.out_features))
    beside = _attention(sites(network, "*.attentions.[0-9]"), mask)
    return [first, beside, {"kind": "told", "name": "fps", "sites": rate}]


def decoder(vae: Any, mask: str) -> Groups:
    """Attention beside that of pictures in the middle, and beside the last residual block of each size."""
    last = [f"decoder.up_blocks.{i}.resnets.{len(block.resnets) - 1}" for i, block in enumerate(vae.decoder.up_blocks)]
    middle = sites(vae, "decoder.mid_block.attentions.[0-9]", channels=lambda module: int(module.query_dim))
    return [_attention({**middle, **sites(vae, *last)}, mask)]


def _attention(places: dict[str, int], mask: str) -> dict[str, Any]:
    return {"kind": "attention", "mask": mask, "head_width": math.gcd(HEAD, *places.values()), "sites": places}
