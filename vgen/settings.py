"""Values of options from flags, environment and TOML files, all checked by the one declaration in the dataclass."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field
from difflib import get_close_matches
from fractions import Fraction
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from vgen.errors import UsageError, did_you_mean
from vgen.options import declared, flag

RECORD = "record"  # the table of a settings file that tells of a run and sets nothing
WORDS = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
VARIABLES = ("VGEN_HOME", "VGEN_DEBUG", "VGEN_FAMILIES")  # those that are not options
KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path"}
KINDS[Fraction] = "a rate such as 30, 29.97 or 30000/1001"


@cache
def hints(options: type) -> dict[str, Any]:
    """The type of each declared field, without its `None`."""
    types = get_type_hints(options)
    return {f.name: _given(types[f.name]) for f in declared(options)}


def _given(hint: Any) -> Any:
    """The type that a value takes when it is given: int | None -> int."""
    if get_origin(hint) in (Union, UnionType):
        return next(part for part in get_args(hint) if part is not type(None))
    return hint


def is_list(hint: Any) -> bool:
    """Whether an option may be given more than once."""
    return get_origin(hint) is list


def choices(hint: Any) -> tuple[str, ...]:
    """The words that an option may be, or nothing where it is free."""
    return tuple(map(str, get_args(hint))) if get_origin(hint) is Literal else ()


def default(field: Field[Any]) -> Any:
    """The default of a field, made afresh."""
    return field.default_factory() if field.default_factory is not MISSING else field.default


def convert(options: type, field: Field[Any], raw: Any, where: str) -> Any:
    """One value as the field's type: text is parsed, TOML values are compared. Raises UsageError that names `where`."""
    hint = hints(options)[field.name]
    if is_list(hint):
        if isinstance(raw, str):
            raw = [word.strip() for word in raw.split(",") if word.strip()]
        if not isinstance(raw, list):
            raise UsageError(f"{where}: {raw!r} is not a list.", f'Write {field.name} = ["..."].')
        (item,) = get_args(hint)
        return [_one(item, field, part, where) for part in raw]
    return _one(hint, field, raw, where)


def _one(hint: Any, field: Field[Any], raw: Any, where: str) -> Any:
    words = choices(hint)
    if words:
        if raw not in words:
            raise UsageError(f"{where}: {raw!r} is not one of its words.", did_you_mean(str(raw), words))
        return raw
    try:
        value = _parse(hint, raw)
    except (ValueError, ZeroDivisionError):
        raise UsageError(f"{where}: {raw!r} is not {KINDS[hint]}.") from None
    low, high = field.metadata.get("low"), field.metadata.get("high")
    if (low is not None and value < low) or (high is not None and value > high) or value != value:
        raise UsageError(f"{where}: {raw} is out of range.", f"It is {bounds(field)}.")
    return value


def _parse(hint: Any, raw: Any) -> Any:
    """`raw` as a plain type. Raises ValueError."""
    if hint is bool:
        if isinstance(raw, str) and raw.lower() in WORDS:
            return WORDS[raw.lower()]
        if isinstance(raw, bool):
            return raw
    elif hint in (int, float):
        if isinstance(raw, (str, int, hint)) and not isinstance(raw, bool):
            return hint(raw)
    elif hint is Fraction:
        if isinstance(raw, (str, int, float)) and not isinstance(raw, bool):
            return Fraction(str(raw))
    elif isinstance(raw, str) and (raw or hint is str):
        return Path(raw).expanduser() if hint is Path else raw
    raise ValueError(raw)


def bounds(field: Field[Any]) -> str:
    """The range of a field in words, or nothing."""
    low, high = field.metadata.get("low"), field.metadata.get("high")
    if low is not None and high is not None:
        return f"{low:g} to {high:g}"
    return f"at least {low:g}" if low is not None else f"at most {high:g}" if high is not None else ""


def toml(path: Path, name: str) -> dict[str, Any]:
    """The table in a TOML file that the flag `name` names. Raises UsageError."""
    import tomllib  # 2 ms that help pages need not pay

    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{name} {path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise UsageError(f"{name} {path} is not TOML: {error}.") from error


def read(path: Path) -> dict[str, Any]:
    """The settings of a TOML file; a run record is one, and its [record] table is left out. Raises UsageError."""
    table = toml(path, "--config")
    table.pop(RECORD, None)
    return table


def strays(environ: Mapping[str, str], options: Iterable[type]) -> dict[str, str]:
    """Variables that look like a misspelt one of ours, and the one that each resembles."""
    known = {f"VGEN_{f.name.upper()}" for one in options for f in declared(one)} | {*VARIABLES}
    words = (name for name in environ if name.startswith("VGEN_") and name not in known)
    return {name: near[0] for name in words if (near := get_close_matches(name, known, n=1, cutoff=0.8))}


def gather(
    options: type, flags: Mapping[str, Any], environ: Mapping[str, str], config: Path | None
) -> tuple[dict[str, Any], dict[str, str]]:
    """Values of all fields and where each came from: flag, else environment, else file, else default.

    `flags` holds only what was given. Raises UsageError for unknown keys of the file and for values of the wrong type.
    """
    table = read(config) if config else {}
    known = {f.name: f for f in declared(options)}
    for key in table:
        if key not in known:
            raise UsageError(f"{config}: no option '{key}'.", did_you_mean(key, known))
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for name, field in known.items():
        shown = field.metadata["metavar"] or name if field.metadata["positional"] else flag(name)
        variable = f"VGEN_{name.upper()}"
        if name in flags:
            values[name], origins[name] = convert(options, field, flags[name], shown), "flag"
        elif environ.get(variable) and not field.metadata["positional"]:
            values[name], origins[name] = convert(options, field, environ[variable], variable), variable
        elif name in table:
            values[name], origins[name] = convert(options, field, table[name], f"{config}: {name}"), str(config)
        else:
            values[name], origins[name] = default(field), "default"
    return values, origins
