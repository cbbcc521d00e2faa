"""Files that appear whole or not at all, and folders that one process changes at a time."""

from __future__ import annotations

import errno
import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from vgen.errors import VgenError

if sys.platform != "win32":
    import fcntl

TEMPORARY = ".vgen-*.tmp"
FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}


class NoFile(VgenError):
    """The file is not there."""


def cache_folder() -> Path:
    """Where vgen keeps what it can compute again: $VGEN_HOME/cache, else ~/.cache/vgen."""
    home = os.environ.get("VGEN_HOME")
    return Path(home) / "cache" if home else Path.home() / ".cache" / "vgen"


@contextmanager
def explained(act: str) -> Iterator[None]:
    """Turn an OSError of the body into a VgenError: NoFile where a file is missing."""
    try:
        yield
    except FileNotFoundError as error:
        raise NoFile(f"Cannot {act}: there is no such file.", "Check the path.") from error
    except OSError as error:
        do = "Check the path and your rights to it."
        if error.errno in FULL:
            do = "Free some space, or choose a folder on another disk. What was there before is unchanged."
        raise VgenError(f"Cannot {act}: {error.strerror or error}.", do) from error


@contextmanager
def replacing(path: Path, *, keep: bool = False) -> Iterator[BinaryIO]:
    """A file to write into that becomes `path` when the body ends, and vanishes when the body fails.

    It is durable (fsync of file and folder) and has the mode that the umask asks for. With `keep` a `path`
    that exists already stays as it is. Raises VgenError, for a full disk too; the old file is then unchanged.
    """
    with explained(f"write {path}"):
        make_folder(path.parent)
        temp, file = _temporary(path.parent)
        try:
            with file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            if keep:
                _link(temp, path)
            else:
                temp.replace(path)
        finally:
            temp.unlink(missing_ok=True)
        sync_folder(path.parent)


def _link(temp: Path, path: Path) -> None:
    """Give `temp` the name `path` unless that is taken."""
    try:
        os.link(temp, path)
    except FileExistsError:
        return
    except OSError:  # a file system without hard links
        if not path.exists():
            temp.replace(path)


def _temporary(folder: Path) -> tuple[Path, BinaryIO]:
    """A new file, locked for as long as its writer lives: by that lock `sweep` tells the living from the dead."""
    while True:
        temp = folder / TEMPORARY.replace("*", secrets.token_hex(8))
        file = os.fdopen(os.open(temp, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666), "wb")
        _lock(file)
        if temp.exists():  # else a sweep came between the creation and the lock
            return temp, file
        file.close()


def delete(path: Path) -> None:
    """Remove a file that may be gone already. Raises VgenError."""
    with explained(f"remove {path}"):
        path.unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """Make a folder and its parents, durably."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable. Windows has no such call."""
    if sys.platform != "win32":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _lock(file: BinaryIO, wait: bool = False) -> bool:
    """Whether the lock was got. Without `wait`, no also where the file system has no locks.

    Windows refuses to delete an open file, which protects temporary files as well.
    """
    if sys.platform == "win32":
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True


def sweep(folder: Path) -> list[Path]:
    """Remove the temporary files that killed writers left below a folder; those of living writers stay."""
    removed = []
    for temp in sorted(folder.rglob(TEMPORARY)):
        try:
            with temp.open("r+b") as file:
                if not _lock(file):
                    continue
                temp.unlink()
        except (FileNotFoundError, PermissionError):
            continue  # its writer finished, or it is another user's
        removed.append(temp)
    return removed


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Wait until no other process is in `alone` with this folder. Raises VgenError where there are no locks."""
    with explained(f"lock {folder}"):
        file = (folder / ".lock").open("ab")
    with file:
        if not _lock(file, wait=True):
            raise VgenError(
                f"The file system of {folder} has no file locks (flock).",
                "Do this on a local disk, or have the file system mounted with locks.",
            )
        yield
