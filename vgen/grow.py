"""A U-Net with more inputs than it had: new weights are zero, so that it says at first what it said before."""

from __future__ import annotations

from typing import Any

import torch


def grown(network: Any, **config: Any) -> Any:
    """A network of the same class whose configuration differs in `config`: more channels or vectors as input.

    Weights are copied; where a weight has become larger, the rest of it is zero.
    """
    if all(network.config[name] == value for name, value in config.items()):
        return network
    own = {name: value for name, value in network.config.items() if not name.startswith("_")}
    made = type(network).from_config({**own, **config}).to(next(network.parameters()).dtype)
    with torch.no_grad():
        weights = dict(made.named_parameters())
        for name, old in network.named_parameters():
            new = weights[name]
            if new.shape != old.shape:
                new.zero_()
            new[tuple(slice(n) for n in old.shape)] = old
    return made
