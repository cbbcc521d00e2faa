"""One tar that carries a checkpoint or an adapter to a machine without a network.

Inside: vgen-bundle.json (repository, commit, names of it, and size, hash and blob of each file), then the files as a
plain folder, which diffusers opens once it is unpacked. `unpack` puts them into the Hub's cache instead, so that vgen
and diffusers find them by the repository's name.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from vgen import cache, safety
from vgen.errors import UsageError, VgenError
from vgen.files import explained, make_folder, replacing

MANIFEST = "vgen-bundle.json"
FORMAT = "vgen-bundle/1"
LARGEST = 1 << 24  # bytes of the manifest
REPO = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)*", re.ASCII)
BLOB = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
SKIP = (".", "training", "data/")  # beginnings of names that are not carried


@dataclass(frozen=True)
class Bundle:
    """What a tar carries. `revisions` are the names (branches, tags) under which the commit is found."""

    repo: str
    commit: str
    revisions: tuple[str, ...]
    files: Mapping[str, Mapping[str, Any]]

    @property
    def reference(self) -> str:
        """The name by which vgen finds it after `unpack`."""
        return f"{self.repo}@{self.commit}"


def pack(folder: Path, tar: Path, repo: str, revisions: tuple[str, ...] = ("main",)) -> Bundle:
    """Write `folder`, a cached commit or any checkpoint, as `tar`, under the name `repo`. Equal content, equal bytes.

    A folder that is no commit gets one, made from its content. Raises VgenError for files that changed.
    """
    if not REPO.fullmatch(repo):
        raise UsageError(f"'{repo}' is not the name of a repository.", "Name it: --as owner/name.")
    known = cache.hashes(folder)
    blobs = cache.blobs(folder)
    paths = {name: folder / name for name in _names(folder)}
    files: dict[str, dict[str, Any]] = {}
    for name, path in paths.items():
        sha = cache.hash_as(path, "sha256:")
        told = [value for value in (known.get(name), blobs.get(name)) if value]
        if any(value != (sha if value.startswith("sha256:") else cache.hash_as(path, value)) for value in told):
            raise VgenError(
                f"{path} is damaged: its content is not what it should be.",
                "'vgen checkpoints verify' tells more, and whether fetching it again mends that.",
            )
        blob = blobs.get(name) or sha
        files[name] = {"size": path.stat().st_size, "sha256": sha, "blob": blob.partition(":")[2]}
    made = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:40]
    bundle = Bundle(repo, cache.commit(folder) or made, revisions, files)
    with replacing(tar) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as out:
        head = {"format": FORMAT, "repo": repo, "commit": bundle.commit, "revisions": list(revisions), "files": files}
        _add(out, MANIFEST, io.BytesIO(json.dumps(head, indent=1).encode()))
        for name, path in paths.items():
            with path.open("rb") as opened:
                _add(out, f"{_root(repo)}/{name}", opened)
    return bundle


def _names(folder: Path) -> list[str]:
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    names = [name for name in names if not name.startswith(SKIP) and "/." not in name]
    if strange := safety.odd(name for name in names if not name.endswith(".toml")):
        raise UsageError(f"{folder} holds {strange[0]}, which is not carried: only data that cannot run is.")
    return [name for name in names if not name.endswith(".toml")]


def _root(repo: str) -> str:
    return repo.replace("/", "--")


def _add(out: tarfile.TarFile, name: str, file: BinaryIO | io.BytesIO) -> None:
    """A member with nothing of this machine in it: no owner, no time."""
    told = tarfile.TarInfo(name)
    told.size = file.seek(0, os.SEEK_END)
    told.mode = 0o644
    file.seek(0)
    out.addfile(told, file)


def unpack(tar: Path) -> Bundle:
    """Put what a tar carries into the Hub's cache, every file compared with its hash; gives what it carried.

    Nothing is kept of a tar that is damaged, or holds anything but the files that it tells of. Raises VgenError.
    """
    with explained(f"read {tar}"), tar.open("rb") as file, _opened(tar, file) as members:
        bundle = _told(tar, next(members, None))
        make_folder(cache.hub())
        with tempfile.TemporaryDirectory(prefix=".vgen-import-", dir=cache.hub()) as temporary:
            place = Path(temporary)
            _extract(tar, members, bundle, place)
            safety.refuse_code(place, str(tar))
            _settle(bundle, place)
    return bundle


@contextmanager
def _opened(tar: Path, file: BinaryIO) -> Iterator[Iterator[tuple[tarfile.TarInfo, Any]]]:
    """The members of a tar, in order, each with its bytes."""

    def members() -> Iterator[tuple[tarfile.TarInfo, Any]]:
        for told in opened:
            if not told.isreg() or told.issparse():
                kind = "a link" if told.islnk() or told.issym() else "no ordinary file"
                raise _refused(tar, f"{told.name!r} is {kind}")
            yield told, opened.extractfile(told)

    try:
        with tarfile.open(fileobj=file, mode="r:") as opened:
            yield members()
    except tarfile.TarError as error:
        raise VgenError(f"{tar} is not a whole tar: {error}.", "Copy it again.") from error


def _refused(tar: Path, why: str) -> VgenError:
    return VgenError(f"{tar} is refused: {why}.", "Only tars of vgen checkpoints export are read. Nothing was kept.")


def _told(tar: Path, first: tuple[tarfile.TarInfo, Any] | None) -> Bundle:
    """The manifest, every word of it checked."""
    if first is None or first[0].name != MANIFEST or first[0].size > LARGEST:
        raise _refused(tar, f"it does not begin with {MANIFEST}")
    try:
        told = json.loads(first[1].read())
        bundle = Bundle(told["repo"], told["commit"], tuple(told["revisions"]), told["files"])
        good = told["format"] == FORMAT and REPO.fullmatch(bundle.repo) and cache.COMMIT.fullmatch(bundle.commit)
        good = good and all(NAME.fullmatch(one) for one in bundle.revisions)
        for one in bundle.files.values():
            good = good and BLOB.fullmatch(one["blob"]) and isinstance(one["size"], int)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _refused(tar, f"its {MANIFEST} cannot be read ({type(error).__name__})") from error
    if not good:
        raise _refused(tar, f"its {MANIFEST} is not of {FORMAT}")
    for name in filter(safety.escapes, bundle.files):
        raise _refused(tar, f"the path {name!r} leads out of its folder")
    for name in safety.odd(bundle.files):
        raise _refused(tar, f"{name} is not of a kind that only carries data")
    return bundle


def _extract(tar: Path, members: Iterator[tuple[tarfile.TarInfo, Any]], bundle: Bundle, place: Path) -> None:
    """The files into an empty folder, each compared with what the manifest tells."""
    left = dict(bundle.files)
    for info, source in members:
        name = info.name.removeprefix(f"{_root(bundle.repo)}/")
        told = left.pop(name, None)
        if told is None or name == info.name or info.size != told["size"]:
            raise _refused(tar, f"{info.name!r} is not what its {MANIFEST} tells of")
        path = place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            shutil.copyfileobj(source, file, 1 << 20)
            file.flush()
            os.fsync(file.fileno())
        kind = "sha256:" if len(told["blob"]) == 64 else "git:"
        if cache.hash_as(path, "sha256:") != told["sha256"] or cache.hash_as(path, kind) != kind + told["blob"]:
            raise VgenError(f"{tar} is damaged: {name} is not what it was.", "Copy it again. Nothing was kept.")
    if left:
        raise VgenError(f"{tar} is not whole: it lacks {next(iter(left))}.", "Copy it again. Nothing was kept.")


def _settle(bundle: Bundle, place: Path) -> None:
    """Move checked files to their places in the Hub's cache: blobs, the links of the commit, its listing, its names."""
    base = cache.hub() / f"models--{_root(bundle.repo)}"
    snapshot = base / "snapshots" / bundle.commit
    make_folder(base / "blobs")
    for name, told in bundle.files.items():
        (place / name).replace(base / "blobs" / told["blob"])
    for name, told in bundle.files.items():
        link = snapshot / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        _link(Path(*[".."] * (2 + name.count("/")), "blobs", told["blob"]), link)
    tree = {name: _entry(told) for name, told in bundle.files.items()}
    with replacing(base / "trees" / f"{bundle.commit}.json") as file:
        file.write(json.dumps({"format_version": 1, "files": tree}).encode())
    for one in bundle.revisions:
        with replacing(base / "refs" / one) as file:
            file.write(bundle.commit.encode())


def _entry(told: Mapping[str, Any]) -> dict[str, Any]:
    """A file in the Hub client's listing of a commit."""
    entry = {"size": told["size"], "blob_id": told["blob"]}
    if len(told["blob"]) == 64:
        entry |= {"lfs_sha256": told["blob"], "lfs_size": told["size"]}
    return entry


def _link(target: Path, link: Path) -> None:
    """A link into the blobs; a copy where the system makes no links."""
    try:
        link.symlink_to(target)
    except OSError:
        shutil.copyfile(link.parent / target, link)
