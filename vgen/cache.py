"""The Hub's cache on the disk, read without the Hub's library: what is there, whether it is whole and unchanged.

Layout: models--owner--name/{blobs/<hash>, refs/<name>, snapshots/<commit>/<path> -> blob, trees/<commit>.json}.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vgen.errors import VgenError
from vgen.files import cache_folder, replacing

ADAPTER = "pytorch_lora_weights.safetensors"
# What is downloaded: nothing that can run code
SAFE = ("*/*.safetensors", ADAPTER, "*.json", "*.txt", "*.model", "*.md", "LICENSE", "NOTICE")
COPIES = ("*.fp16.*", "*.bf16.*", "*.non_ema.*")  # the same weights once more, which are not
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Fault:
    """A file that is not what it should be; `damaged` unless only vgen.json says so, and the Hub holds these bytes."""

    path: str
    reason: str
    damaged: bool = True


def home() -> Path:
    """Where Hugging Face keeps its files: HF_HOME, or ~/.cache/huggingface."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("HF_HOME") or base / "huggingface").expanduser()


def hub() -> Path:
    """Where the Hub's repositories are cached: HF_HUB_CACHE, or hub/ in `home`."""
    return Path(os.environ.get("HF_HUB_CACHE") or home() / "hub").expanduser()


def snapshot(repo: str, revision: str = "main") -> Path | None:
    """The folder of a cached revision (branch, tag or commit), whether whole or not; None if there is none."""
    base = hub() / f"models--{repo.replace('/', '--')}"
    ref = base / "refs" / revision
    commit = ref.read_text().strip() if ref.is_file() else revision
    folder = base / "snapshots" / commit
    return folder if COMMIT.fullmatch(commit) and folder.is_dir() else None


def snapshots() -> Iterator[tuple[str, Path]]:
    """Every cached revision of every model: its repository and its folder."""
    for folder in sorted(hub().glob("models--*/snapshots/*")):
        yield folder.parents[1].name.removeprefix("models--").replace("--", "/", 1), folder


def commit(folder: Path) -> str:
    """The commit of a snapshot folder, or nothing for any other folder."""
    return folder.name if folder.parent.name == "snapshots" and COMMIT.fullmatch(folder.name) else ""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; empty if the file is absent or is none."""
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return read if isinstance(read, dict) else {}


def missing(folder: Path) -> list[str]:
    """What a folder in diffusers' layout lacks: model_index.json, a component, a shard, a linked file."""
    lacks = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_symlink() and not path.exists()]
    if not (folder / "model_index.json").is_file():
        return [*lacks, "model_index.json"]
    index = read_json(folder / "model_index.json")
    parts = [k for k, v in index.items() if isinstance(v, list) and len(v) == 2 and all(v)]
    lacks += [f"{name}/" for name in parts if not _filled(folder / name)]
    for path in folder.glob("*/*.safetensors.index.json"):
        shards = set(read_json(path).get("weight_map", {}).values())
        lacks += [f"{path.parent.name}/{name}" for name in sorted(shards) if not (path.parent / name).exists()]
    return lacks


def _filled(folder: Path) -> bool:
    """Whether a component is there: it has files, and weights if it has a network's configuration."""
    if not folder.is_dir() or not any(folder.iterdir()):
        return False
    return not (folder / "config.json").exists() or any(folder.glob("*.safetensors"))


def pickles(folder: Path) -> list[str]:
    """Pickled weights in components that have no safetensors."""
    found = [p for p in folder.rglob("*") if p.suffix in PICKLES]
    return sorted(str(p.relative_to(folder)) for p in found if not any(p.parent.glob("*.safetensors")))


def size(folder: Path) -> int:
    """Bytes of all files below a folder; linked files count."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def kind(folder: Path) -> Literal["checkpoint", "adapter", ""]:
    """What a folder holds, by its files: a checkpoint in diffusers' layout, a LoRA adapter, or neither."""
    if (folder / "model_index.json").is_file():
        return "checkpoint"
    return "adapter" if (folder / ADAPTER).is_file() else ""


def manifest(folder: Path) -> dict[str, str]:
    """The hashes that vgen.json tells of the files beside it: "sha256:...", by path."""
    told = read_json(folder / "vgen.json").get("files")
    pairs = told.items() if isinstance(told, Mapping) else ()
    return {str(name): str(value) if ":" in str(value) else f"sha256:{value}" for name, value in pairs}


