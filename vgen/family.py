"""A family of models as a value: its card, its checkpoints and its rules.

Nothing here imports torch: help, completion, `families` and `--dry-run` read cards and never a weight.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, TypeVar

from vgen.errors import UsageError, VgenError, did_you_mean
from vgen.options import READ_ON, RunOptions, flag

GROUP = "vgen.families"
Chosen = TypeVar("Chosen", bound=RunOptions)


@dataclass(frozen=True)
class Rule:
    """Valid values of a size or a length: `step` * k + `offset`, from `low` to `high`."""

    step: int = 1
    offset: int = 0
    low: int = 1
    high: int | None = None

    def nearest(self, value: int) -> tuple[int, ...]:
        """The valid values next to `value`: one below and one above, where they exist."""
        below = (value - self.offset) // self.step * self.step + self.offset
        lowest = -(-(self.low - self.offset) // self.step) * self.step + self.offset
        pair = {max(below, lowest), max(below + self.step, lowest)}
        return tuple(sorted(v for v in pair if self.high is None or v <= self.high))

    def check(self, name: str, value: int) -> None:
        """Refuse a value outside the rule. Raises UsageError that names the nearest valid ones."""
        if self.low <= value and (self.high is None or value <= self.high) and (value - self.offset) % self.step == 0:
            return
        form = f"{self.step}k+{self.offset}" if self.offset else f"a multiple of {self.step}"
        bound = f" from {self.low}" + (f" to {self.high}" if self.high else "") if self.low > 1 or self.high else ""
        near = " or ".join(str(v) for v in self.nearest(value)) or str(self.high)
        raise UsageError(f"{flag(name)} {value} is not {form}{bound}.", f"Nearest: {near}.")


@dataclass(frozen=True)
class Checkpoint:
    """One set of weights: where it lies, under which licence, and what it was made for.

    `defaults` fills options left open; `rules` bounds them; `modes` says what it can start from
    ("text", "image", "video"). `facts` holds what only the family reads.
    """

    tag: str
    repo: str = ""
    revision: str = "main"
    license: str = ""
    summary: str = ""
    modes: tuple[str, ...] = ("text",)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    rules: Mapping[str, Rule] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PartCard:
    """A network of a family that can be trained by itself, and what it is trained on.

    `options` are those that it reads and other parts do not, beside those of all parts on such data. One that learns no
    `captions` takes clips without any.
    """

    name: str
    summary: str
    trains_on: Literal["latents", "pixels"] = "latents"
    options: tuple[str, ...] = ()
    captions: bool = True

    @property
    def own(self) -> tuple[str, ...]:
        """All options that not every part reads, and this one does."""
        return (*READ_ON[self.trains_on], *self.options)


def _nothing(options: Any, checkpoint: Checkpoint) -> None:
    """A family without rules of its own."""


@dataclass(frozen=True)
class Family:
    """The card of a family. `load` is "module:function", called as load(folder, checkpoint, machine) -> Model.

    `starts_from` names families whose checkpoints and adapters this one takes too. `lora_targets` are the layers that
    train-lora adapts when none are named. `comfy_names` are pairs (pattern, word)
    that turn a layer's name into ComfyUI's own; None where ComfyUI takes the names of diffusers.
    """

    name: str
    summary: str
    paper: str
    verbs: Mapping[str, type[RunOptions]]
    load: str
    checkpoints: tuple[Checkpoint, ...]
    parts: tuple[PartCard, ...] = ()
    demo: Path | None = None
    default: str = ""
    starts_from: tuple[str, ...] = ()
    lora_targets: tuple[str, ...] = ()
    comfy_names: tuple[tuple[str, str], ...] | None = None
    check: Callable[[Any, Checkpoint], None] = _nothing
    describe: Callable[[Path], Checkpoint] | None = None
    examples: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def weightless(self) -> bool:
        """Whether the family computes without any weights, so that there are no checkpoints to choose from."""
        return not (self.checkpoints or self.demo or self.describe)

    def checkpoint(self, tag: str) -> Checkpoint:
        """The checkpoint of that tag. Raises UsageError."""
        for one in self.checkpoints:
            if one.tag == tag:
                return one
        raise UsageError(
            f"'{self.name}' has no checkpoint '{tag}'.", did_you_mean(tag, (c.tag for c in self.checkpoints))
        )

    def part(self, name: str) -> PartCard:
        """The part of that name. Raises UsageError."""
        for one in self.parts:
            if one.name == name:
                return one
        raise UsageError(f"'{self.name}' has no part '{name}'.", did_you_mean(name, (p.name for p in self.parts)))

    def options(self, verb: str) -> type[RunOptions]:
        """The options of a verb. Raises UsageError where the family does not have it."""
        if verb not in self.verbs:
            have = ", ".join(self.verbs)
            raise UsageError(f"'{self.name}' has no verb '{verb}'.", f"It has: {have}.")
        return self.verbs[verb]

    def loader(self) -> Callable[..., Any]:
        """The function that loads the model (vgen.model.Model). Imports torch."""
        return fetch(self.load)


def entries(group: str, variable: str) -> dict[str, Any]:
    """Names of installed plug-ins and what loads each: entry points, then those of VARIABLE="name=module:attr,..."."""
    from importlib.metadata import entry_points  # 10 ms that the first page of help does without

    found: dict[str, Any] = {point.name: point.load for point in entry_points(group=group)}
    for pair in filter(None, os.environ.get(variable, "").split(",")):
        name, _, target = pair.partition("=")
        found[name.strip()] = partial(fetch, target.strip())
    return dict(sorted(found.items()))


@contextmanager
def blamed(what: str, do: str = "", *, passing: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Run a stranger's plug-in in here, which may fail in any way: that becomes a VgenError which begins with `what`.

    Errors of the kinds `passing` are its own to tell.
    """
    try:
        yield
    except passing:
        raise
    except Exception as error:
        raise VgenError(f"{what}: {type(error).__name__}: {error}", do) from error


