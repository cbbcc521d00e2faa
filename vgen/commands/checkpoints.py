"""`vgen checkpoints list|show|verify|remove`: the checkpoints that cards name and that lie on this disk."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from vgen import cache, hub, lineage, registry
from vgen.commands.families import Json, Quiet
from vgen.commands.output import Out, mode
from vgen.commands.pages import Group, noun, plain_app
from vgen.commands.surface import references
from vgen.errors import UsageError, VgenError
from vgen.family import Checkpoint, Family, families, family, installed


class Checkpoints(Group):
    """The group, with its examples."""

    examples = ("vgen checkpoints list", "vgen checkpoints show FAMILY.TAG --json", "vgen checkpoints pull FAMILY.TAG")


app = plain_app()  # joins `vgen checkpoints`


ORIGINS = ("lineage", *lineage.KEYS)


def _families(incomplete: str) -> list[str]:
    return [name for name in installed() if name.startswith(incomplete)]


def _references(incomplete: str) -> list[str]:
    words = {word for card in families()[0] for word in references(card)}
    words |= {f"{card.name}.demo" for card in families()[0] if card.demo}
    return sorted(word for word in words - {"demo"} if word.startswith(incomplete))


FamilyName = Annotated[str, typer.Argument(metavar="[FAMILY]", help="Only of this family.", autocompletion=_families)]
Reference = Annotated[
    str,
    typer.Argument(
        metavar="REFERENCE", help="family.tag, owner/repo[@revision], or a folder.", autocompletion=_references
    ),
]


@app.command("list", cls=noun("vgen checkpoints list", "vgen checkpoints list --json"))
def listed(only: FamilyName = "", json: Json = False, quiet: Quiet = False) -> None:
    """List checkpoints: those that the cards name, and those on this disk."""
    out = Out(mode(json, quiet), silent=quiet)
    cards, broken = ([family(only)], []) if only else families()
    for card in cards:
        out.table(rows(card), ("checkpoint", "where", "size", "license", "summary"))
    for error in broken:
        out.warning(str(error))


def rows(card: Family) -> list[dict[str, Any]]:
    """One row for each checkpoint of a family."""
    here = list(registry.on_disk(card))
    found = [
        _row(card, f"{card.name}.{one.checkpoint.tag}" if one.demo else one.reference, one.checkpoint, one)
        for one in here
    ]
    cached = {one.repo for one in here}
    return [_row(card, f"{card.name}.{c.tag}", c) for c in card.checkpoints if c.repo not in cached] + found


def _row(card: Family, name: str, checkpoint: Checkpoint, found: registry.Found | None = None) -> dict[str, Any]:
    where = "hub" if found is None else "with vgen" if found.demo else "cached"
    folder = found.folder if found else None
    return {
        "checkpoint": name,
        "family": card.name,
        "kind": (found.kind if found else "") or "checkpoint",
        "where": where,
        "size": _mib(cache.size(folder)) if folder else "",
        "license": checkpoint.license.partition(" ")[0],
        "summary": checkpoint.summary,
        "repo": checkpoint.repo,
        "folder": str(folder or ""),
    }


def _mib(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"


def find(reference: str) -> tuple[Family, registry.Found]:
    """The family and the weights that a reference means, without being told the family. Raises UsageError."""
    owner = next((name for name in installed() if reference.startswith(f"{name}.")), "")
    if owner:
        card = family(owner)
        return card, registry.resolve(card, reference, accelerator=False)
    cards = [card for card in families()[0] if not card.weightless]
    for card in cards:
        if any(c.repo and reference.partition("@")[0] == c.repo for c in card.checkpoints):
            return card, registry.resolve(card, reference, accelerator=False)
    matches, errors = [], []
    for card in cards:
        try:
            found = registry.resolve(card, reference, accelerator=False)
        except VgenError as error:
            errors.append(error)
            continue
        if found.folder or found.checkpoint in card.checkpoints:
            matches.append((card, found))
    if len(matches) == 1:
        return matches[0]
    if matches:
        names = ", ".join(f"{card.name}.{found.checkpoint.tag}" for card, found in matches)
        raise UsageError(f"'{reference}' is a checkpoint of several families.", f"Name one: {names}.")
    if errors and Path(reference).expanduser().is_dir():
        raise errors[0]
    raise UsageError(f"'{reference}' is no checkpoint of any installed family.", registry.GRAMMAR)


def adapter(reference: str) -> registry.Found | None:
    """The adapter on this disk that a reference means; None for anything else."""
    try:
        found = registry.here(registry.named(reference))
    except UsageError:
        return None
    return found if found.kind == "adapter" else None


@app.command(
    cls=noun(
        "vgen checkpoints show FAMILY.demo",
        "vgen checkpoints show ./my-checkpoint --json",
        "vgen checkpoints show clip.mp4",
    )
)
def show(reference: Reference, json: Json = False, quiet: Quiet = False) -> None:
    """Show what a checkpoint or an adapter is and where it comes from; of a clip, what made it."""
    out = Out(mode(json, quiet))
    if Path(reference).is_file():
        told = lineage.sample(Path(reference))
        lines = list(lineage.sample_chain(told))
        out.object({**told, "lineage": lines}, "\n".join(lines))
        return
    found, card = adapter(reference), None
    if found is None:
        card, found = find(reference)
    told = _shown(found, card)
    words = [f"{key}: {_text(value)}" for key, value in told.items() if value and key not in ("files", *ORIGINS)]
    lines = ["lineage:", *(f"  {line}" for line in told["lineage"])] if told["lineage"] else []
    out.object(told, "\n".join(words + lines))


def _shown(found: registry.Found, card: Family | None = None) -> dict[str, Any]:
    """What there is to say of a checkpoint or, without a card, of an adapter."""
    one, folder = found.checkpoint, found.folder
    told = cache.read_json(folder / "vgen.json") if folder else {}
    return {
        "checkpoint": found.reference,
        "kind": found.kind or "checkpoint",
        "family": card.name if card else str(told.get("family", "")),
        "repo": found.repo,
        "revision": found.revision,
        "folder": str(folder or ""),
        "license": one.license or str(told.get("license", "")),
        "summary": one.summary,
        "modes": list(one.modes) if card else [],
        "defaults": dict(one.defaults),
        "rules": {name: asdict(rule) for name, rule in one.rules.items()},
        "files": cache.hashes(folder) if folder else {},
        "lineage": list(lineage.chain(folder, found.reference)) if folder else [],
        **{key: told[key] for key in lineage.KEYS if key in told},
    }


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k}={v}" for k, v in value.items())
    return ", ".join(value) if isinstance(value, list) else str(value)


@app.command(cls=noun("vgen checkpoints verify FAMILY.demo", "vgen checkpoints verify ./my-checkpoint"))
def verify(reference: Reference, json: Json = False, quiet: Quiet = False) -> None:
    """Hash the files of a checkpoint and compare with what they should be."""
    found = adapter(reference) or find(reference)[1]
    if found.folder is None:
        do = f"Fetch it: vgen checkpoints pull {reference}"
        raise VgenError(f"{found.reference} is not on this disk.", do)
    count, faults = cache.verify(found.folder)
    out = Out(mode(json, quiet), silent=quiet)
    told = {"checkpoint": found.reference, "folder": str(found.folder), "compared": count}
    out.object({**told, "faults": [asdict(fault) for fault in faults]}, str(found.folder))
    for fault in faults if not any(one.damaged for one in faults) else ():
        raise hub.contradiction(found.reference, fault)
    if faults:
        listing = "; ".join(f"{fault.path}: {fault.reason}" for fault in faults)
        raise VgenError(f"{found.reference} is damaged: {listing}.", "Remove it and fetch it again.")
    out.say(f"{count} files are as they should be." if count else "No hashes are known for this folder; it is whole.")


@app.command(cls=noun("vgen checkpoints remove FAMILY.TAG --yes", "vgen checkpoints remove owner/repo@main --yes"))
def remove(
    reference: Reference,
    yes: Annotated[bool, typer.Option("--yes", help="Delete without asking.")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Delete a checkpoint or an adapter from the Hub's cache on this disk."""
    found = adapter(reference) or find(reference)[1]
    if not yes:
        raise UsageError(f"This deletes {found.reference} from the cache.", "Confirm with --yes.")
    freed = registry.remove(found)
    told = {"removed": found.reference, "freed": freed}
    Out(mode(json, quiet), silent=quiet).object(told, f"removed {found.reference}, {_mib(freed)}")
