"""How large things are in CMD: maps of motion, and the networks that a checkpoint does not have yet."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vgen.errors import UsageError
from vgen.family import read_config

if TYPE_CHECKING:
    from vgen.plugins.cmd.model import CMD

NOISE = {  # DiT's process, in diffusers' words
    "beta_schedule": "linear",
    "beta_start": 1e-4,
    "beta_end": 2e-2,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
}


def noise(config: Mapping[str, Any]) -> dict[str, Any]:
    """The noise process of a motion model: what its configuration says in the place of DiT's. Raises UsageError."""
    told = {**NOISE, **(config.get("noise") or {})}
    if config["learned_variance"] and told["prediction_type"] != "epsilon":
        raise UsageError(
            f"A motion model with learned variance predicts noise, not {told['prediction_type']}.",
            "Set learned_variance to false in its configuration.",
        )
    return told


def motion(model: CMD, options: Any) -> tuple[int, int]:
    """Rows and columns of motion of a clip of the asked size."""
    _, h, w = model.space.strides
    patch = int(model.config("autoencoder")["patch_size"])
    return options.height // h // patch, options.width // w // patch


def configs(model: CMD, name: str, options: Any) -> dict[str, dict[str, Any]]:
    """The configuration, by name, of a network that begins anew and not as the checkpoint has it; else nothing.

    It is what --network says, the checkpoint's own, or the paper's, with what other networks decide. Raises UsageError.
    """
    path = getattr(options, "network", None)
    anew = options.from_scratch or not model.has(name)
    if path and not anew:
        raise UsageError("--network is for a part that starts from random weights.", "Give --from-scratch too.")
    if not anew or name == "unet":
        return {}
    own = model.networks.config(name) if model.has(name) else {}
    asked = _read(path) if path else own
    decided = _decided(model, name)
    odd = {key: asked[key] for key, value in decided.items() if asked.get(key, value) != value}
    if odd:
        told = ", ".join(f"{key} {value}, not {decided[key]}" for key, value in odd.items())
        raise UsageError(f"--network {path} does not fit the checkpoint: {told}.", "Leave these out of it.")
    return {name: {**asked, **decided}}


def _read(path: Path) -> dict[str, Any]:
    return read_config(path.parent, path.name, "network")


def _decided(model: CMD, name: str) -> dict[str, Any]:
    """What the other networks of a checkpoint decide of a new one."""
    channels = int(model.networks.config("unet")["in_channels"])
    if name == "autoencoder":
        return {"in_channels": channels, "pixels": not model.has("vae")}
    text = model.networks.config("text_encoder")["hidden_size"] if model.has("text_encoder") else 0
    return {
        "motion_channels": int(model.config("autoencoder")["motion_channels"]),
        "content_channels": channels,
        "text_width": int(text),
        "classes": model.classes,
    }
