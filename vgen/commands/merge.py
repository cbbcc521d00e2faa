"""`vgen checkpoints merge`: a checkpoint with adapters added to its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from vgen import lora_source, registry
from vgen.commands.checkpoints import Reference, find
from vgen.commands.families import Json, Quiet
from vgen.commands.output import Out, mode
from vgen.commands.pages import noun, plain_app
from vgen.commands.quiet import hush
from vgen.errors import UsageError, VgenError

Specs = Annotated[
    list[str], typer.Option("--lora", metavar="PATH[:SCALE]", help="Adapter to add, any number of times.")
]
Folder = Annotated[Path | None, typer.Option("-o", "--output", metavar="FOLDER", help="Where the checkpoint goes.")]
Precision = Annotated[
    Literal["fp32", "bf16", "fp16"] | None,
    typer.Option("--save-dtype", help="Precision of the written weights; that of the base when absent."),
]

app = plain_app()  # joins `vgen checkpoints`


@app.callback()
def _group() -> None:
    """Keep `merge` a command by its name, though it is the only one here."""


@app.command(cls=noun("vgen checkpoints merge FAMILY.TAG --lora look/ --lora motion/:0.5 -o merged/"))
def merge(
    base: Reference,
    lora: Specs,
    output: Folder = None,
    save_dtype: Precision = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a full checkpoint whose weights are those of BASE and of adapters, for programs that take no adapters."""
    out = Out(mode(json, quiet), silent=quiet)
    if output is None:
        raise UsageError("merge needs a folder to write to.", "Name it with -o.")
    card, found = find(base)
    sources = [lora_source.locate(spec) for spec in lora]
    found = registry.download(card, found)
    if found.folder is None:
        raise VgenError(f"{found.reference} is not on this disk.", f"Fetch it: vgen checkpoints pull {base}")
    hush()
    out.say(f"Merging {len(sources)} into {found.reference} ...")

    from vgen.lora import merged, stored
    from vgen.machine import DTYPES, machine

    model = card.loader()(found.folder, found.checkpoint, machine("cpu", "fp32"))
    dtype = DTYPES[save_dtype] if save_dtype else stored(found.folder / model.base[0])
    for note in merged(card, model, found.folder, found.reference, sources, output, dtype):
        out.warning(note)
    out.result(output, family=card.name, base=found.reference, adapters=[one.spec for one in sources])
