"""Where a result may be written, and how it gets there whole or not at all. Standard library only."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vgen.errors import UsageError, VgenError, did_you_mean

VIDEOS = (".mp4", ".webm", ".gif")
LATENTS = ".safetensors"
KNOWN = (*VIDEOS, LATENTS)
_MARK = ".vgen-"  # temporary names begin with it; hidden, so that a folder of clips is not read with one in it


def check_output(path: Path | str, overwrite: bool = False) -> str:
    """What will be written at `path`: ".mp4", ".webm", ".gif", ".safetensors" or "" for a folder of PNGs.

    Raises UsageError for another extension or an output that exists, VgenError for a folder that cannot be
    written to. Creates nothing, so that a dry run can ask.
    """
    text, path = str(path), Path(path)
    kind = "" if text.endswith(("/", os.sep)) or path.is_dir() else path.suffix.lower()
    if kind and kind not in KNOWN:
        raise UsageError(
            f"Nothing is known to write to '{text}': the extension is '{kind}'.",
            did_you_mean(kind, KNOWN) + " No extension makes a folder of PNGs.",
        )
    if kind and path.is_symlink() and not path.exists():
        raise UsageError(f"'{text}' is a link to nothing.", "Remove the link, or name another output.")
    if path.exists():
        if kind == "" and not path.is_dir():
            raise UsageError(f"'{text}' is a file, not a folder.", "Name another output, or one with an extension.")
        if kind == "" and not _only_ours(path):
            raise UsageError(f"The folder '{text}' holds other files than frames.", "Name another folder.")
        if not overwrite and (kind or any(path.iterdir())):
            raise UsageError(f"'{text}' exists.", "Give --overwrite to replace it, or name another output.")
    _check_writable(path)
    return kind


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, for a file or a folder; moved to `path` when the block ends well.

    Missing parent folders are made. What was written is on the disk before it takes the name, and after any failure the
    temporary is gone and what was at `path` is untouched. Raises VgenError where the disk refuses.
    """
    temporary = path.parent / f"{_MARK}{os.getpid()}-{secrets.token_hex(4)}{path.suffix.lower()}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        for file in sorted(temporary.iterdir()) if temporary.is_dir() else [temporary]:
            _sync(file)
        _move(temporary, path)
        _sync(path.parent)
    except OSError as error:
        raise _refused(path, error) from error
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def _move(temporary: Path, path: Path) -> None:
    """Give `temporary` its name. A folder cannot replace a full one: the old one steps aside, and back on failure."""
    if not temporary.is_dir() or not path.exists():
        temporary.replace(path)
        return
    aside = temporary.with_name(temporary.name + "-old")
    path.rename(aside)
    try:
        temporary.rename(path)
    except OSError:
        aside.rename(path)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _refused(path: Path, error: OSError) -> VgenError:
    """An error of the disk in words."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return VgenError(f"The disk is full: '{path}' could not be written.", "Free some space and run again.")
    if error.errno == errno.EFBIG:
        return VgenError(f"'{path}' is larger than a file may be here.", "Raise the limit (ulimit -f) and run again.")
    return VgenError(f"'{path}' could not be written: {error.strerror or error}.", "Name another output.")


def _only_ours(folder: Path) -> bool:
    """Whether a folder holds nothing but frames written before, so that replacing it loses nothing else."""
    return all(p.suffix == ".png" and p.stem.startswith("frame_") for p in folder.iterdir())


def _check_writable(path: Path) -> None:
    """Raises VgenError where the nearest folder above `path` that exists cannot be written to."""
    folder = path.absolute().parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise VgenError(f"'{path}' cannot be written: '{folder}' is not a folder.", "Name another output.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise VgenError(f"'{path}' cannot be written: no right to write in '{folder}'.", "Name another output.")


def _sync(path: Path) -> None:
    """Bring a file or a folder to the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folders
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
