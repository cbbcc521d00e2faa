"""Help pages and unknown words: the classes behind every command of the house.

Of Typer only public names are used, and from below its top level `TyperGroup`, `TyperCommand` and `get_command`.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from vgen.errors import UsageError, VgenError, did_you_mean

Row = tuple[str, str]
HELP = {"help_option_names": ["-h", "--help"]}


def plain_app(**settings: Any) -> typer.Typer:
    """A Typer app as the house has them: plain help (rich's costs 50 ms), -h, our own errors."""
    house: dict[str, Any] = {"add_completion": False, "no_args_is_help": True, "context_settings": HELP}
    return typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, **{**house, **settings})


class House:
    """What all commands share: examples at the foot of the page, and near words for unknown flags."""

    examples: tuple[str, ...] = ()

    def get_help_option(self, ctx: Any) -> Any:
        """The --help option. It has a default, because Typer 0.29 imports pydantic (50 ms) to check a None."""
        option = super().get_help_option(ctx)  # type: ignore[misc]
        if option is not None:
            option.default = False
        return option

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse flags. Raises UsageError for one that does not exist, with the nearest that does."""
        params = self.params  # type: ignore[attr-defined]
        known = {name for p in params for name in (*p.opts, *p.secondary_opts)} | set(ctx.help_option_names)
        for word in self.own(args):
            name = word.partition("=")[0]
            if name.startswith("--") and name not in known and not ctx.resilient_parsing:
                near = get_close_matches(name, known, n=1)
                do = f"Did you mean {near[0]}? " if near else ""
                raise UsageError(f"'{ctx.command_path}' has no flag {name}.", f"{do}See: {ctx.command_path} --help")
        rest: list[str] = super().parse_args(ctx, args)  # type: ignore[misc]
        return rest

    def own(self, args: list[str]) -> Iterable[str]:
        """Those of the arguments that this command reads."""
        return itertools.takewhile(lambda word: word != "--", args)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the examples, unwrapped so that they can be copied."""
        with formatter.section("Examples"):
            for line in self.shown():
                formatter.write(f"  {line}\n")

    def shown(self) -> Iterable[str]:
        """The examples of the page."""
        return self.examples


class Page(House, TyperCommand):
    """A verb of a family, with its options in panels."""

    sections: dict[str, list[Row]]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write one section for each panel that has rows."""
        for title, rows in self.sections.items():
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)


class Group(House, TyperGroup):
    """A group of commands."""

    def own(self, args: list[str]) -> Iterable[str]:
        """The flags before the first command."""
        return itertools.takewhile(lambda word: word.startswith("-"), args)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of that name. Raises UsageError with the nearest one."""
        found = super().get_command(ctx, cmd_name)
        if found is None and not ctx.resilient_parsing:
            do = did_you_mean(cmd_name, self.commands)
            raise UsageError(f"'{ctx.command_path}' has no command '{cmd_name}'.", do)
        return found


class Root(Group):
    """The top of the command line."""

    def shown(self) -> Iterable[str]:
        """What shows the families, and what one of them does: looking for those installed would double the time."""
        return ("vgen families", "vgen sample FAMILY --help")


def noun(*lines: str) -> type[TyperCommand]:
    """The class of an ordinary command with examples."""

    class Noun(House, TyperCommand):
        examples = lines

    return Noun


def examples(verb: str, count: int) -> list[str]:
    """The first examples of a verb among the installed families; imports no more cards than it needs."""
    from vgen.family import family, installed

    found: list[str] = []
    for name in installed():
        if len(found) < count:
            with contextlib.suppress(VgenError):  # a broken plugin is told where families are listed
                found += family(name).examples.get(verb, ())
    return found[:count]
