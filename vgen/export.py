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
from safetensors import SafetensorError
from torch import nn

from vgen.cache import read_json
from vgen.errors import VgenError
from vgen.files import explained, replacing, sweep, sync_folder
from vgen.lineage import KEYS

MANIFEST = "vgen.json"
LEFT_OUT = ("training", ".cache", ".git")
ABOUT = (".tmp", ".md")  # the base's model card is not that of what was trained from it
STALE = ("files", *KEYS)  # what the base's manifest says of its own bytes, and of where they come from
ONE_FILE = "1000GB"  # weights are never cut into shards, so that they are replaced in one step


def export(
    base: Path, networks: Mapping[str, nn.Module], folder: Path, manifest: Mapping[str, Any], dtype: torch.dtype
) -> None:
    """Write the checkpoint `folder`: everything of `base`, with `networks` saved under their names in `dtype`.

    Each file is written beside its place and renamed, the weights of all networks last and together: a reader never
    sees half a file, and a kill leaves the checkpoint that was there before. Raises VgenError.
    """
    with explained(f"write the checkpoint {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        sweep(folder)
        try:
            _copy_missing(base, folder, set(networks))
            for name, network in networks.items():
                _save(network, _temporary(folder / name), dtype)
            for name in networks:
                _place(folder / name)
        finally:
            _clean(folder, {*networks, *(source.name for source in base.iterdir())})
    stale = STALE if base.resolve() != folder.resolve() else STALE[:1]
    told = {k: v for k, v in read_json(base / MANIFEST).items() if k not in stale}
    with replacing(folder / MANIFEST) as file:
        file.write((json.dumps({**told, **manifest}, indent=2) + "\n").encode())


def _temporary(place: Path) -> Path:
    return place.with_name(f".{place.name}.tmp")


def _clean(folder: Path, names: set[str]) -> None:
    """Remove what a failure left unfinished: on a full disk it would be in the way of the next try."""
    for temporary in (_temporary(folder / name) for name in names):
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def _copy_missing(base: Path, folder: Path, replaced: set[str]) -> None:
    """Copy what the base has and the folder lacks, except the networks and the manifest, which are written anew."""
    for source in base.iterdir():
        target = folder / source.name
        if source.name in {*replaced, *LEFT_OUT, MANIFEST} or source.suffix in ABOUT or target.exists():
            continue
        temporary = _temporary(target)
        if source.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.copytree(source, temporary)
        else:
            shutil.copyfile(source, temporary)
        _settle(temporary)
        temporary.rename(target)


def _save(network: nn.Module, temporary: Path, dtype: torch.dtype) -> None:
    """Save a network in `dtype`, durably, to a new folder."""
    shutil.rmtree(temporary, ignore_errors=True)
    saved: Any = network if next(network.parameters()).dtype == dtype else copy.deepcopy(network).to(dtype)
    try:
        saved.save_pretrained(temporary, safe_serialization=True, max_shard_size=ONE_FILE)
    except SafetensorError as error:
        raise VgenError(
            f"The weights of {temporary.parent} could not be written: {error}", "Free some space, and --resume."
        ) from error
    _settle(temporary)


def _place(place: Path) -> None:
    """Move the files of a saved network to their place, the weights first, and remove what they replace."""
    temporary = _temporary(place)
    new = sorted(temporary.iterdir(), key=lambda path: path.suffix != ".safetensors")
    place.mkdir(exist_ok=True)
    for path in new:
        path.replace(place / path.name)
    kept = {path.name for path in new}
    for old in sorted(place.iterdir(), key=lambda path: path.suffix != ".json"):  # an index before its shards
        if old.is_file() and old.name not in kept:
            old.unlink()
    sync_folder(place)
    temporary.rmdir()


def _settle(path: Path) -> None:
    """Make a file or a tree durable, with the modes that the umask asks for: safetensors writes for its owner only."""
    umask = os.umask(0)
    os.umask(umask)
    for file in [path] if path.is_file() else [one for one in path.rglob("*") if one.is_file()]:
        file.chmod(0o666 & ~umask)
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
