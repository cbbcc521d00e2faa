"""`vgen checkpoints search|pull|push|export|import`: what goes between this disk and elsewhere."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from vgen import bundle, cache, hub, publish, registry
from vgen.commands.checkpoints import Reference
from vgen.commands.families import Json, Quiet
from vgen.commands.output import Out, mode
from vgen.commands.pages import noun, plain_app
from vgen.commands.quiet import hush
from vgen.errors import UsageError, VgenError
from vgen.family import family, installed
from vgen.modelcard import pipeline

Pushed = Annotated[Path, typer.Argument(metavar="FOLDER", help="A checkpoint, or an adapter (its folder or file).")]
Repo = Annotated[str, typer.Argument(metavar="REPO", help="owner/name on the Hub; it is made if it is not there.")]


app = plain_app()  # joins `vgen checkpoints`


def _text(about: str, *names: str) -> Any:
    return typer.Option(*names, help=about)


@app.command(cls=noun("vgen checkpoints search --family FAMILY", "vgen checkpoints search bear --kind adapter"))
def search(
    words: Annotated[str, typer.Argument(metavar="[WORDS]", help="Part of a repository's name.")] = "",
    family: Annotated[str, _text("Only of this family.", "--family")] = "",
    kind: Annotated[str, _text("Only checkpoint or adapter.", "--kind")] = "",
    base: Annotated[str, _text("Only adapters and finetunes of this repository.", "--base")] = "",
    tag: Annotated[list[str] | None, _text("Only with this tag of the Hub; may be repeated.", "--tag")] = None,
    author: Annotated[str, _text("Only of this owner.", "--author")] = "",
    limit: Annotated[int, typer.Option("--limit", min=1, help="At most so many.")] = 20,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Search the Hub for checkpoints and adapters that vgen published."""
    if kind not in ("", "checkpoint", "adapter"):
        raise UsageError(f"--kind {kind} is neither checkpoint nor adapter.")
    wanted = ["vgen", *([f"vgen-family:{family}"] if family else []), *([f"vgen-kind:{kind}"] if kind else [])]
    wanted += [f"base_model:{base}"] if base else []
    _prepare(quiet)
    rows = [_found(row) for row in hub.search(words, wanted + (tag or []), author, limit)]
    out = Out(mode(json, quiet), silent=quiet)
    out.table(rows, ("checkpoint", "family", "kind", "license", "downloads", "changed"))
    if not rows:
        out.hint("Nothing was found; vgen's are found by the tags that push sets.")


def _found(row: dict[str, Any]) -> dict[str, Any]:
    told = dict(tag.split(":", 1) for tag in row["tags"] if ":" in tag and not tag.startswith("base_model:"))
    return {
        **row,
        "family": told.get("vgen-family", ""),
        "kind": told.get("vgen-kind", ""),
        "license": told.get("license", ""),
    }


@app.command(cls=noun("vgen checkpoints pull FAMILY.TAG", "vgen checkpoints pull owner/repo@v1.0.0"))
def pull(reference: Reference, json: Json = False, quiet: Quiet = False) -> None:
    """Download a checkpoint or an adapter to the Hub's cache, and compare every file with its hash."""
    found = registry.named(reference)
    if not found.repo:
        raise UsageError(f"{reference} is a folder on this disk already.", "Name a repository of the Hub.")
    out = Out(mode(json, quiet), silent=quiet)
    _prepare(quiet)
    out.say(f"Fetching {found.repo}@{found.revision} ...")
    got = registry.pull(found)
    assert got.folder is not None
    if left := hub.left_out(cache.hub() / got.folder):
        out.say(f"Left out, not being data of a known kind: {', '.join(left)}")
    told = {"checkpoint": got.reference, "repo": got.repo, "revision": got.revision, "folder": str(got.folder)}
    out.object({**told, "kind": got.kind, "size": cache.size(got.folder)}, str(got.folder))


