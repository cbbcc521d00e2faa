"""Adapters by reference: PATH[:SCALE] to a file on the disk, without torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from vgen import record, registry
from vgen.errors import UsageError, VgenError

NAMES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")  # diffusers' and vgen's, peft's
GRAMMAR = "An adapter is a folder with one, a .safetensors file, or owner/repo[@revision][:subfolder]; then :SCALE."


@dataclass(frozen=True)
class Source:
    """An adapter on the disk. `reference` repeats the choice, with the commit of a repository."""

    reference: str
    path: Path
    scale: float

    @property
    def spec(self) -> str:
        """What --lora takes to mean the same again."""
        return self.reference if self.scale == 1 else f"{self.reference}:{self.scale:g}"

    def sha256(self) -> str:
        """The hash of the file's bytes, as "sha256:..."."""
        return record.hash_file(self.path)


def split(spec: str) -> tuple[str, float]:
    """Reference and scale of PATH[:SCALE]. Raises UsageError."""
    reference, colon, tail = spec.rpartition(":")
    try:
        scale = float(tail)
    except ValueError:
        return spec, 1.0
    if not colon or Path(spec).exists():
        return spec, 1.0
    if not math.isfinite(scale):
        raise UsageError(f"--lora {spec}: {tail} is no scale.", "Give a number: 0 is none of it, 1 all of it.")
    return reference, scale


def check(spec: str) -> None:
    """Refuse what cannot name an adapter, without a network: a path that is not there. Raises UsageError, VgenError."""
    reference, _ = split(spec)
    if _here(reference) is None:
        registry.named(reference)


def locate(spec: str) -> Source:
    """The adapter that PATH[:SCALE] means, downloaded where it is on the Hub. Raises UsageError, VgenError."""
    reference, scale = split(spec)
    path = _here(reference)
    if path is not None:
        return Source(reference, path, scale)
    found = registry.ready(registry.named(reference))
    assert found.folder is not None
    return Source(found.reference, _within(found.folder), scale)


def _here(reference: str) -> Path | None:
    """The file of an adapter on this disk; None for what may be on the Hub. Raises UsageError, VgenError."""
    path = Path(reference).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        return _within(path)
    if path.suffix == ".safetensors" or reference.startswith((".", "/", "~")) or "/" not in reference.rstrip("/"):
        raise UsageError(f"--lora {reference}: there is no such file or folder.", GRAMMAR)
    return None


def _within(folder: Path) -> Path:
    """The adapter's file in a folder: one of the usual names, or the only one there. Raises VgenError."""
    for name in NAMES:
        if (folder / name).is_file():
            return folder / name
    others = sorted(folder.glob("*.safetensors"))
    if len(others) == 1 and not (folder / "model_index.json").exists():
        return others[0]
    names = ", ".join(path.name for path in others) or "no .safetensors file"
    raise VgenError(f"{folder} is no adapter: it holds {names}, not {NAMES[0]}.", "Name the file itself.")