def listing(folder: Path) -> dict[str, str]:
    """The hashes that the Hub told of all files of a cached commit, whether they are here or not; else nothing."""
    if not commit(folder):
        return {}
    tree = read_json(folder.parents[1] / "trees" / f"{folder.name}.json").get("files", {})
    pairs = ((name, entry.get("lfs_sha256"), entry.get("blob_id")) for name, entry in tree.items())
    return {name: f"sha256:{sha}" if sha else f"git:{blob}" for name, sha, blob in pairs}


def hashes(folder: Path) -> dict[str, str]:
    """What the files below a folder should hash to: "sha256:..." or "git:..." (the blob id of git), by path.

    From vgen.json, else from the Hub's listing of the commit, else from the names of the cached blobs.
    """
    return {**blobs(folder), **manifest(folder)}


def blobs(folder: Path) -> dict[str, str]:
    """The hashes of a cached commit's files, by the Hub's listing or the names of the blobs that they link to."""
    if not commit(folder):
        return {}
    found = {}
    for path in filter(Path.is_symlink, folder.rglob("*")):
        blob = path.readlink().name
        found[str(path.relative_to(folder))] = f"sha256:{blob}" if len(blob) == 64 else f"git:{blob}"
    return found | {name: told for name, told in listing(folder).items() if (folder / name).is_file()}


def verify(folder: Path) -> tuple[int, list[Fault]]:
    """Hash every file whose hash is known, by both vgen.json and the Hub. Returns how many files, and the faults."""
    lacks = missing(folder) if kind(folder) != "adapter" else []
    told = {(name, value) for known in (manifest(folder), blobs(folder)) for name, value in known.items()}
    faults = [Fault(name, "missing") for name in lacks] + _compare(folder, told)
    return len({name for name, _ in told}), list(dict.fromkeys(faults))


def _compare(folder: Path, told: set[tuple[str, str]]) -> list[Fault]:
    faults, known = [], blobs(folder)
    for name, value in sorted(told):
        path, held = folder / name, known.get(name, value)
        if not path.is_file():
            faults.append(Fault(name, "missing"))
        elif hash_as(path, value) != value:
            if held != value and hash_as(path, held) == held:
                faults.append(Fault(name, f"vgen.json tells {value[:23]}..., the Hub {held[:23]}...", damaged=False))
            else:
                faults.append(Fault(name, f"its content has changed: it should be {value[:23]}..."))
    return faults


def hash_as(path: Path, told: str) -> str:
    """The hash of a file, of the kind of `told`: "sha256:..." or "git:..."."""
    name = told.partition(":")[0]
    digest = hashlib.sha256() if name == "sha256" else hashlib.sha1()
    if name == "git":
        digest.update(f"blob {path.stat().st_size}\0".encode())
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return f"{name}:{digest.hexdigest()}"


def unchecked(folder: Path) -> set[tuple[str, str]]:
    """Files of a cached commit, with their hashes, that were never compared or have changed since. Instant."""
    seen = read_json(_notes(folder))
    told = {(n, v) for known in (manifest(folder), blobs(folder)) for n, v in known.items() if (folder / n).is_file()}
    return {(name, value) for name, value in told if value not in seen.get(name, {}).get(_stamp(folder / name), ())}


def check(folder: Path) -> list[Fault]:
    """Compare the files that are `unchecked` with their hashes, once; the Hub's client compares sizes only."""
    new = unchecked(folder)
    faults = _compare(folder, new)
    wrong = {fault.path for fault in faults}
    seen = read_json(_notes(folder))
    for name, value in sorted(new):
        if name not in wrong:
            stamp = _stamp(folder / name)
            seen[name] = {stamp: sorted({value, *seen.get(name, {}).get(stamp, ())})}
    if new:
        with suppress(VgenError), replacing(_notes(folder)) as file:  # what cannot be noted is checked again
            file.write(json.dumps(seen).encode())
    return faults


def _stamp(path: Path) -> str:
    told = path.stat()
    return f"{told.st_size} {told.st_mtime_ns}"


def _notes(folder: Path) -> Path:
    """Where it is noted which files of a folder have been compared."""
    name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:32]
    return cache_folder() / "checked" / f"{name}.json"
