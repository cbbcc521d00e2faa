"""Publishing: a staged folder, a self-check, one commit on the expected parent, hashes compared, a tag that stays."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from vgen import cache, hub, modelcard, safety, tensorfile
from vgen.errors import UsageError, VgenError
from vgen.files import explained

LEFT_OUT = ("training", "data", ".cache", ".git", ".lock")  # and every name that begins with a dot
RECORDS = (".toml",)  # run records hold paths of this machine
OURS = ("README.md", "vgen.json")
REMOTE = (".gitattributes",)  # files that the Hub keeps by itself


@dataclass(frozen=True)
class Staged:
    """A folder that is ready to be published: its files and their hashes, as "sha256:..."."""

    folder: Path
    kind: str
    manifest: dict[str, Any]
    files: dict[str, str]
    written_card: bool


@dataclass(frozen=True)
class Target:
    """Where and how to publish. `parent` is the commit that the branch must be at, when given."""

    repo: str
    revision: str = "main"
    tag: str = ""
    parent: str = ""
    message: str = ""
    private: bool = False
    create_pr: bool = False


@dataclass(frozen=True)
class Published:
    """What became of it. `status` is "published", "tagged" or "already published"."""

    repo: str
    commit: str
    status: str
    tag: str = ""
    pull_request: str = ""
    files: dict[str, str] = field(default_factory=dict)


def stage(source: Path, folder: Path, *, license: str = "", base: str = "") -> tuple[Path, dict[str, Any]]:
    """Put what is to be published of `source` into the empty `folder`, as links or copies; gives it and its vgen.json.

    `source` is a checkpoint's or an adapter's folder, or an adapter's file. Raises VgenError, and UsageError for files
    of a kind that is not published.
    """
    root = source.parent if source.is_file() else source
    names = [cache.ADAPTER, "vgen.json", "README.md"] if source.is_file() else _names(root)
    if source.is_file() and source.name != cache.ADAPTER:
        raise UsageError(f"{source} is not published: an adapter is named {cache.ADAPTER}.", "Name a folder instead.")
    if strange := safety.odd(names):
        more = f" and {len(strange) - 3} more" if len(strange) > 3 else ""
        raise UsageError(
            f"{source} holds {', '.join(strange[:3])}{more}, which is not published: only data that cannot run is.",
            "Move it out of the folder; weights are published in safetensors.",
        )
    with explained(f"stage {source}"):
        for name in names:
            if (root / name).is_file():
                _place(root / name, folder / name)
    told = cache.read_json(root / "vgen.json")
    start = told.get("base") if isinstance(told.get("base"), Mapping) else {}
    license = license or str(told.get("license") or (start or {}).get("license") or "")
    told |= {"license": license} if license else {}
    return folder, told | ({"base": {**(start or {}), "reference": base}} if base else {})


def _names(root: Path) -> list[str]:
    found = []
    for path in sorted(root.rglob("*")):
        parts = path.relative_to(root).parts
        hidden = parts[0] in LEFT_OUT or any(part.startswith(".") for part in parts)
        if path.is_file() and not hidden and path.suffix not in RECORDS:
            found.append("/".join(parts))
    return found


def _place(source: Path, target: Path) -> None:
    """The same bytes under another name: a link where the file system has them."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def finish(folder: Path, manifest: dict[str, Any], target: Target, task: str) -> Staged:
    """Check a staged folder, and write its vgen.json and, unless it has one, its model card. Raises VgenError."""
    kind = cache.kind(folder)
    files = {name: cache.hash_as(folder / name, "sha256:") for name in _names(folder) if name not in OURS}
    told = {"format": "vgen-checkpoint/1", "kind": kind, **manifest}
    told["files"] = {name: value for name, value in files.items() if _fetched(name)}
    check(folder, told)
    _damage(manifest, files)
    (folder / "vgen.json").unlink(missing_ok=True)  # never through a link
    (folder / "vgen.json").write_text(json.dumps(told, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    wrote = not (folder / "README.md").exists()
    if wrote:
        index = cache.read_json(folder / "model_index.json")
        text = modelcard.card(target.repo, target.tag, told, kind, task, index, files)
        (folder / "README.md").write_text(text, encoding="utf-8")
    files |= {name: cache.hash_as(folder / name, "sha256:") for name in OURS}
    return Staged(folder, kind, told, files, wrote)


def _fetched(name: str) -> bool:
    """Whether `pull` fetches a file of that name, so that vgen.json answers for it."""
    return any(fnmatchcase(name, p) for p in cache.SAFE) and not any(fnmatchcase(name, p) for p in cache.COPIES)


def _damage(manifest: Mapping[str, Any], files: Mapping[str, str]) -> None:
    """Compare with the hashes that the folder's own vgen.json tells. Raises VgenError."""
    for name, value in dict(manifest.get("files") or {}).items():
        if name in files and files[name].removeprefix("sha256:") != str(value).removeprefix("sha256:"):
            raise VgenError(
                f"{name} is not the file that vgen.json tells of: its content has changed.",
                "Make the checkpoint again.",
            )


def check(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Refuse what would not open elsewhere: parts that lack, files that are not whole, code. Raises VgenError."""
    kind = cache.kind(folder)
    if not kind:
        raise UsageError(
            f"This is neither a checkpoint (model_index.json) nor an adapter ({cache.ADAPTER}).",
            "A checkpoint is a folder in diffusers' layout; finetune and train-lora write what can be published.",
        )
    lacks = cache.missing(folder) if kind == "checkpoint" else []
    if lacks:
        raise VgenError(f"The checkpoint is not whole: it lacks {', '.join(lacks[:4])}.", "Make it again.")
    safety.refuse_code(folder, "The checkpoint")
    _headers(folder)
    for config in sorted(folder.glob("*/config.json")) if kind == "checkpoint" else ():
        _fits(config)
    if not manifest.get("family"):
        raise UsageError("vgen.json does not say which family this is.", "Name it: --family NAME.")
    if not manifest.get("license"):
        raise UsageError("Nothing is published without a licence, and vgen.json names none.", "Name it: --license ID.")
    base = manifest.get("base")
    if kind == "adapter" and not (isinstance(base, Mapping) and base.get("reference")):
        raise UsageError("vgen.json does not say which checkpoint the adapter is for.", "Name it: --base REFERENCE.")


def _headers(folder: Path) -> None:
    """Every file of weights is whole, and the shards hold the tensors that their index tells. Raises VgenError."""
    for path in folder.rglob("*.safetensors"):
        if not tensorfile.header(path).entries:
            raise VgenError(f"{path.relative_to(folder)} holds no tensors.", "Make it again.")
    for path in folder.glob("*/*.safetensors.index.json"):
        for name, shard in cache.read_json(path).get("weight_map", {}).items():
            if name not in tensorfile.header(path.parent / shard).entries:
                raise VgenError(f"{path.parent.name}/{shard} lacks the tensor {name} of its index.", "Make it again.")


def _fits(config: Path) -> None:
    """Compare names and shapes of stored weights with the network of their configuration, where diffusers has it.

    The network is built without memory. Raises VgenError.
    """
    told = cache.read_json(config)
    kind = _of_diffusers(str(told.get("_class_name", "")))
    if kind is None:
        return
    import torch

    files = config.parent.glob("*.safetensors")
    shapes = {name: e.shape for path in files for name, e in tensorfile.header(path).entries.items()}
    with torch.device("meta"):
        network = kind.from_config(told)
        held = {name: torch.empty(shape) for name, shape in shapes.items()}
    network._fix_state_dict_keys_on_load(held)  # old names of attention layers, as from_pretrained reads them
    wanted = {name: t.shape for name, t in network.state_dict().items()}
    wrong = {name for name in held.keys() | wanted if name not in held or held[name].shape != wanted.get(name)}
    if wrong:
        name = min(wrong)
        does, wants = (tuple(t) if t is not None else "missing" for t in (shapes.get(name), wanted.get(name)))
        raise VgenError(
            f"The weights of '{config.parent.name}' do not fit its config.json: {len(wrong)} differ."
            f" The first, {name}, is {does} in the files and {wants} in the network.",
            "Make the checkpoint again.",
        )


def _of_diffusers(name: str) -> Any:
    """diffusers' class of that name; None for other libraries' networks. Imports nothing where there is no name."""
    if not name:
        return None
    import diffusers

    kind = getattr(diffusers, name, None)
    return kind if isinstance(kind, type) and issubclass(kind, diffusers.ModelMixin) else None


def publish(staged: Staged, target: Target) -> Published:
    """Put a staged folder on the Hub as one commit, compare what arrived, and tag it.

    A tag that is there with the same content is done already; with another it is refused. Raises VgenError.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    with hub.talking(target.repo, target.revision):
        _repository(api, target)
        refs = api.list_repo_refs(target.repo)
    tagged = next((ref.target_commit for ref in refs.tags if ref.name == target.tag), "")
    if tagged:
        _same_as_tagged(staged, target, hub.listing(target.repo, tagged))
        return Published(target.repo, tagged, "already published", target.tag, "", staged.files)
    if target.revision not in {ref.name for ref in refs.branches}:
        with hub.talking(target.repo, target.revision):
            api.create_branch(target.repo, branch=target.revision)
    head = hub.listing(target.repo, target.revision)
    if target.parent and head.commit != target.parent:
        raise VgenError(
            f"{target.repo}@{target.revision} is at {head.commit}, not at the expected {target.parent}.",
            "Someone else has pushed since. Look at the changes there, then push again.",
        )
    staged = _keep_card(staged, head)
    if not differences(staged, head):
        status = "tagged" if target.tag else "already published"
        done = Published(target.repo, head.commit, status, target.tag, "", staged.files)
    else:
        done = _commit(api, staged, target, head)
    return _tag(api, done, target)


def _repository(api: Any, target: Target) -> None:
    """Make the repository unless it is there. Raises VgenError rather than publish what shall be private."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        info = api.model_info(target.repo)
    except RepositoryNotFoundError:
        if target.create_pr:
            raise
        api.create_repo(target.repo, private=target.private, exist_ok=True)
        return
    if target.private and not info.private:
        raise VgenError(f"{target.repo} is there already, and public.", "Make it private there, or choose another.")


def _same_as_tagged(staged: Staged, target: Target, there: hub.Listing) -> None:
    other = differences(_keep_card(staged, there), there)
    if other:
        raise VgenError(
            f"{target.repo} has a tag {target.tag} already, with other content ({', '.join(other[:3])}).",
            "A tag never moves: choose the next one, such as v1.0.1.",
        )


def _keep_card(staged: Staged, there: hub.Listing) -> Staged:
    """The same without our model card, where the repository has one."""
    if not staged.written_card or "README.md" not in there.files:
        return staged
    return replace(staged, files={k: v for k, v in staged.files.items() if k != "README.md"})


def differences(staged: Staged, there: hub.Listing) -> list[str]:
    """Names of files that are not the same here and there."""
    kept = {*REMOTE, *({"README.md"} if staged.written_card else ())}
    other = [name for name in there.files if name not in staged.files and name not in kept]
    for name, value in staged.files.items():
        told = there.files.get(name, "")
        if told.startswith("git:"):
            value = cache.hash_as(staged.folder / name, told)
        if told != value:
            other.append(name)
    return sorted(other)


def _commit(api: Any, staged: Staged, target: Target, head: hub.Listing) -> Published:
    """One commit on `head`, and a comparison of what it holds with what was staged."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    old = set(head.files) - set(staged.files) - {*REMOTE, "README.md"}
    message = target.message or f"vgen: {staged.kind} {target.tag}".rstrip()
    changes: list[Any] = [CommitOperationAdd(name, str(staged.folder / name)) for name in sorted(staged.files)]
    changes += [CommitOperationDelete(name) for name in sorted(old)]
    with hub.talking(target.repo, target.revision):
        info = api.create_commit(
            target.repo,
            changes,
            commit_message=message,
            revision=target.revision,
            parent_commit=head.commit,
            create_pr=target.create_pr,
        )
    revision = info.pr_revision if target.create_pr else info.oid
    there = hub.listing(target.repo, str(revision))
    if wrong := differences(staged, there):
        raise VgenError(
            f"{target.repo}@{there.commit} is not what was sent: {', '.join(wrong[:3])} differ.",
            "Nothing was tagged. Push again; if it comes again, the server is at fault.",
        )
    return Published(target.repo, there.commit, "published", "", info.pr_url or "", staged.files)


def _tag(api: Any, done: Published, target: Target) -> Published:
    if not target.tag:
        return done
    with hub.talking(target.repo, target.revision):
        api.create_tag(target.repo, tag=target.tag, revision=done.commit)
    return replace(done, tag=target.tag)
