"""A folder that one run at a time may write to."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from vgen.cache import read_json
from vgen.errors import UsageError
from vgen.files import delete, explained, make_folder, replacing

LOCK, HOLDER = "run.lock", "running.json"


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Be the only run that writes to `folder`, which is made, and goes again if nothing was written to it.

    The operating system lets go of the lock of a process that died, so that it blocks nobody. Raises UsageError that
    names the other run.
    """
    made = [path for path in (folder, folder.parent) if not path.exists()]
    lock = FileLock(folder / LOCK, timeout=0)
    with explained(f"lock {folder}"):
        make_folder(folder)
        try:
            lock.acquire()
        except Timeout:
            raise UsageError(
                f"{folder.parent} is being written by another run{_who(folder)}.",
                "Wait for it or stop it, or choose another folder with -o.",
            ) from None
    try:
        told = {"pid": os.getpid(), "host": platform.node(), "since": datetime.now(UTC).isoformat(timespec="seconds")}
        with replacing(folder / HOLDER) as file:
            file.write(json.dumps(told).encode())
        yield
    finally:
        delete(folder / HOLDER)
        with suppress(OSError):  # Windows does not remove a file that is open
            (folder / LOCK).unlink()
        lock.release()
        with suppress(OSError):  # they are not empty
            for path in made:
                path.rmdir()


def _who(folder: Path) -> str:
    told = read_json(folder / HOLDER)
    return f" (process {told['pid']} on {told['host']}, since {told['since']})" if len(told) == 3 else ""
