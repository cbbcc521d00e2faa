"""The Hub's cache on the disk, read without the Hub's library: what is there, whether it is whole and unchanged.

Layout: models--owner--name/{blobs/<hash>, refs/<name>, snapshots/<commit>/<path> -> blob, trees/<commit>.json}.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SAFE = ("*/*.safetensors", "*.json", "*.txt", "*.model", "*.md")  # what is downloaded: nothing that can run code
COPIES = ("*.fp16.*", "*.bf16.*", "*.non_ema.*")  # the same weights once more, which are not
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Fault:
    """A file that is not what it should be."""

    path: str
    reason: str


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


def hashes(folder: Path) -> dict[str, str]:
    """What the files below a folder should hash to: "sha256:..." or "git:..." (the blob id of git), by path.

    From vgen.json, else from the Hub's listing of the commit, else from the names of the cached blobs.
    """
    told = read_json(folder / "vgen.json").get("files")
    if isinstance(told, Mapping):
        return {name: value if ":" in value else f"sha256:{value}" for name, value in told.items()}
    if not commit(folder):
        return {}
    found = {}
    for path in filter(Path.is_symlink, folder.rglob("*")):
        blob = path.readlink().name
        found[str(path.relative_to(folder))] = f"sha256:{blob}" if len(blob) == 64 else f"git:{blob}"
    tree = read_json(folder.parents[1] / "trees" / f"{folder.name}.json").get("files", {})
    present = {name: entry for name, entry in tree.items() if (folder / name).is_file()}
    for name, entry in present.items():
        sha = entry.get("lfs_sha256")
        found[name] = f"sha256:{sha}" if sha else f"git:{entry['blob_id']}"
    return found


def verify(folder: Path) -> tuple[int, list[Fault]]:
    """Hash every file whose hash is known. Returns how many were compared, and the faults."""
    faults = [Fault(name, "missing") for name in missing(folder)]
    known = hashes(folder)
    for name, told in sorted(known.items()):
        path = folder / name
        if not path.is_file():
            faults.append(Fault(name, "missing"))
        elif _hash(path, told) != told:
            faults.append(Fault(name, f"its content has changed: it should be {told[:23]}..."))
    return len(known), list(dict.fromkeys(faults))


def _hash(path: Path, told: str) -> str:
    kind = told.partition(":")[0]
    digest = hashlib.sha256() if kind == "sha256" else hashlib.sha1()
    if kind == "git":
        digest.update(f"blob {path.stat().st_size}\0".encode())
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return f"{kind}:{digest.hexdigest()}"
