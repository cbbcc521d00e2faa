"""The `vgen` command: its verbs and nouns, and what an error becomes."""

from __future__ import annotations

import os
import sys
from types import TracebackType
from typing import Annotated

import typer
from typer.main import get_command

from vgen import __version__
from vgen.commands import checkpoints, doctor, exchange, families, merge
from vgen.commands.errors import close_streams, report
from vgen.commands.pages import Root, noun, plain_app
from vgen.commands.prepare import perform
from vgen.commands.surface import verb_group
from vgen.errors import VgenError

VERBS = {
    "sample": "Text, pictures or clips to clips.",
    "encode": "Clips to a store of latents.",
    "decode": "Latents to clips.",
    "finetune": "Train a part of a model.",
    "train-lora": "Adapt a model with low-rank adapters.",
    "interpolate": "More frames between the frames of a clip.",
    "upscale": "A clip to a larger clip.",
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


def build(completion: bool) -> typer.Typer:
    """The whole app. Families are imported only where a page or a command needs them."""
    app = plain_app(cls=Root, add_completion=completion)
    app.callback()(_root)
    for verb, about in VERBS.items():
        app.add_typer(plain_app(cls=verb_group(perform), subcommand_metavar="FAMILY ..."), name=verb, help=about)
    app.command("families", cls=noun(*families.EXAMPLES))(families.run)
    app.add_typer(registry_app(), name="checkpoints", help="The registry: checkpoints here and on the Hub.")
    app.command("doctor", cls=noun(*doctor.EXAMPLES))(doctor.run)
    return app


def registry_app() -> typer.Typer:
    """`vgen checkpoints`: what looks at checkpoints, and what brings them here and elsewhere."""
    app = plain_app(cls=checkpoints.Checkpoints)
    for part in (checkpoints.app, exchange.app, merge.app):
        app.registered_commands += part.registered_commands
    return app


def _unexpected(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Say what ends the process; Python's exit code is then 1."""
    if isinstance(error, Exception):
        report(error)
    else:
        sys.__excepthook__(kind, error, trace)


def main() -> None:
    """Run the command line. Every error ends as a sentence and an exit code: 1 for those that nobody foresaw."""
    sys.excepthook = _unexpected
    try:
        # Typer 0.29 spends 50 ms on its completion flags even in a command that does not use them
        first = sys.argv[1] if len(sys.argv) > 1 else "-"
        app = build(completion=first.startswith("-") or "_VGEN_COMPLETE" in os.environ)
        get_command(app)(prog_name="vgen")  # calling the app itself would put Typer's hook in the place of ours
    except VgenError as error:
        sys.exit(report(error))
    finally:
        close_streams()


if __name__ == "__main__":
    main()
