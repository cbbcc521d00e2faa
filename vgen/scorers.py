"""Scorers: what measures or captions a clip for curation; each is a plug-in of the entry-point group `vgen.scorers`.

A scorer writes fields of the manifest. Those that need no reference run by themselves; the others, models mostly, are
named with what they load: "clip-aesthetic=FOLDER". Nothing here imports what a scorer needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from vgen.errors import UsageError, VgenError, did_you_mean
from vgen.family import blamed, entries

GROUP = "vgen.scorers"
STANDIN = "builtin-standin"
CAPTION = "captions."  # what the fields of captions begin with


@dataclass(frozen=True)
class View:
    """What a scorer sees of a clip.

    `frames` (T, h, w, 3) uint8 RGB are a sample at `fps` frames a second with a shorter side of at most 256 pixels;
    `stills` are the first, middle and last frame at full size. `captions` have been found so far, by name.
    """

    frames: Any
    fps: float
    stills: Sequence[Any]
    captions: Mapping[str, str] = field(default_factory=dict)


class Scorer(Protocol):
    """A loaded scorer."""

    def __call__(self, view: View, /) -> Mapping[str, Any]:
        """The fields of this clip as plain values; None where a field cannot be told."""
        ...


@dataclass(frozen=True)
class Card:
    """What is known of a scorer before it is loaded.

    `fields` are those that it writes: "motion_score", or "captions.image" for a caption of that name. `load` is called
    as load(reference, device). `reference` says in a word what it loads, empty where nothing. Scorers with `needs`
    run after those that write captions. A new `version` makes scores that were kept void.
    """

    fields: tuple[str, ...]
    summary: str
    load: Callable[[str, str], Scorer]
    reference: str = ""
    needs_captions: bool = False
    standin: bool = False
    version: str = "1"

    @property
    def captions(self) -> bool:
        """Whether it writes captions."""
        return any(name.startswith(CAPTION) for name in self.fields)


@dataclass(frozen=True)
class Chosen:
    """A scorer that is to run, with its reference."""

    name: str
    card: Card
    reference: str = ""

    @property
    def told(self) -> str:
        """How the manifest names it."""
        return STANDIN if self.card.standin else f"{self.name}={self.reference}" if self.reference else self.name

    @property
    def identity(self) -> list[Any]:
        """What has to be the same for kept scores to hold: name, version, and the files behind a local reference."""
        folder = Path(self.reference)
        files = sorted(p for p in folder.rglob("*") if p.is_file()) if self.reference and folder.is_dir() else []
        stamps = [[str(p.relative_to(folder)), p.stat().st_size, p.stat().st_mtime_ns] for p in files]
        return [self.name, self.card.version, self.reference, stamps]


@cache
def _entries() -> dict[str, Any]:
    return entries(GROUP, "VGEN_SCORERS")


def installed() -> tuple[str, ...]:
    """Names of all scorers, whether they import or not."""
    return tuple(_entries())


def card(name: str) -> Card:
    """The card of a scorer. Raises UsageError for an unknown name, VgenError for a plug-in that does not import."""
    known = _entries()
    if name not in known:
        raise UsageError(f"No scorer '{name}'.", did_you_mean(name, known))
    do = "Mend or uninstall the package that provides it; the other scorers work without it."
    with blamed(f"The scorer '{name}' could not be imported", do):
        found = known[name]()
    if not isinstance(found, Card):
        raise VgenError(f"The scorer '{name}' gives a {type(found).__name__}, not a vgen.scorers.Card.")
    return found


def choose(named: Iterable[str], without: Iterable[str] = ()) -> tuple[list[Chosen], list[VgenError]]:
    """The scorers to run, in order, and the errors of installed ones that do not import.

    `named` ("NAME" or "NAME=REFERENCE") come first; then every installed one that needs no reference and writes no
    field that is taken, stand-ins last. `without` are left out. Raises UsageError for unknown names, for a reference
    that is missing or not taken, and for two that write the same field; VgenError for a named one that fails.
    """
    chosen: list[Chosen] = []
    taken: dict[str, str] = {}
    for text in named:
        name, _, reference = text.partition("=")
        one = Chosen(name, card(name), reference)
        if bool(one.card.reference) != bool(reference):
            form = f"{name}={one.card.reference}" if one.card.reference else name
            raise UsageError(f"--scorer {text} is not how '{name}' is named.", f"Write --scorer {form}")
        _take(one, chosen, taken)
    broken = []
    left_out = set(without)
    for name in left_out:
        card(name)
    cards: list[tuple[str, Card]] = []
    for name in installed():
        if name in left_out or any(one.name == name for one in chosen):
            continue
        try:
            cards.append((name, card(name)))
        except VgenError as error:
            broken.append(error)
    fixed = set(taken)
    for name, found in sorted(cards, key=lambda pair: (pair[1].standin, pair[0])):
        settled = set(taken) if found.standin else fixed
        if not found.reference and settled.isdisjoint(found.fields):
            _take(Chosen(name, found), chosen, taken)
    return sorted(chosen, key=_order), broken


def _order(one: Chosen) -> tuple[bool, bool]:
    """Captions first, then what is made from captions, then what measures clips by them."""
    return not one.card.captions, one.card.needs_captions


def _take(one: Chosen, chosen: list[Chosen], taken: dict[str, str]) -> None:
    """Add a scorer. Raises UsageError where another writes one of its fields."""
    for name in one.card.fields:
        if name in taken:
            raise UsageError(
                f"The scorers '{taken[name]}' and '{one.name}' both write '{name}'.",
                f"Leave one out: --without {one.name}",
            )
        taken[name] = one.name
    chosen.append(one)


def load(one: Chosen, device: str = "cpu") -> Scorer:
    """A scorer ready to run. Raises VgenError that names it."""
    do = f"Leave it out: --without {one.name}"
    with blamed(f"The scorer '{one.name}' could not be loaded", do, passing=(VgenError,)):
        return one.card.load(one.reference, device)


def score(one: Chosen, scorer: Scorer, view: View) -> dict[str, Any]:
    """The fields of a clip. Raises VgenError that names the scorer, whatever went wrong in it."""
    with blamed(f"the scorer '{one.name}' failed"):
        told = dict(scorer(view))
    if set(told) != set(one.card.fields):
        raise VgenError(f"the scorer '{one.name}' writes {sorted(told)}, its card says {sorted(one.card.fields)}")
    return told
