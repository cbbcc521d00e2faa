"""The `vgen` command: its verbs and nouns, and what an error becomes."""

from __future__ import annotations

import os
import sys
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.main import get_command

from vgen import __version__
from vgen.commands.output import close_streams
from vgen.commands.pages import Root, noun, plain_app
from vgen.errors import VgenError

if TYPE_CHECKING:
    from vgen.family import Family

VERBS = {
    "sample": "Text, pictures or clips to clips.",
    "encode": "Clips to a store of latents.",
    "decode": "Latents to clips.",
    "finetune": "Train a part of a model.",
    "train-lora": "Adapt a model with low-rank adapters.",
    "interpolate": "More frames between the frames of a clip.",
    "upscale": "A clip to a larger clip.",
}
NOUNS = {
    "families": "List the installed families, their verbs and checkpoints.",
    "checkpoints": "The registry: checkpoints here and on the Hub.",
    "curate": "Videos to a manifest of clips: cut, scored, captioned, kept or dropped with reasons.",
    "doctor": "Show what is installed, which accelerator and codecs there are, cache sizes, and what to do.",
}


def _version(wanted: bool) -> None:
    if wanted:
        print(f"vgen {__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """One command line for open video diffusion models: vgen VERB FAMILY [INPUT...] [flags]"""


def build(first: str, *, completion: bool) -> typer.Typer:
    """The whole app, with the command `first` as it is and the others as lines of the page; with `completion`, all.

    What a command does is imported when it runs, families where a page needs them: half of the start is imports.
    """
    app = plain_app(cls=Root, add_completion=completion or first.startswith("-"))
    app.callback()(_root)
    for name, about in {**VERBS, **NOUNS}.items():
        if name == first or completion:
            _add(app, name, about)
        else:
            app.command(name, help=about)(lambda: None)
    return app


def _add(app: typer.Typer, name: str, about: str) -> None:
    """Put a verb or a noun into the app."""
    if name in VERBS:
        from vgen.commands.surface import verb_group

        app.add_typer(plain_app(cls=verb_group(_perform), subcommand_metavar="FAMILY ..."), name=name, help=about)
        return
    if name == "checkpoints":
        from vgen.commands import checkpoints, exchange, merge

        group = plain_app(cls=checkpoints.Checkpoints)
        for part in (checkpoints.app, exchange.app, merge.app):
            group.registered_commands += part.registered_commands
        app.add_typer(group, name=name, help=about)
        return
    from vgen.commands import curate, doctor, families

    module = {"families": families, "doctor": doctor, "curate": curate}[name]
    app.command(name, cls=noun(*module.EXAMPLES), help=about)(module.run)


def _perform(verb: str, card: Family, given: dict[str, Any]) -> None:
    from vgen.commands.prepare import perform

    perform(verb, card, given)


def _report(error: Exception) -> int:
    from vgen.commands.errors import report

    return report(error)


def _unexpected(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Say what ends the process; Python's exit code is then 1."""
    if isinstance(error, Exception):
        _report(error)
    else:
        sys.__excepthook__(kind, error, trace)


def main() -> None:
    """Run the command line. Every error ends as a sentence and an exit code: 1 for those that nobody foresaw."""
    sys.excepthook = _unexpected
    try:
        # Typer 0.29 spends 50 ms on its completion flags even in a command that does not use them
        first = sys.argv[1] if len(sys.argv) > 1 else "-"
        app = build(first, completion="_VGEN_COMPLETE" in os.environ)
        get_command(app)(prog_name="vgen")  # calling the app itself would put Typer's hook in the place of ours
    except VgenError as error:
        sys.exit(_report(error))
    finally:
        close_streams()


if __name__ == "__main__":
    main()
