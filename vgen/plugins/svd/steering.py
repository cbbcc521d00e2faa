"""What UNetSpatioTemporalConditionModel does not take by itself: contexts in time, and vectors frame by frame."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor

TEMPORAL = "TemporalBasicTransformerBlock"


@contextmanager
def steered(network: Any, temporal: Tensor | None, ids: Tensor | None) -> Iterator[None]:
    """Within, calls of the network use these beside what they are given.

    `temporal` (B, L, D) is the context of the temporal cross-attention, in place of the spatial one's. `ids`
    (B, T, n) are the vector conditions of each frame, in place of those of the clip.
    """
    with ExitStack() as hooks:
        if temporal is not None:
            for module in network.modules():
                if type(module).__name__ == TEMPORAL:
                    hooks.enter_context(_hooked(module, _Context(temporal)))
        if ids is not None:
            for block in (*network.down_blocks, network.mid_block, *network.up_blocks):
                hooks.enter_context(_hooked(block, _Vectors(network, ids)))
        yield


@contextmanager
def _hooked(module: Any, change: Any) -> Iterator[None]:
    handle = module.register_forward_pre_hook(change, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


class _Context:
    """Gives a temporal block, which sees (B * T, HW, D), a context of its own for each place of each clip."""

    def __init__(self, context: Tensor) -> None:
        self.context = context

    def __call__(self, module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        places = (kwargs["encoder_hidden_states"].shape[0]) // len(self.context)
        told = self.context.to(kwargs["encoder_hidden_states"].dtype).repeat_interleave(places, 0)
        return args, {**kwargs, "encoder_hidden_states": told}


class _Vectors:
    """Replaces the vector part of the time embedding (B * T, C), the same for all frames, by one for each frame."""

    def __init__(self, network: Any, ids: Tensor) -> None:
        self.network, self.ids, self.delta = network, ids, None

    def __call__(self, module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        embedding = kwargs["temb"]
        apart = vectors(self.network, self.ids.flatten(0, 1), embedding.dtype)
        same = vectors(self.network, self.ids[:, 0], embedding.dtype).repeat_interleave(self.ids.shape[1], 0)
        return args, {**kwargs, "temb": embedding + (apart - same)}


def vectors(network: Any, ids: Tensor, dtype: Any) -> Tensor:
    """The embedding (N, C) of vector conditions (N, n)."""
    waves = network.add_time_proj(ids.flatten()).reshape(len(ids), -1)
    made: Tensor = network.add_embedding(waves.to(dtype))
    return made