@app.command(
    cls=noun("vgen checkpoints push tuned/ me/bears --tag v1.0.0", "vgen checkpoints push lora/ me/my-look --private")
)
def push(
    folder: Pushed,
    repo: Repo,
    license: Annotated[str, _text("Its licence; that of vgen.json or of the base when absent.", "--license")] = "",
    tag: Annotated[str, _text("Tag the commit, such as v1.0.0; a tag never moves.", "--tag")] = "",
    revision: Annotated[str, _text("The branch.", "--revision")] = "main",
    message: Annotated[str, _text("The commit's message.", "--message", "-m")] = "",
    parent: Annotated[str, _text("Refuse unless the branch is at this commit.", "--parent")] = "",
    family: Annotated[str, _text("Its family, where vgen.json names none.", "--family")] = "",
    base: Annotated[str, _text("What it was trained from, where vgen.json names none.", "--base")] = "",
    private: Annotated[bool, typer.Option("--private", help="Only you and your organisation see it.")] = False,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Propose it as a pull request.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check it and show what would be sent.")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Publish a checkpoint or an adapter on the Hub: checked, in one commit, with a model card."""
    target = publish.Target(repo, revision, tag, parent, message, private, create_pr)
    _usable(folder, target)
    out = Out(mode(json, quiet), silent=quiet)
    _prepare(quiet)
    with tempfile.TemporaryDirectory(prefix=".vgen-push-", dir=_beside(folder)) as temporary:
        staged = _stage(folder, Path(temporary), target, license, family, base)
        size = cache.size(staged.folder)
        out.say(f"{len(staged.files)} files, {size / 2**20:.1f} MiB, are whole and safe.")
        if dry_run:
            told = {"repo": repo, "kind": staged.kind, "size": size, "files": staged.files}
            out.object({**told, "card": staged.written_card}, "\n".join(sorted(staged.files)))
            return
        done = publish.publish(staged, target)
    said = {"published": "Published", "tagged": "Was there already; tagged"}.get(done.status, "Was published already")
    out.say(f"{said}: {done.pull_request or hub.page(done.repo)}")
    told = {"checkpoint": f"{done.repo}@{done.commit}", "repo": done.repo, "revision": done.commit}
    more = {"tag": done.tag, "status": done.status, "pull_request": done.pull_request, "files": done.files}
    out.object({**told, **more}, f"{done.repo}@{done.commit}")


def _usable(folder: Path, target: publish.Target) -> None:
    """Refuse flags that do not fit before anything is read. Raises UsageError."""
    if not folder.exists():
        raise UsageError(f"{folder}: there is no such file or folder.", "Check the path.")
    if not bundle.REPO.fullmatch(target.repo):
        raise UsageError(f"'{target.repo}' is not the name of a repository.", "It is owner/name.")
    for name in filter(None, (target.tag, target.revision)):
        if not bundle.NAME.fullmatch(name):
            raise UsageError(f"'{name}' is not the name of a tag or a branch.", "Letters, digits and . _ - are.")
    if target.create_pr and target.tag:
        raise UsageError("--create-pr and --tag exclude each other.", "Tag the commit when the proposal is merged.")
    if target.parent and not cache.COMMIT.fullmatch(target.parent):
        raise UsageError(f"--parent {target.parent} is not a commit.", "It has 40 hexadecimal digits.")


def _stage(folder: Path, place: Path, target: publish.Target, license: str, name: str, base: str) -> publish.Staged:
    """The staged folder, checked; its family by the flag or by vgen.json."""
    place, manifest = publish.stage(folder, place, license=license, base=base)
    if name and manifest.get("family", name) != name:
        raise UsageError(f"{folder} is of the family '{manifest['family']}', not '{name}'.")
    manifest["family"] = name = str(manifest.get("family") or name)
    start = manifest.get("base") or {}
    manifest["license"] = manifest.get("license") or registry.license_of(str(start.get("reference", "")))
    return publish.finish(place, manifest, target, _task(place, name))


def _task(folder: Path, name: str) -> str:
    """The Hub's name of what a checkpoint does, as its family reads it; of an adapter, what the usual base does."""
    card = family(name) if name in installed() else None
    if card and card.default and cache.kind(folder) == "adapter":
        usual = card.checkpoint(card.default)
        return pipeline(usual.modes, usual.defaults.get("num_frames"))
    if card is None or card.describe is None or cache.kind(folder) != "checkpoint" or cache.missing(folder):
        return pipeline((), None)
    told = card.describe(folder)
    return pipeline(told.modes, told.defaults.get("num_frames"))


def _beside(folder: Path) -> Path | None:
    """Where to stage: on the same disk, so that files are linked and not copied; else the system's own place."""
    place = folder.resolve().parent
    try:
        with tempfile.TemporaryDirectory(dir=place):
            return place
    except OSError:
        return None


@app.command(
    cls=noun("vgen checkpoints export FAMILY.TAG", "vgen checkpoints export tuned/ --as me/tuned -o tuned.tar")
)
def export(
    reference: Reference,
    output: Annotated[Path | None, _text("Where the tar goes; named after it when absent.", "--output", "-o")] = None,
    name: Annotated[str, _text("owner/name for a folder that is not of the Hub.", "--as")] = "",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the tar if it exists.")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Pack a checkpoint or an adapter into one tar, for machines without a network."""
    found = registry.here(registry.named(reference))
    if found.folder is None:
        raise VgenError(f"{reference} is not on this disk.", f"Fetch it first: vgen checkpoints pull {reference}")
    if found.subfolder or not (found.repo or name):
        name_it = f"vgen checkpoints export {reference} --as owner/name"
        do = "Export the whole repository." if found.subfolder else name_it
        raise UsageError(f"{reference} is not a repository of the Hub; it needs a name there.", do)
    if not found.kind:
        raise UsageError(f"{reference} is neither a checkpoint nor an adapter.", registry.GRAMMAR)
    repo = name or found.repo
    tar = output or Path(f"{repo.replace('/', '--')}.tar")
    if tar.exists() and not overwrite:
        raise UsageError(f"{tar} exists.", "--overwrite replaces it, -o names another.")
    told = bundle.pack(found.folder, tar, repo, _revisions(found))
    out = Out(mode(json, quiet), silent=quiet)
    out.result(tar, checkpoint=told.reference, size=tar.stat().st_size, files=len(told.files))


def _revisions(found: registry.Found) -> tuple[str, ...]:
    """The names under which the cache knows the commit; "main" for a folder of one's own."""
    if not found.repo:
        return ("main",)
    refs = cache.hub() / f"models--{found.repo.replace('/', '--')}" / "refs"
    every = sorted(path for path in refs.rglob("*") if path.is_file())
    return tuple(p.relative_to(refs).as_posix() for p in every if p.read_text().strip() == found.revision)


@app.command("import", cls=noun("vgen checkpoints import tuned.tar", "vgen checkpoints import tuned.tar --json"))
def import_(
    tar: Annotated[Path, typer.Argument(metavar="TAR", help="What vgen checkpoints export wrote.")],
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Unpack a tar of `export` into the Hub's cache, every file compared with its hash."""
    told = bundle.unpack(tar)
    folder = cache.snapshot(told.repo, told.commit)
    out = Out(mode(json, quiet), silent=quiet)
    names = {"checkpoint": told.reference, "repo": told.repo, "revision": told.commit}
    out.object({**names, "names": list(told.revisions), "folder": str(folder)}, told.reference)


def _prepare(quiet: bool) -> None:
    """Keep the Hub's client from talking, but for its bars on a terminal."""
    hush(bars=sys.stderr.isatty() and not quiet)
