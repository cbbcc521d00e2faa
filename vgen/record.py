"""Run records: what was run, with which weights and on what, as TOML that repeats the run when given to --config."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from fractions import Fraction
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from vgen import __version__
from vgen.files import replacing
from vgen.options import declared

PACKAGES = (
    "torch",
    "diffusers",
    "transformers",
    "peft",
    "accelerate",
    "safetensors",
    "huggingface-hub",
    "bitsandbytes",
    "av",
    "decord",
    "numpy",
)


@dataclass
class Run:
    """One run, from its start to its record. `checkpoint` says which weights ran, `facts` what else is known early."""

    verb: str
    family: str
    options: Mapping[str, Any]
    checkpoint: Mapping[str, Any]
    command: list[str] = field(default_factory=lambda: ["vgen", *sys.argv[1:]])
    started: datetime = field(default_factory=lambda: datetime.now(UTC))
    clock: float = field(default_factory=time.monotonic)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """Wall time since the start."""
        return round(time.monotonic() - self.clock, 3)

    def table(self, **facts: Any) -> dict[str, Any]:
        """The record: options at the top level, so that it is a settings file, and the rest under [record]."""
        told = {
            "vgen": __version__,
            "command": self.command,
            "verb": self.verb,
            "family": self.family,
            "started": self.started.isoformat(timespec="seconds"),
            "ended": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": self.seconds,
            "peak_memory_mib": peak_memory(),
            **self.facts,
            **facts,
            "checkpoint": dict(self.checkpoint),
            "versions": versions(),
        }
        return {**self.options, "record": told}

    def write(self, output: Path, **facts: Any) -> Path:
        """Write the record beside `output`, whole or not at all. Raises VgenError.

        `facts` join the [record] table: device="cpu", inputs=hash_files([...]), ...
        """
        path = beside(output)
        with replacing(path) as file:
            file.write(dumps(self.table(**facts)).encode())
        return path


def plain(options: object) -> dict[str, Any]:
    """Options as a table of plain values; open ones (None) are left out."""
    table = {f.name: getattr(options, f.name) for f in declared(options)}
    return {k: str(v) if isinstance(v, (Path, Fraction)) else v for k, v in table.items() if v is not None}


def beside(output: Path) -> Path:
    """Where the record of an output lies: clip.mp4.toml beside a file, run.toml inside a folder."""
    return output / "run.toml" if output.is_dir() else output.with_name(output.name + ".toml")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide the numbers; absent ones are left out."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def peak_memory() -> dict[str, int]:
    """Largest memory of the process, and of each CUDA device it used, in MiB."""
    peak: dict[str, int] = {}
    if os.name == "posix":
        import resource

        unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
        peak["host"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit >> 20
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        for index in range(torch.cuda.device_count()):
            peak[f"cuda:{index}"] = torch.cuda.max_memory_allocated(index) >> 20
    return peak


def hash_file(path: Path) -> str:
    """The sha256 of a file's bytes, as "sha256:..."."""
    with path.open("rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


def hash_files(paths: Iterable[Path]) -> dict[str, str]:
    """The sha256 of each file, by its path."""
    return {str(path): hash_file(path) for path in paths}


def dumps(table: Mapping[str, Any]) -> str:
    """A table as TOML: text, numbers, booleans, paths, lists and tables. None is left out. Raises TypeError."""
    return "\n".join(_lines(table, ())).lstrip("\n") + "\n"


def _lines(table: Mapping[str, Any], path: tuple[str, ...]) -> list[str]:
    present = {k: v for k, v in table.items() if v is not None}
    lines = [f"{_key(k)} = {_value(v)}" for k, v in present.items() if not isinstance(v, Mapping)]
    for name, inner in present.items():
        if isinstance(inner, Mapping):
            here = (*path, name)
            lines += ["", f"[{'.'.join(map(_key, here))}]", *_lines(inner, here)]
    return lines


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _text(name)


def _text(text: str) -> str:
    # JSON's escapes are TOML's, except that TOML also wants DEL escaped; lone surrogates exist in neither
    clean = text.encode("utf-8", "replace").decode("utf-8")
    return json.dumps(clean, ensure_ascii=False).replace("\x7f", "\\u007f")


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, (str, Path)):
        return _text(str(value))
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_value(item) for item in value if item is not None) + "]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_key(k)} = {_value(v)}" for k, v in value.items() if v is not None) + "}"
    raise TypeError(f"TOML has no {type(value).__name__}")
