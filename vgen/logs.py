"""Logs of a training run: a file of JSON lines always, and a tracker's page where one is asked for."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from vgen.errors import UsageError
from vgen.files import explained, replacing

PROJECT = "vgen"


def require(tracker: str) -> None:
    """Raises UsageError where the package of a tracker is not installed. Imports nothing."""
    if tracker != "none" and importlib.util.find_spec(tracker) is None:
        raise UsageError(f"--report-to {tracker}: the package is not installed.", f"pip install 'vgen[{tracker}]'")


@dataclass(frozen=True)
class Log:
    """Where figures go. Write with `write`, one mapping with a "step" at a time.

    `sent` are the steps, each with the names of its figures, that the tracker has from a run that was killed.
    """

    file: TextIO
    path: Path
    tracker: Any = None
    sent: Set[tuple[str, ...]] = frozenset()

    def write(self, figures: Mapping[str, Any]) -> None:
        """Log some figures of a step. Raises VgenError, for a full disk too."""
        with explained(f"write {self.path}"):
            self.file.write(json.dumps(figures) + "\n")
        if self.tracker is not None and _name(figures) not in self.sent:
            numbers = {name: value for name, value in figures.items() if isinstance(value, (int, float))}
            self.tracker.log(numbers, step=numbers.pop("step"))

    def flush(self) -> None:
        """Bring the lines to the disk. Raises VgenError."""
        with explained(f"write {self.path}"):
            self.file.flush()


@contextmanager
def opened(
    path: Path, done: int, tracker: str = "none", run: str = "", settings: Mapping[str, Any] | None = None
) -> Iterator[Log]:
    """The log at `path`, cut back to the `done` steps that the state has seen; trackers go on with the run `run`.

    A tracker gets no step twice: those that come again are not sent again, TensorBoard forgets them instead.
    """
    before = lines(path)
    with replacing(path) as kept:
        kept.write("".join(json.dumps(line) + "\n" for line in before if line["step"] <= done).encode())
    sent = {_name(line) for line in before if line["step"] > done and tracker != "tensorboard"}
    with redirect_stdout(sys.stderr) if tracker != "none" else nullcontext():  # trackio prints, and stdout is not its
        started = _tracker(tracker, path.parent, done, run, settings or {}) if tracker != "none" else None
        try:
            with path.open("a", encoding="utf-8", buffering=1) as file:  # by lines: people follow it
                yield Log(file, path, started, sent)
        finally:
            if started is not None:
                _finish(tracker, started)


def _name(figures: Mapping[str, Any]) -> tuple[str, ...]:
    """What tells a line of the log from the others: its step, and the names of its figures."""
    return (str(figures["step"]), *sorted(figures))


def _finish(name: str, tracker: Any) -> None:
    """End a tracker's run."""
    if name == "trackio":  # only its own function forgets the run, which would else end, and print, at exit again
        importlib.import_module(name).finish()
    else:
        tracker.finish()


def lines(path: Path) -> list[dict[str, Any]]:
    """The objects in a log; what a kill left of the last line is no object."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            told = json.loads(line)
        except ValueError:
            continue
        if isinstance(told, dict) and isinstance(told.get("step"), int):
            found.append(told)
    return found


def last(path: Path) -> dict[str, Any]:
    """The last figures of training in a log."""
    return next((line for line in reversed(lines(path)) if "loss" in line), {})


def _tracker(name: str, folder: Path, done: int, run: str, settings: Mapping[str, Any]) -> Any:
    """A tracker of accelerate's that has begun."""
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState()
    kind = LOGGER_TYPE_TO_CLASS[name]
    if kind.requires_logging_directory:
        made = kind(name, logging_dir=folder, purge_step=done + 1)
    elif name == "wandb":
        made = kind(PROJECT, id=run, resume="allow", dir=str(folder))
    else:
        made = kind(PROJECT, name=run, resume="allow")
    if hasattr(made, "start"):  # older accelerate starts it when it is made
        made.start()
    plain = {k: v if isinstance(v, (bool, int, float, str)) else str(v) for k, v in settings.items()}
    if not kind.requires_logging_directory:  # TensorBoard would write a second run for them
        made.store_init_configuration(plain)
    return made
