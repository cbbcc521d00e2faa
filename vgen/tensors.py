"""Safetensors files written whole or not at all: temporary name, fsync, rename, mode by umask."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vgen.errors import VgenError

if TYPE_CHECKING:
    from torch import Tensor

KEY = "vgen"  # the only metadata key: with two, the writer's order and so the file's bytes would vary


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place if the block succeeds, and is removed if it fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        _settle(temporary)
        temporary.replace(path)
        _sync(path.parent)
    except OSError as error:
        raise VgenError(
            f"{path} could not be written: {error.strerror or error}.", "Free some space, or choose another place."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def _settle(path: Path) -> None:
    """Give a new file the mode that the umask asks for, and bring it to the disk."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)
    _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save_tensors(path: Path, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
    """Write tensors and a JSON record to a safetensors file. Raises VgenError where the disk is full."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    whole = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    with replacing(path) as temporary:
        try:
            save_file(whole, temporary, {KEY: json.dumps(record, sort_keys=True, separators=(",", ":"))})
        except SafetensorError as error:
            raise OSError(str(error)) from error


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what save_tensors wrote. Raises VgenError where the file is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            record = json.loads((file.metadata() or {}).get(KEY, "{}"))
            return {name: file.get_tensor(name) for name in file.keys()}, record  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise VgenError(f"{path} cannot be read: {error}.", "It is damaged: remove it and make it again.") from error
