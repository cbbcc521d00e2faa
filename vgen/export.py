"""Checkpoint folders in diffusers' layout: a copy of the base with the trained networks in their places."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vgen.errors import VgenError

MANIFEST = "vgen.json"
LEFT_OUT = ("training", ".*.tmp")


def export(
    base: Path, networks: Mapping[str, nn.Module], folder: Path, manifest: Mapping[str, Any], dtype: torch.dtype
) -> None:
    """Write the checkpoint `folder`: everything of `base`, with `networks` saved under their names in `dtype`.

    Each subfolder is written beside its place and renamed, so a reader never sees half of one. Raises VgenError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        _copy_missing(base, folder, set(networks))
        for name, network in networks.items():
            _place(network, folder / name, dtype)
        old = json.loads((base / MANIFEST).read_text()) if (base / MANIFEST).exists() else {}
        temporary = folder / f".{MANIFEST}.tmp"
        temporary.write_text(json.dumps({**old, **manifest}, indent=2) + "\n")
        temporary.replace(folder / MANIFEST)
    except OSError as error:
        raise VgenError(
            f"The checkpoint {folder} could not be written: {error.strerror or error}.", "Free some space and --resume."
        ) from error


def _copy_missing(base: Path, folder: Path, replaced: set[str]) -> None:
    """Copy what the base has and the folder lacks, except the networks that are about to be written."""
    if base.resolve() == folder.resolve():
        return
    for source in base.iterdir():
        target = folder / source.name
        if source.name in replaced or source.name in LEFT_OUT or target.exists():
            continue
        if source.is_dir():
            shutil.copytree(source, target)
        else:
            shutil.copy2(source, target)


def _place(network: nn.Module, place: Path, dtype: torch.dtype) -> None:
    """Save a network beside its place, then swap it in."""
    temporary, old = place.with_name(f".{place.name}.tmp"), place.with_name(f".{place.name}.old")
    for left in (temporary, old):
        shutil.rmtree(left, ignore_errors=True)
    saved: Any = network if next(network.parameters()).dtype == dtype else copy.deepcopy(network).to(dtype)
    saved.save_pretrained(temporary, safe_serialization=True)
    _open_to_umask(temporary)
    if place.exists():
        place.rename(old)
    temporary.rename(place)
    shutil.rmtree(old, ignore_errors=True)


def _open_to_umask(folder: Path) -> None:
    """safetensors writes files that only their owner can read; give them the mode that the umask asks for."""
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~umask)
