"""Where weights come from: data -> run -> checkpoint -> sample, as vgen.json and run records tell it.

vgen.json of a trained checkpoint holds `base` (reference, revision, hashes, and the base's own lineage), `data` (stores
and their hashes) and `run` (verb, steps, seed, id). A sample's record names the checkpoint by the hashes of its files.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from vgen import cache, record
from vgen.errors import VgenError

KEYS = ("base", "data", "run")


def weights(folder: Path) -> dict[str, str]:
    """The sha256 of each file of weights below a folder: as vgen.json or the Hub's listing tells it, else computed."""
    known = cache.hashes(folder)
    found = {}
    for path in sorted(folder.rglob("*.safetensors")):
        name = path.relative_to(folder).as_posix()
        told = known.get(name, "")
        if name.partition("/")[0] != "training":
            found[name] = told if told.startswith("sha256:") else record.hash_file(path)
    return found


def base(folder: Path, reference: str, files: Mapping[str, str] | None = None) -> dict[str, Any]:
    """What vgen.json says of the checkpoint that a run starts from, with that one's own lineage inside.

    `files` are its `weights` where they have been hashed already.
    """
    told = cache.read_json(folder / "vgen.json")
    commit = cache.commit(folder)
    known = {"reference": reference, "revision": commit, "license": str(told.get("license", ""))}
    inner = {key: told[key] for key in KEYS if key in told}
    return {**{k: v for k, v in known.items() if v}, "files": dict(files or weights(folder)), **inner}


def data(stores: Mapping[str, Iterable[str]]) -> list[dict[str, Any]]:
    """What vgen.json says of the data: each store's name, how many clips it held, and the hash of their keys.

    A key is the hash of a clip's content, its transform and its autoencoder.
    """
    found = []
    for name, keys in stores.items():
        every = sorted(keys)
        digest = hashlib.sha256("\n".join(every).encode()).hexdigest()
        found.append({"store": Path(name).name, "clips": len(every), "hash": f"sha256:{digest}"})
    return found


def run(verb: str, family: str, settings: Mapping[str, Any], **facts: Any) -> dict[str, Any]:
    """What vgen.json says of a run. Its id is the hash of what decides it: verb, family, settings and `facts`."""
    left = {k: v for k, v in settings.items() if k not in ("output", "overwrite", "resume", "device", "threads")}
    text = json.dumps([verb, family, left, facts], sort_keys=True, default=str)
    return {
        "id": hashlib.sha256(text.encode()).hexdigest()[:16],
        "verb": verb,
        "settings": {k: v for k, v in left.items() if k not in ("data", "checkpoint")},
    }


def identity(folder: Path) -> str:
    """One hash for all the weights of a folder, as "sha256:..."."""
    return _digest(weights(folder))


def _digest(files: Mapping[str, str]) -> str:
    return "sha256:" + hashlib.sha256(json.dumps(dict(files), sort_keys=True).encode()).hexdigest()


def chain(folder: Path, name: str) -> Iterator[str]:
    """The lineage of the weights in a folder, the newest first, one line each."""
    told = cache.read_json(folder / "vgen.json")
    yield f"{cache.kind(folder) or 'weights'} {name} ({_short(identity(folder))})"
    yield from _origins(told)


def _origins(told: Mapping[str, Any]) -> Iterator[str]:
    """What vgen.json tells of the run, its data and its base, and of theirs."""
    start, one = _table(told, "base"), _table(told, "run")
    if not start:
        return
    if one:
        steps = _table(one, "settings").get("max_train_steps")
        yield f"run {one.get('id', '')}: {one.get('verb', '')}" + (
            f", {steps} step{'s' * (steps != 1)}" if steps else ""
        )
    for one in tables(told, "data"):
        yield f"data {one.get('store', '')}: {one.get('clips', 0)} clips ({_short(str(one.get('hash', '')))})"
    yield f"base {start.get('reference', '')} ({_short(_digest(_table(start, 'files')))})"
    yield from _origins(start)


def _table(told: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A table in a table that someone else may have written; empty where it is none."""
    found = told.get(key)
    return found if isinstance(found, Mapping) else {}


def tables(told: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    """A list of tables in such a table."""
    found = told.get(key)
    return [one for one in found if isinstance(one, Mapping)] if isinstance(found, list) else []


def _short(told: str) -> str:
    return told[: len("sha256:") + 12]


def sample(path: Path) -> dict[str, Any]:
    """The record beside a clip or a picture, or the record itself. Raises VgenError."""
    beside = path if path.suffix == ".toml" else record.beside(path)
    try:
        told = tomllib.loads(beside.read_text(encoding="utf-8"))["record"]
        kept = {key: told[key] for key in ("verb", "started", "checkpoint")}
        return {"path": str(path), **kept, "adapters": dict(_table(told, "adapters"))}
    except (OSError, ValueError, KeyError) as error:
        raise VgenError(
            f"{path} has no record beside it ({beside}).",
            "Only what vgen made has a lineage: NAME.toml lies beside it.",
        ) from error


def sample_chain(told: Mapping[str, Any]) -> Iterator[str]:
    """The lineage of a sample: adapters and checkpoint by hash and, where that one is on this disk, all before it."""
    one = told["checkpoint"]
    files, folder = dict(one.get("files", {})), Path(one.get("folder") or "?")
    yield f"sample {told['path']} ({told['verb']}, {told['started']})"
    for name, value in told["adapters"].items():
        yield f"adapter {name} ({_short(str(value))})"
    if folder.is_dir() and weights(folder) == files:
        yield from chain(folder, str(one["reference"]))
    else:
        yield f"checkpoint {one['reference']} ({_short(_digest(files))}), which is not at {folder} any more"
