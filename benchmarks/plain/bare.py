"""A Typer app of the shape of vgen: the same verbs, flags and help, and nothing behind them."""

from __future__ import annotations

from vgen import settings
from vgen.cli import VERBS
from vgen.family import Family
from vgen.options import declared

NOUNS = ("families", "checkpoints", "doctor")
START = """from typing import Annotated
import typer

app = typer.Typer({rich})
"""


def source(card: Family, *, rich: bool) -> str:
    """The program, with the family as a command of each verb it has."""
    parts = [START.format(rich="" if rich else "rich_markup_mode=None, pretty_exceptions_enable=False")]
    for verb, about in VERBS.items():
        name = f"_{verb.replace('-', '_')}"
        parts.append(f"{name} = typer.Typer({'' if rich else 'rich_markup_mode=None'})")
        parts.append(f"{name}.callback()(lambda: None)")
        parts.append(f"app.add_typer({name}, name={verb!r}, help={about!r})")
        if verb in card.verbs:
            parts.append(_command(name, card, verb))
    parts += [f"@app.command({noun!r})\ndef _{noun}() -> None: ..." for noun in NOUNS]
    return "\n".join([*parts, "app()\n"])


def _command(group: str, card: Family, verb: str) -> str:
    """One command with a parameter for every field of the card's options."""
    options = card.options(verb)
    lines = []
    for field in declared(options):
        hint, told = settings.hints(options)[field.name], field.metadata
        kind = "bool" if hint is bool else "list[str]" if settings.is_list(hint) else "str"
        info = f"typer.{'Argument' if told['positional'] else 'Option'}(help={told['help']!r})"
        default = {"bool": "False", "list[str]": "[]", "str": "''"}[kind]
        lines.append(f"    {field.name}: Annotated[{kind}, {info}] = {default},")
    body = "\n".join(lines)
    return f"@{group}.command({card.name!r})\ndef {group}_{card.name}(\n{body}\n) -> None:\n    {card.summary!r}\n"
