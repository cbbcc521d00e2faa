"""From a card to a command line: the options dataclass of a verb becomes flags, a help page and completion."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import Field
from fractions import Fraction
from inspect import Parameter, Signature
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.main import get_command

from vgen import settings
from vgen.commands.output import Out
from vgen.commands.pages import HELP, Group, Page, Row, examples, plain_app
from vgen.errors import UsageError
from vgen.family import Family, families, family, with_verb
from vgen.options import declared, flag

Perform = Callable[[str, Family, dict[str, Any]], None]
HOUSE: dict[str, tuple[Any, str, str]] = {  # flags of every verb: type, declaration, help
    "config": (Path, "--config", "Settings from FILE.toml; a run record is one."),
    "dry_run": (bool, "--dry-run", "Show what would run, and load nothing."),
    "cost": (bool, "--cost", "With --dry-run: also count weights, multiplications and memory."),
    "json": (bool, "--json", "Answer in JSON, one object per line."),
    "quiet": (bool, "--quiet", "Only errors and the answer."),
}
METAVARS = {int: "N", float: "X", str: "TEXT", Path: "PATH", Fraction: "RATE"}


def verb_group(perform: Perform) -> type[Group]:
    """The group of a verb: the families that have it, of which only the one asked for is built."""

    class Verb(Group):
        """Families as commands. The group's name is the verb."""

        def list_commands(self, ctx: Any) -> list[str]:
            return with_verb(families()[0], self.name or "")

        def get_command(self, ctx: Any, cmd_name: str) -> Any:
            if ctx.resilient_parsing and cmd_name not in self.list_commands(ctx):
                return None  # a half-typed word in shell completion
            return command(self.name or "", _with(self.name or "", cmd_name), perform)

        def format_commands(self, ctx: Any, formatter: Any) -> None:
            cards, broken = families()
            for error in broken:
                Out().warning(error.message)
            rows = [(card.name, card.summary) for card in cards if self.name in card.verbs]
            with formatter.section("Families"):
                formatter.write_dl(rows or [("(none)", f"No installed family has '{self.name}' yet.")])

        def shown(self) -> Iterable[str]:
            return examples(self.name or "", 2) or ("vgen families", "vgen doctor")

    return Verb


def _with(verb: str, name: str) -> Family:
    """The card of a family that has a verb. Raises UsageError that says who has it."""
    try:
        card = family(name)
        card.options(verb)
    except UsageError as error:
        have = ", ".join(with_verb(families()[0], verb)) or "none of the installed families"
        raise UsageError(error.message, f"{error.do} With '{verb}': {have}.") from None
    return card


def command(verb: str, card: Family, perform: Perform) -> Any:
    """The command of one verb of one family."""
    options = card.options(verb)

    def act(**given: Any) -> None:
        perform(verb, card, {k: v for k, v in given.items() if v not in (None, [], ())})

    parameters = [*_parameters(card, options), *_house()]
    vars(act).update(__signature__=Signature(parameters), __annotations__={p.name: p.annotation for p in parameters})
    app = plain_app()
    app.command(card.name, cls=Page, help=f"{card.summary} ({card.paper})", context_settings=HELP)(act)
    page: Any = get_command(app)
    page.examples = card.examples.get(verb, ())
    page.sections = sections(card, verb)
    return page


def _parameters(card: Family, options: type) -> Iterator[Parameter]:
    """Every value reaches `settings.convert` as text, or as True or False, and as None where it was not given."""
    for field in declared(options):
        hint, told = settings.hints(options)[field.name], field.metadata
        kind: Any = bool if hint is bool else list[str] if settings.is_list(hint) else str
        suggest = _suggest(card, field, hint)
        if told["positional"]:
            info = typer.Argument(metavar=told["metavar"], help=told["help"], autocompletion=suggest)
        else:
            long = flag(field.name) + (f"/--no-{flag(field.name)[2:]}" if kind is bool else "")
            names = [long, *([told["short"]] if told["short"] else [])]
            info = typer.Option(*names, help=told["help"], autocompletion=suggest, show_default=False)
        yield _keyword(field.name, kind, info)


def _keyword(name: str, kind: Any, info: Any) -> Parameter:
    return Parameter(name, Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, info])


def _house() -> Iterator[Parameter]:
    for name, (kind, long, told) in HOUSE.items():
        names = [long, "-q"] if name == "quiet" else [long]
        yield _keyword(name, kind, typer.Option(*names, help=told, show_default=False))


def references(card: Family) -> list[str]:
    """The checkpoints of a family, as --checkpoint takes them."""
    return [*(f"{card.name}.{c.tag}" for c in card.checkpoints), *(["demo"] if card.demo else [])]


def _suggest(card: Family, field: Field[Any], hint: Any) -> Callable[[str], list[str]] | None:
    """What shell completion offers for a field."""
    words = list(settings.choices(hint))
    if field.name == "checkpoint":
        words = references(card)
    elif field.name == "part":
        words = words or [part.name for part in card.parts]
    return (lambda incomplete: [word for word in words if word.startswith(incomplete)]) if words else None


def sections(card: Family, verb: str) -> dict[str, list[Row]]:
    """The help page of a verb: panels of rows (flag, help), arguments first, then what the family comes with."""
    options = card.options(verb)
    panels: dict[str, list[Row]] = {"Arguments": [], "Options": []}
    for field in declared(options):
        panel = "Arguments" if field.metadata["positional"] else field.metadata["panel"]
        panels.setdefault(panel, []).append(_row(options, field))
    house = [(f"-q, {d}" if n == "quiet" else f"{d} FILE" if k is Path else d, h) for n, (k, d, h) in HOUSE.items()]
    panels["This run"] = [*house, ("-h, --help", "Show this page.")]
    if card.checkpoints:
        panels["Checkpoints"] = [(f"{card.name}.{c.tag}", _about(c.summary, c.license)) for c in card.checkpoints]
    if card.parts and "part" in {f.name for f in declared(options)}:
        panels["Parts"] = [(part.name, part.summary) for part in card.parts]
    return panels


def _about(summary: str, license: str) -> str:
    return f"{summary}; licence {license.partition(' ')[0]}" if license else summary


def _row(options: type, field: Field[Any]) -> Row:
    """The flag of a field with its value's form, and its help with range and default."""
    hint, told, default = settings.hints(options)[field.name], field.metadata, settings.default(field)
    metavar = told["metavar"] or "|".join(settings.choices(hint)) or METAVARS.get(hint, "TEXT")
    if told["positional"]:
        return told["metavar"] or field.name.upper(), told["help"]
    on = f"--no-{flag(field.name)[2:]}" if default is True else flag(field.name)
    name = ", ".join(filter(None, (told["short"], on)))
    notes = [settings.bounds(field)]
    if default not in (None, "", []) and hint is not bool:
        notes.append(f"default {default}")
    extra = "; ".join(filter(None, notes))
    return (name if hint is bool else f"{name} {metavar}"), told["help"] + (f" [{extra}]" if extra else "")
