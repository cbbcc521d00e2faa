"""Checkpoints by reference: which weights a run means, where they lie, and how they get there."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

from vgen import cache, hub, safety
from vgen.errors import UsageError, VgenError, did_you_mean
from vgen.family import Checkpoint, Family, families, installed

HUB_REFERENCE = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?(:(?P<subfolder>[\w./-]+))?")
GRAMMAR = "A checkpoint is family.tag, owner/repo[@revision][:subfolder], a folder, or 'demo'."


@dataclass(frozen=True)
class Found:
    """The weights that a reference means. `folder` is None until they are on the disk.

    `reference` repeats the choice (with the commit, once known); `note` is a line for the user, or nothing.
    """

    checkpoint: Checkpoint
    reference: str
    folder: Path | None = None
    repo: str = ""
    revision: str = ""
    subfolder: str = ""
    demo: bool = False
    note: str = ""

    @property
    def kind(self) -> str:
        """ "checkpoint" or "adapter", once the weights are on the disk."""
        return cache.kind(self.folder) if self.folder else ""


def accelerator() -> bool:
    """Whether this machine seems to have a GPU, by device files, a variable and torch's version: without torch."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1") or version("torch").endswith("+cpu"):
        return False
    apple = sys.platform == "darwin" and os.uname().machine == "arm64"
    return apple or any(Path(name).exists() for name in ("/dev/nvidia0", "/dev/kfd", "/dev/dxg"))


def resolve(card: Family, reference: str | None, *, accelerator: bool) -> Found:
    """What `reference` means for a family; without one, the default checkpoint, or the demo. Uses no network.

    Raises UsageError for a reference that means nothing, VgenError for a folder that cannot be used.
    """
    if card.weightless:
        return _none(card, reference)
    if reference is None:
        return _default(card, accelerator)
    if reference in ("demo", f"{card.name}.demo"):
        return _demo(card)
    if Path(reference).expanduser().is_dir():
        return _local(card, Path(reference).expanduser(), reference)
    tag = reference.removeprefix(f"{card.name}.")
    if tag in (one.tag for one in card.checkpoints):
        return _hub(card, card.checkpoint(tag))
    if match := _parsed(reference):
        return _repo(card, *match)
    other = reference.partition(".")[0]
    if other in installed() and other != card.name:
        raise UsageError(f"'{reference}' is a checkpoint of '{other}', not of '{card.name}'.", _known(card, tag))
    if "/" in reference:
        raise UsageError(f"There is no folder {reference}, and it is no repository of the Hub.", GRAMMAR)
    raise UsageError(f"'{card.name}' has no checkpoint '{reference}'.", _known(card, tag))


def _none(card: Family, reference: str | None) -> Found:
    """What stands for the checkpoint of a family without weights. Raises UsageError where one is named."""
    if reference is not None:
        raise UsageError(f"'{card.name}' has no checkpoints: it computes without weights.", "Leave --checkpoint out.")
    return Found(Checkpoint(""), "")


def _parsed(reference: str) -> tuple[str, str, str] | None:
    """Repository, revision and subfolder, "" where not told; None for what names nothing on the Hub."""
    match = HUB_REFERENCE.fullmatch(reference)
    if not match or any(safety.escapes(told) for told in match.group("repo", "revision", "subfolder") if told):
        return None
    return match["repo"], match["revision"] or "", match["subfolder"] or ""


def _known(card: Family, tag: str) -> str:
    near = did_you_mean(tag, [*(c.tag for c in card.checkpoints), "demo"])
    return f"{near} Or owner/repo, or a folder."


def _default(card: Family, accelerator: bool) -> Found:
    tag = card.default or next((c.tag for c in card.checkpoints), "")
    found = _hub(card, card.checkpoint(tag)) if tag else None
    if found and (found.folder or accelerator):
        return found
    if card.demo and not cache.missing(card.demo):
        full = f"--checkpoint {card.name}.{tag} runs the full model" if found else "--checkpoint names another"
        return replace(_demo(card), note=f"Using the tiny demo checkpoint of {card.name}; {full}.")
    do = f"Choose one: --checkpoint {card.name}.{tag} (from the Hub)." if found else GRAMMAR
    raise UsageError(f"'{card.name}' has no demo checkpoint, and none was named.", do)


def _demo(card: Family) -> Found:
    if card.demo is None or cache.missing(card.demo):
        raise VgenError(f"'{card.name}' ships no demo checkpoint with this installation.", _known(card, ""))
    return Found(_describe(card, card.demo, "demo"), "demo", card.demo, demo=True)