@cache
def _entries() -> dict[str, Any]:
    return entries(GROUP, "VGEN_FAMILIES")


def installed() -> tuple[str, ...]:
    """Names of all families, whether they import or not. Instant."""
    return tuple(_entries())


@cache
def family(name: str) -> Family:
    """The card of a family. Raises UsageError for an unknown name, VgenError for a plugin that does not import."""
    found = _entries()
    if name not in found:
        raise UsageError(f"No family '{name}'.", did_you_mean(name, found))
    do = "Mend or uninstall the package that provides it; the other families work without it."
    with blamed(f"The plugin '{name}' could not be imported", do):
        card = found[name]()
    if not isinstance(card, Family):
        raise VgenError(f"The plugin '{name}' gives a {type(card).__name__}, not a vgen.family.Family.")
    return card


def families() -> tuple[list[Family], list[VgenError]]:
    """All cards that import, and the errors of those that do not."""
    cards: list[Family] = []
    broken: list[VgenError] = []
    for name in installed():
        try:
            cards.append(family(name))
        except VgenError as error:
            broken.append(error)
    return cards, broken


def resolve(card: Family, options: Chosen, checkpoint: Checkpoint) -> Chosen:
    """Fill open options from the checkpoint, and refuse what it cannot do. Raises UsageError."""
    names = {f.name for f in fields(options)}
    native = {f.name for f in fields(options) if f.metadata.get("native", True)}
    fill = {k: v for k, v in checkpoint.defaults.items() if k in native and getattr(options, k) is None}
    full = replace(options, **fill)
    for name, rule in checkpoint.rules.items():
        if name in names and getattr(full, name) is not None:
            rule.check(name, getattr(full, name))
    _check_part(card, full, checkpoint)
    _check_needs(options)
    card.check(full, checkpoint)
    return full


def _check_part(card: Family, options: Any, checkpoint: Checkpoint) -> None:
    """Refuse training options that only other parts read. Raises UsageError."""
    usual = {f.name: checkpoint.defaults.get(f.name, f.default) for f in fields(options)}
    own = {part.name: part.own for part in card.parts}
    read = own.get(getattr(options, "part", ""))
    if read is None:
        return
    for name in (name for names in own.values() for name in names if name in usual and name not in read):
        if getattr(options, name) not in (usual[name], None, []):
            raise UsageError(f"{flag(name)} does nothing for --part {options.part}.", "Leave it out.")


def _check_needs(options: RunOptions) -> None:
    """Refuse options that do nothing without another one. Raises UsageError."""
    for field_ in fields(options):
        needed = field_.metadata.get("needs")
        if needed and not getattr(options, needed) and getattr(options, field_.name) != field_.default:
            raise UsageError(f"{flag(field_.name)} does nothing without {flag(needed)}.", "Give both, or neither.")


def read_config(folder: Path, name: str, kind: str) -> dict[str, Any]:
    """A configuration of a folder that should hold a checkpoint of `kind`. Raises VgenError."""
    try:
        return dict(json.loads((folder / name).read_text()))
    except (OSError, ValueError) as error:
        raise VgenError(
            f"{folder} is not a {kind} checkpoint: {name} cannot be read ({error}).",
            "A checkpoint is a folder in diffusers' layout: model_index.json, and a folder for each network.",
        ) from error


def described(
    folder: Path, modes: tuple[str, ...], defaults: Mapping[str, Any], rules: Mapping[str, Rule]
) -> Checkpoint:
    """The checkpoint in a folder that no card names, with what its vgen.json, if any, tells. Raises VgenError."""
    extra = read_config(folder, "vgen.json", "vgen") if (folder / "vgen.json").exists() else {}
    return Checkpoint(
        tag=str(extra.get("tag", folder.name)),
        license=str(extra.get("license", "")),
        summary=str(extra.get("summary", "")),
        modes=modes,
        defaults={**defaults, **extra.get("defaults", {})},
        rules=rules,
    )


def fetch(target: str) -> Any:
    """The object that "module:name" names."""
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


def with_verb(cards: Iterable[Family], verb: str) -> list[str]:
    """Names of the families that have a verb."""
    return [card.name for card in cards if verb in card.verbs]
