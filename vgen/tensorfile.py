"""Named tensors and one JSON record in a safetensors file: written whole, checked when read, header without torch.

The layout is that of https://github.com/huggingface/safetensors: 8 bytes little-endian length, a JSON header,
the tensors. The record is the single metadata key "vgen", sorted compact JSON, so equal content gives equal bytes.
vgen adds `sha256` (of each tensor's bytes) and `check` (of the rest of the header) to it, so any flipped bit is seen.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from vgen.errors import VgenError
from vgen.files import explained, replacing

if TYPE_CHECKING:
    from torch import Tensor

MAX_HEADER = 100_000_000
MAX_DIMS = 16
CHUNK = 1 << 22
AGAIN = "Make or fetch the file again."
NAME = re.compile(r"(?!\.)[\w.\-]+(/(?!\.)[\w.\-]+)*", re.ASCII)
DTYPES = {  # of safetensors: name in torch, bytes
    "F64": ("float64", 8),
    "I64": ("int64", 8),
    "U64": ("uint64", 8),
    "F32": ("float32", 4),
    "I32": ("int32", 4),
    "U32": ("uint32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "I16": ("int16", 2),
    "U16": ("uint16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}


class Damaged(VgenError):
    """The file is there, but it is not whole or not what it says."""


@dataclass(frozen=True)
class Entry:
    """One tensor in a file. `begin` and `end` are bytes from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """What stands before the tensors. `record` is vgen's own, empty in a file that vgen did not write."""

    path: Path
    entries: dict[str, Entry]
    metadata: dict[str, str]
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def sha256(self) -> dict[str, str]:
        """The recorded hash of each tensor."""
        return self.record.get("sha256", {})


@dataclass(frozen=True)
class Source:
    """A tensor to write: `chunks()` gives its bytes, as often as it is called."""

    dtype: str
    shape: tuple[int, ...]
    chunks: Callable[[], Iterable[Any]]
    sha256: str


def dumps(value: Any) -> str:
    """Sorted compact JSON. Fractions become "num/den". Raises VgenError for what JSON cannot say."""

    def convert(item: Any) -> Any:
        if isinstance(item, Fraction):
            return f"{item.numerator}/{item.denominator}"
        raise TypeError(f"a {type(item).__name__} is not JSON")

    try:
        text = json.dumps(
            value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False, default=convert
        )
        text.encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise VgenError(f"The record of a file cannot be written: {error}.") from error
    return text


# Reading


def header(path: Path) -> Header:
    """The header of a safetensors file, checked against its size; the tensors are not read.

    Raises NoFile, Damaged for a file that is truncated, too long, hostile or no safetensors, and VgenError.
    """
    with explained(f"read {path}"), path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(0)
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(MAX_HEADER, size - 8):
            raise Damaged(f"{path} is not a whole safetensors file: its header does not fit.", AGAIN)
        raw = file.read(length)
    try:
        table = json.loads(raw.decode(), object_pairs_hook=_distinct)
        metadata = table.pop("__metadata__", {})
        entries = {name: _entry(told, 8 + length) for name, told in table.items()}
        _check_layout(entries, 8 + length, size)
        if not all(isinstance(text, str) for text in metadata.values()):
            raise ValueError("its metadata are not strings")
        record = json.loads(metadata.get("vgen", "{}"), object_pairs_hook=_distinct)
        if record and (record["check"] != _check(record, entries) or record["sha256"].keys() != entries.keys()):
            raise ValueError("its header is not the one that was written")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise Damaged(f"{path} is damaged or no safetensors file: {error}.", AGAIN) from error
    return Header(path, entries, metadata, record)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice in its header")
    return found


def _entry(told: dict[str, Any], start: int) -> Entry:
    dtype, shape, (begin, end) = told["dtype"], told["shape"], told["data_offsets"]
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}")
    if len(shape) > MAX_DIMS or any(type(n) is not int or n < 0 for n in (*shape, begin, end)):
        raise ValueError("a shape or an offset is not a count")
    if end - begin != math.prod(shape) * DTYPES[dtype][1]:
        raise ValueError("a tensor does not have the bytes that its shape needs")
    return Entry(dtype, tuple(shape), start + begin, start + end)


def _check_layout(entries: Mapping[str, Entry], start: int, size: int) -> None:
    """The tensors must cover the file from `start` to its end, without a gap or an overlap."""
    at = start
    for begin, end in sorted((e.begin, e.end) for e in entries.values()):
        if begin != at:
            raise ValueError("its tensors overlap or leave gaps")
        at = end
    if at != size:
        raise ValueError(f"it has {size} bytes where the header says {at}")


def _check(record: Mapping[str, Any], entries: Mapping[str, Entry | Source]) -> str:
    """The hash of a record and of the names, dtypes and shapes of the tensors."""
    told = {key: value for key, value in record.items() if key != "check"}
    table = {name: [e.dtype, list(e.shape)] for name, e in entries.items()}
    return hashlib.sha256(dumps([told, table]).encode()).hexdigest()