def _local(card: Family, folder: Path, reference: str) -> Found:
    _not_an_adapter(folder, reference)
    bad = cache.pickles(folder)
    if bad:
        raise VgenError(
            f"{folder} holds pickled weights ({bad[0]}), which can run any code when they are read.",
            "Convert them to safetensors: save_pretrained(..., safe_serialization=True).",
        )
    lacks = cache.missing(folder)
    if lacks:
        raise VgenError(
            f"{folder} is not a whole checkpoint: it lacks {', '.join(lacks[:4])}.",
            "A checkpoint is a folder in diffusers' layout: model_index.json and a folder for each component.",
        )
    safety.refuse_code(folder, str(folder))
    _same_family(card, folder)
    return Found(_describe(card, folder, folder.name), reference, folder)


def _not_an_adapter(folder: Path, reference: str) -> None:
    if cache.kind(folder) == "adapter":
        do = f"Run it on its base: --lora {reference}, with --checkpoint naming the base."
        raise UsageError(f"{reference} is an adapter, not a checkpoint.", do)


def _same_family(card: Family, folder: Path) -> None:
    name = cache.read_json(folder / "vgen.json").get("family", card.name)
    if name not in (card.name, *card.starts_from):
        raise UsageError(f"{folder} is a checkpoint of '{name}', not of '{card.name}'.", f"Run: vgen ... {name}")


def _describe(card: Family, folder: Path, tag: str) -> Checkpoint:
    """The checkpoint that a folder holds, as its family reads it."""
    return replace(card.describe(folder), tag=tag) if card.describe else Checkpoint(tag)


def _hub(card: Family, checkpoint: Checkpoint) -> Found:
    """A checkpoint that the card names, wherever its weights are."""
    if not checkpoint.repo:
        raise VgenError(f"'{card.name}.{checkpoint.tag}' has no published weights.", _known(card, checkpoint.tag))
    found = Found(checkpoint, f"{card.name}.{checkpoint.tag}", repo=checkpoint.repo, revision=checkpoint.revision)
    return _cached(found)


def _repo(card: Family, repo: str, revision: str, subfolder: str) -> Found:
    """A repository of the Hub: one that the card names, or any other."""
    named = next((c for c in card.checkpoints if c.repo == repo and not subfolder), None)
    checkpoint = named or Checkpoint(repo.partition("/")[2], repo)
    checkpoint = replace(checkpoint, revision=revision or checkpoint.revision)
    reference = f"{repo}@{checkpoint.revision}" + (f":{subfolder}" if subfolder else "")
    found = _cached(Found(checkpoint, reference, None, repo, checkpoint.revision, subfolder))
    return found if named or not found.folder else _described(card, found)


def _described(card: Family, found: Found) -> Found:
    """The same, described by its files; for repositories that no card names."""
    assert found.folder is not None
    _same_family(card, found.folder)
    read = _describe(card, found.folder, found.checkpoint.tag)
    return replace(found, checkpoint=replace(read, repo=found.repo, revision=found.checkpoint.revision))


def _cached(found: Found) -> Found:
    """The same, with its folder and commit if the cache holds all of it."""
    base = cache.snapshot(found.repo, found.revision)
    folder = base / found.subfolder if base else None
    if base is None or folder is None or cache.missing(folder):
        return found
    commit = cache.commit(base)
    pinned = f"{found.repo}@{commit}" + (f":{found.subfolder}" if found.subfolder else "")
    return replace(found, folder=folder, revision=commit, reference=pinned)


def unchecked(found: Found) -> bool:
    """Whether bytes of a cached checkpoint were never compared with their hashes: that is done before first use."""
    base = _base(found)
    return base is not None and bool(cache.unchecked(base))


def _base(found: Found) -> Path | None:
    """The folder of the commit that holds what was found; None outside the Hub's cache."""
    if not found.folder or not found.repo:
        return None
    return cache.snapshot(found.repo, found.revision)


def download(card: Family, found: Found) -> Found:
    """The same, with its weights on the disk and compared with their hashes. Raises VgenError."""
    if found.folder:
        _compare(found)
        return found
    base = hub.fetch(found.repo, found.revision, found.subfolder)
    _not_an_adapter(base / found.subfolder, found.reference)
    there = _cached(replace(found, revision=cache.commit(base)))
    if there.folder is None:
        raise _not_whole(found.reference, base / found.subfolder)
    return there if any(c.repo == found.repo for c in card.checkpoints) else _described(card, there)


def _not_whole(reference: str, folder: Path) -> VgenError:
    return VgenError(
        f"{reference} is not a whole checkpoint in safetensors: it lacks {', '.join(cache.missing(folder)[:4])}.",
        "A repository of pickled weights (.bin, .ckpt) is not loaded: they can run any code when they are read.",
    )


