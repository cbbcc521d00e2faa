"""Captions of clips: NAME.txt beside a clip, one CSV or JSONL file for many, or the manifest of a curated set."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from vgen.errors import UsageError, VgenError

NOT_FACTS = ("source", "sha256", "start_frame", "end_frame", "captions", "caption_probs", "decision", "reasons")


class Kept(NamedTuple):
    """A clip of a manifest: its file as it was named, its first frame and its end, captions, and all else it tells.

    `facts["caption_probs"]` are the shares of the captions, in their order.
    """

    source: str
    frames: tuple[int, int]
    captions: tuple[str, ...]
    facts: Mapping[str, Any]


def beside(path: Path) -> tuple[str, ...]:
    """The lines of NAME.txt beside a clip."""
    text = path.with_suffix(".txt")
    if text == path or not text.is_file():
        return ()
    return tuple(line.strip() for line in _text(text).splitlines() if line.strip())


def _text(path: Path) -> str:
    """A text file in UTF-8, with or without a mark. Raises VgenError."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise VgenError(f"'{path}' is not text in UTF-8 (byte {error.start}).", "Save it as UTF-8.") from error
    except OSError as error:
        raise VgenError(f"'{path}' cannot be read: {error.strerror}.", "Check the path and your rights.") from error


def read_captions(path: Path, folders: Iterable[Path]) -> dict[Path, tuple[str, ...]]:
    """Captions by resolved file, from rows with `file` and `caption`; several rows of a file are several captions.

    Names are looked for beside `path`, in the input `folders`, and where we are. Raises UsageError that names the line
    of a row without one of the two or with a file that is not there.
    """
    readers: dict[str, Callable[[str, Path], Iterator[tuple[int, Any]]]] = {".csv": _csv_rows, ".jsonl": _json_rows}
    if path.suffix.lower() not in readers:
        raise UsageError(f"Captions are read from .csv and .jsonl, not from '{path}'.")
    places = [path.parent, *folders, Path()]
    told: dict[Path, list[str]] = {}
    for line, row in readers[path.suffix.lower()](_text(path), path):
        name, caption = (row.get("file"), row.get("caption")) if isinstance(row, dict) else (None, None)
        if not isinstance(name, str) or not isinstance(caption, str) or not name or not caption.strip():
            raise UsageError(f"{path}, line {line}: 'file' and 'caption' are needed, and both are text.")
        file = next((place / name for place in places if (place / name).is_file()), None)
        if file is None:
            raise UsageError(f"{path}, line {line}: there is no file '{name}'.", f"Looked in {path.parent} and inputs.")
        told.setdefault(file.resolve(), []).append(caption.strip())
    return {file: tuple(texts) for file, texts in told.items()}


def kept(path: Path) -> Iterator[Kept]:
    """The clips that a manifest of `vgen curate` keeps. Raises UsageError that names the line of what is none."""
    for number, row in _json_rows(_text(path), path):
        try:
            texts = {name: text for name, text in row["captions"].items() if text}
            shares = [float(row["caption_probs"][name]) for name in texts]
            facts = {key: value for key, value in row.items() if key not in NOT_FACTS} | {"caption_probs": shares}
            one = Kept(str(row["source"]), (row["start_frame"], row["end_frame"]), tuple(texts.values()), facts)
            wanted = row["decision"] == "keep"
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise UsageError(
                f"{path}, line {number}: this is no clip of a manifest ({type(error).__name__}: {error}).",
                "Manifests are made by vgen curate. A file with 'file' and 'caption' is for --captions.",
            ) from error
        if wanted:
            yield one


def _csv_rows(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    """Rows of a CSV file with a header line, and the lines on which they end."""
    reader = csv.DictReader(text.splitlines(keepends=True))
    if not {"file", "caption"} <= set(reader.fieldnames or ()):
        raise UsageError(f"{path}: the first line has to name the columns 'file' and 'caption'.")
    for row in reader:
        yield reader.line_num, row


def _json_rows(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    """Objects of a JSONL file and their lines."""
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except ValueError as error:
                raise UsageError(f"{path}, line {number}: this is not JSON ({error}).") from error
