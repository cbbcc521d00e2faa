"""`vgen families`: what is installed, and what each can do."""

from __future__ import annotations

from typing import Annotated

import typer

from vgen.commands.output import Out, mode
from vgen.commands.surface import references
from vgen.family import families

Json = Annotated[bool, typer.Option("--json", help="Answer in JSON, one object per line.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Only errors and names.")]


EXAMPLES = ("vgen families", "vgen families --json")


def run(json: Json = False, quiet: Quiet = False) -> None:
    """List the installed families, their verbs and checkpoints."""
    out = Out(mode(json, quiet), silent=quiet)
    cards, broken = families()
    rows = [
        {
            "family": card.name,
            "verbs": list(card.verbs),
            "checkpoints": references(card),
            "parts": [part.name for part in card.parts],
            "summary": card.summary,
            "paper": card.paper,
        }
        for card in cards
    ]
    out.table(rows, ("family", "verbs", "summary"))
    for error in broken:
        out.warning(str(error))