def named(reference: str) -> Found:
    """What a reference means without a family: a folder, the name of a card, or a repository; of any kind.

    Nothing of the Hub is looked up; `here` does that in the cache, `pull` on the network. Raises UsageError.
    """
    folder = Path(reference).expanduser()
    if folder.is_dir():
        return Found(_told(folder), reference, folder)
    for card in families()[0]:
        for one in card.checkpoints:
            if one.repo and reference in (f"{card.name}.{one.tag}", one.repo):
                return Found(one, reference, repo=one.repo, revision=one.revision)
    match = _parsed(reference)
    if not match:
        raise UsageError(f"'{reference}' names nothing on the Hub, and there is no such folder.", GRAMMAR)
    repo, revision, subfolder = match
    return Found(Checkpoint(repo.partition("/")[2], repo), reference, None, repo, revision or "main", subfolder)


def _told(folder: Path) -> Checkpoint:
    """What vgen.json says of a folder of any kind."""
    told = cache.read_json(folder / "vgen.json")
    return Checkpoint(
        str(told.get("tag", folder.name)), license=str(told.get("license", "")), summary=str(told.get("summary", ""))
    )


def license_of(reference: str) -> str:
    """The licence of the repository that a reference names, where a card tells it; else nothing."""
    repo = (_parsed(reference) or ("", "", ""))[0]
    return next((c.license for card in families()[0] for c in card.checkpoints if repo and c.repo == repo), "")


def here(found: Found) -> Found:
    """What `named` gave, pinned, with its folder if all of it is in the cache; a checkpoint or an adapter."""
    base = cache.snapshot(found.repo, found.revision)
    folder = base / found.subfolder if base else None
    if not base or not folder or not cache.kind(folder):
        return found
    if cache.kind(folder) == "checkpoint" and cache.missing(folder):
        return found
    pinned = f"{found.repo}@{cache.commit(base)}" + (f":{found.subfolder}" if found.subfolder else "")
    told = replace(_told(folder), tag=found.checkpoint.tag, repo=found.repo)
    license = told.license or found.checkpoint.license
    told = replace(told, license=license, summary=told.summary or found.checkpoint.summary)
    return replace(found, checkpoint=told, folder=folder, revision=cache.commit(base), reference=pinned)


def pull(found: Found) -> Found:
    """What `named` gave, on the disk, whole and compared with its hashes; a branch is asked for anew.

    Raises VgenError.
    """
    if not found.repo:
        return found
    if cache.COMMIT.fullmatch(found.revision) and here(found).folder:
        return ready(found)
    base = hub.fetch(found.repo, found.revision, found.subfolder)
    folder = base / found.subfolder
    if not cache.kind(folder):
        raise VgenError(
            f"{found.reference} is neither a checkpoint in diffusers' layout nor an adapter ({cache.ADAPTER}).",
            "Name the folder in it: owner/repo@revision:subfolder.",
        )
    if cache.kind(folder) == "checkpoint" and cache.missing(folder):
        raise _not_whole(found.reference, folder)
    return here(replace(found, revision=cache.commit(base)))


def ready(found: Found) -> Found:
    """What `named` gave, from the cache where it is there and unchanged, else pulled. Raises VgenError."""
    there = here(found)
    if there.folder is None:
        return pull(found)
    _compare(there)
    return there


def _compare(found: Found) -> None:
    """Compare a cached checkpoint with its hashes, once, and look for code. Raises VgenError."""
    base = _base(found)
    if base and found.folder:
        hub.check(base, found.reference)
        safety.refuse_code(found.folder, found.reference)


def on_disk(card: Family) -> Iterator[Found]:
    """The checkpoints and adapters of a family that need no download: the demo, and those in the Hub's cache."""
    if card.demo and not cache.missing(card.demo):
        yield _demo(card)
    ours = {c.repo: c for c in card.checkpoints}
    for repo, folder in cache.snapshots():
        told = cache.read_json(folder / "vgen.json").get("family")
        sha = cache.commit(folder)
        if cache.kind(folder) == "adapter" and told == card.name:
            yield Found(replace(_told(folder), repo=repo), f"{repo}@{sha}", folder, repo, sha)
        if cache.missing(folder) or (repo not in ours and told != card.name):
            continue
        checkpoint = ours.get(repo) or replace(_describe(card, folder, repo.partition("/")[2]), repo=repo)
        yield Found(checkpoint, f"{repo}@{sha}", folder, repo, sha)


def remove(found: Found) -> int:
    """Delete a checkpoint from the Hub's cache; returns the bytes freed. Raises UsageError for any other folder."""
    base = cache.snapshot(found.repo, found.revision) if found.repo else None
    if base is None:
        where = f"It lies in {found.folder}, outside the cache." if found.folder else "It is not on this disk."
        raise UsageError(f"'{found.reference}' is not in the Hub's cache.", where)
    from huggingface_hub import scan_cache_dir

    plan = scan_cache_dir(cache.hub()).delete_revisions(base.name)
    plan.execute()
    return int(plan.expected_freed_size)
