"""Where a result may be written, and how it gets there whole or not at all. No torch, so that a dry run can ask."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vgen.errors import UsageError, VgenError, did_you_mean
from vgen.files import explained, make_folder, sync_folder

VIDEOS = (".mp4", ".webm", ".gif")
PICTURE = ".png"
LATENTS = ".safetensors"
KNOWN = (*VIDEOS, PICTURE, LATENTS)
_MARK = ".vgen-"  # temporary names begin with it; hidden, so that a folder of clips is not read with one in it


def check_output(path: Path | str, overwrite: bool = False) -> str:
    """What will be written at `path`: ".mp4", ".webm", ".gif", ".png", ".safetensors" or "" for a folder of PNGs.

    Raises UsageError for another extension or an output that exists, VgenError for a folder that cannot be
    written to. Creates nothing.
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


def check_frames(path: Path, num_frames: int) -> None:
    """Refuse a clip where one picture goes. Raises UsageError."""
    if num_frames > 1 and path.suffix.lower() == PICTURE:
        raise UsageError(
            f"'{path}' is one picture, and there are more frames.",
            "Name a video, or a folder (no extension) for a picture of each frame.",
        )


def spread(path: Path, count: int) -> list[Path]:
    """The outputs of `count` clips: `path` for one, else NAME-0, NAME-1 ... beside it."""
    if count == 1:
        return [path]
    width = len(str(count - 1))
    return [path.with_name(f"{path.stem}-{k:0{width}d}{path.suffix}") for k in range(count)]


def sheet_of(path: Path) -> Path:
    """Where the contact sheet of an output goes."""
    return path.with_name(f"{path.stem}.sheet.png")


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, for a file or a folder; moved to `path` when the body ends well.

    For what needs a name while it is written; `files.replacing` is for the rest. Parent folders are made. What was
    written is on the disk before it takes the name; after a failure the temporary is gone and what was at `path` is
    untouched. Raises VgenError where the disk refuses.
    """
    temporary = path.parent / f"{_MARK}{secrets.token_hex(8)}{path.suffix.lower()}"
    with explained(f"write {path}"):
        try:
            make_folder(path.parent)
            yield temporary
            for file in sorted(temporary.iterdir()) if temporary.is_dir() else [temporary]:
                _sync(file)
            _move(temporary, path)
            sync_folder(path.parent)
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
    """Bring a file to the disk."""
    with path.open("r+b") as file:
        os.fsync(file.fileno())
