"""diffusers' caching hooks on the transformer: activations of one step used again in the next."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def arrange(network: Any, kind: str, timestep: Callable[[], int]) -> None:
    """Put fresh hooks of `kind` ("none", "fbcache" or "pab") on a network. `timestep` tells the current one."""
    if network.is_cache_enabled:
        network.disable_cache()
    if kind != "none":
        network.enable_cache(_config(kind, timestep))


def _config(kind: str, timestep: Callable[[], int]) -> Any:
    """First-block cache, or pyramid attention broadcast with the settings that diffusers documents for CogVideoX."""
    from diffusers import FirstBlockCacheConfig, PyramidAttentionBroadcastConfig

    if kind == "fbcache":
        return FirstBlockCacheConfig(threshold=0.05)
    return PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(100, 800),
        current_timestep_callback=timestep,
    )