def chunks(head: Header, name: str) -> Iterator[bytes]:
    """The bytes of one tensor, a few MB at a time. Read, not mapped: a mapped file that shrinks kills the process."""
    entry = head.entries[name]
    with explained(f"read {head.path}"), head.path.open("rb") as file:
        yield from _span(file, entry, head.path)


def _span(file: BinaryIO, entry: Entry, path: Path) -> Iterator[bytes]:
    file.seek(entry.begin)
    left = entry.end - entry.begin
    while left:
        part = file.read(min(CHUNK, left))
        if not part:
            raise Damaged(f"{path} became shorter while it was read.", AGAIN)
        left -= len(part)
        yield part


def digest(parts: Iterable[Any]) -> str:
    """SHA-256 of bytes that come in parts."""
    sha = hashlib.sha256()
    for part in parts:
        sha.update(part)
    return sha.hexdigest()


def verify(head: Header, names: Iterable[str] | None = None) -> list[str]:
    """What is wrong with the tensors of a file: one line for each whose bytes do not have the recorded hash."""
    wanted = head.entries if names is None else names
    return [
        f"{head.path}: '{name}' is damaged (its bytes changed after they were written)"
        for name in wanted
        if digest(chunks(head, name)) != head.sha256.get(name)
    ]


def tensors(head: Header, names: Iterable[str] | None = None, *, check: bool = True) -> dict[str, Tensor]:
    """Tensors of a file, by name. With `check`, one whose bytes changed raises Damaged."""
    found = {}
    with explained(f"read {head.path}"), head.path.open("rb") as file:
        for name in head.entries if names is None else names:
            entry = head.entries[name]
            data = bytearray().join(_span(file, entry, head.path))
            if check and head.sha256 and hashlib.sha256(data).hexdigest() != head.sha256.get(name):
                raise Damaged(f"{head.path}: '{name}' is damaged: its bytes changed after they were written.", AGAIN)
            found[name] = _tensor(entry, data)
    return found


def _tensor(entry: Entry, data: bytearray) -> Tensor:
    import torch

    dtype = getattr(torch, DTYPES[entry.dtype][0])
    if not data:
        return torch.empty(entry.shape, dtype=dtype)
    return torch.frombuffer(data, dtype=torch.uint8).view(dtype).reshape(entry.shape)


# Writing


def source(tensor: Tensor) -> Source:
    """A tensor to write, as it is: nothing is cast. Raises VgenError for a dtype that safetensors does not have."""
    import torch

    names = {getattr(torch, name, None): key for key, (name, _) in DTYPES.items()}
    if tensor.dtype not in names or tensor.is_meta:
        raise VgenError(f"A {tensor.dtype} tensor on '{tensor.device}' cannot be written to safetensors.")
    data = tensor.detach().to("cpu", copy=False).contiguous().reshape(-1).view(torch.uint8).numpy().data
    return Source(names[tensor.dtype], tuple(tensor.shape), lambda: (data,), hashlib.sha256(data).hexdigest())


def copied(head: Header, name: str) -> Source:
    """A tensor to write that is copied from another vgen file, without torch."""
    entry = head.entries[name]
    return Source(entry.dtype, entry.shape, lambda: chunks(head, name), head.sha256[name])


def save(path: Path, sources: Mapping[str, Source], record: Mapping[str, Any]) -> None:
    """Write a file atomically. Equal content gives equal bytes. Raises VgenError, and Damaged for a damaged source."""
    wrong = [name for name in sources if not NAME.fullmatch(name)]
    if wrong:
        raise VgenError(f"{wrong[0]!r} cannot be the name of a tensor.", "Use letters, digits, '_', '-', '.' and '/'.")
    order = sorted(sources, key=lambda name: (-DTYPES[sources[name].dtype][1], name))
    told = {**record, "sha256": {name: sources[name].sha256 for name in order}}
    told["check"] = _check(json.loads(dumps(told)), sources)
    table: dict[str, Any] = {"__metadata__": {"vgen": dumps(told)}}
    at = 0
    for name in order:
        one = sources[name]
        end = at + math.prod(one.shape) * DTYPES[one.dtype][1]
        table[name] = {"dtype": one.dtype, "shape": list(one.shape), "data_offsets": [at, end]}
        at = end
    raw = dumps(table).encode()
    raw += b" " * (-len(raw) % 8)
    if len(raw) > MAX_HEADER:
        raise VgenError(f"Cannot write {path}: its header has {len(raw)} bytes, more than {MAX_HEADER}.")
    with replacing(path) as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for name in order:
            _copy(file, sources[name], name)


def _copy(file: BinaryIO, one: Source, name: str) -> None:
    sha = hashlib.sha256()
    for part in one.chunks():
        sha.update(part)
        file.write(part)
    if sha.hexdigest() != one.sha256:
        raise Damaged(f"'{name}' changed while it was written, or was damaged before.", "Make the file again.")


def save_tensors(path: Path, streams: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
    """Write tensors and a record of anything that JSON can say, atomically. Raises VgenError."""
    save(path, {name: source(tensor) for name, tensor in streams.items()}, record)


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `save_tensors` wrote, checked. Raises NoFile, Damaged, VgenError."""
    head = header(path)
    return tensors(head), {key: value for key, value in head.record.items() if key not in ("sha256", "check")}
