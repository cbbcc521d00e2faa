"""What a training run depends on, kept with its state: a resume with anything else is refused, and shown. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vgen import record, tensorfile
from vgen.errors import UsageError
from vgen.options import flag

FREE = (  # settings that a resumed run may change: where things are, how fast they go, what is written and shown
    "output",
    "overwrite",
    "resume",
    "checkpoint",
    "data",
    "curriculum",
    "device",
    "threads",
    "compile",
    "gradient_checkpointing",
    "checkpointing_steps",
    "save_dtype",
    "eval_steps",
    "validation_prompt",
    "min_clips",
    "check_samples",
    "validation_image",
    "validation_steps",
    "report_to",
)
LENGTH = "max_train_steps"  # may change while the learning rate does not depend on it


def identity(options: Any, data: Mapping[str, Any], base: Mapping[str, str]) -> dict[str, Any]:
    """What decides the numbers of a run: its settings, its `data` as `Data.identity` has them, its `base` weights.

    The contents of data, curriculum and base are compared, so where they lie may change.
    """
    settings = {name: value for name, value in record.plain(options).items() if name not in FREE}
    return {"settings": settings, "data": dict(data), "base": dict(base)}


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """What is not the same: (name, then, now), settings first."""
    rows = []
    for kind in ("settings", "data", "base"):
        old, new = then.get(kind, {}), now.get(kind, {})
        for name in sorted(old.keys() | new.keys()):
            told = {"settings": flag(name), "data": f"data: {name}"}.get(kind, name)
            if old.get(name) != new.get(name) and not (name == LENGTH and _constant(old) and _constant(new)):
                rows.append((told, _shown(old.get(name)), _shown(new.get(name))))
    return rows


def _constant(settings: Mapping[str, Any]) -> bool:
    return settings.get("lr_scheduler") == "constant"


def _shown(value: Any) -> str:
    text = "-" if value is None else str(value)
    return text if len(text) <= 40 else text[:37] + "..."


def require(state: Path, now: Mapping[str, Any]) -> None:
    """Raises UsageError, with a table of the differences, where the saved state is of a run with another identity."""
    if not state.exists():
        return
    then = tensorfile.header(state).record.get("identity")
    rows = differences(then, now) if then else []
    if rows:
        lines = [("", "then", "now"), *rows]
        wide = [max(len(line[i]) for line in lines) for i in range(2)]
        table = "\n".join(f"    {a.ljust(wide[0])}  {b.ljust(wide[1])}  {c}".rstrip() for a, b, c in lines)
        raise UsageError(
            f"The run in {state.parent.parent} cannot go on with this:\n{table}",
            f"Resume with what it had (--config {state.parent.parent / 'run.toml'} --resume), or start anew"
            " with --overwrite.",
        )
