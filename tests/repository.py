"""What the Hub of the tests holds: repositories, their commits, names and tags; contents here or in a store of Xet."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml


@dataclass(frozen=True)
class Pointer:
    """A content that lies in a store of Xet, not here."""

    sha256: str
    size: int


def git(data: bytes | Pointer) -> str:
    """The blob id that git gives to a content, or to the text that points to it."""
    if isinstance(data, Pointer):
        data = f"oid sha256:{data.sha256}\nsize {data.size}\n".encode()
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


def sha256(data: bytes | Pointer) -> str:
    """The sha256 of a content."""
    return data.sha256 if isinstance(data, Pointer) else hashlib.sha256(data).hexdigest()


@dataclass
class Repo:
    """One repository: its commits as whole trees, and the names that point to them."""

    private: bool = False
    gated: bool = False
    trees: dict[str, dict[str, bytes | Pointer]] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)  # branches, and pull requests as refs/pr/1
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, files: Mapping[str, bytes], branch: str = "main") -> str:
        """Put a tree on a branch; gives its commit."""
        told = json.dumps([branch, self.names.get(branch), {n: git(d) for n, d in files.items()}], sort_keys=True)
        sha = hashlib.sha1(told.encode()).hexdigest()
        self.trees[sha] = dict(files)
        self.names[branch] = sha
        return sha

    def at(self, revision: str) -> str | None:
        """The commit of a branch, a tag or a commit."""
        found = self.names.get(revision) or self.tags.get(revision) or revision
        return found if found in self.trees else None

    def card(self) -> dict[str, Any]:
        """The header of README.md on main."""
        text = self.trees[self.names["main"]].get("README.md", b"").decode()
        return yaml.safe_load(text.split("---")[1]) if text.startswith("---") else {}

    def all_tags(self) -> set[str]:
        """What `filter` of the list of models looks in."""
        told = self.card()
        base, relation = told.get("base_model"), told.get("base_model_relation")
        found = {*told.get("tags", []), f"license:{told.get('license')}", told.get("library_name")}
        return found | ({f"base_model:{base}", f"base_model:{relation}:{base}"} if base else set())


def shard_files(data: bytes) -> dict[str, str]:
    """Hashes of Xet by sha256 in a shard: records of 48 bytes, a file's header, its segments, its sha256."""
    found, at = {}, 48  # after the head
    while data[at : at + 32] != b"\xff" * 32:
        flags, count = struct.unpack_from("<II", data, at + 32)
        after = at + 48 * (1 + count * (2 if flags >> 31 else 1))
        if flags >> 30 & 1:
            found[_words(data[after : after + 32])] = _words(data[at : at + 32])
            after += 48
        at = after
    return found


def _words(data: bytes) -> str:
    """The text of a hash that is stored as four little-endian numbers."""
    return "".join(data[i : i + 8][::-1].hex() for i in range(0, 32, 8))
