"""What a command says: answers to stdout, everything else to stderr; for people, for programs, or hardly at all."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Mode = Literal["human", "json", "quiet"]
OnStep = Callable[[str, int, int], None]  # name of the work, steps done, steps in all (0: not known)


def mode(json: bool, quiet: bool) -> Mode:
    """The mode that two flags ask for; --json decides what stdout carries, --quiet only silences stderr."""
    return "json" if json else "quiet" if quiet else "human"


def complain(text: str) -> None:
    """An error, always as text on stderr."""
    print(f"Error: {text}", file=sys.stderr, flush=True)


def close_streams() -> None:
    """Flush stdout; if its reader has gone, let the rest fall into nothing instead of failing at exit."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@dataclass(frozen=True)
class Out:
    """The only thing in vgen that prints."""

    mode: Mode = "human"
    silent: bool = False  # no warnings, hints, progress

    def result(self, path: Path | str, **facts: Any) -> None:
        """One finished output: its path, or with --json an object of the path and `facts`."""
        self.object({"output": str(path), **facts}, str(path))

    def object(self, data: Mapping[str, Any], text: str) -> None:
        """One answer: `data` as a line of JSON, or `text`."""
        line = json.dumps(data, default=str, ensure_ascii=False) if self.mode == "json" else text
        print(line, flush=True)

    def table(self, rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
        """Rows of answers: JSON objects, aligned columns, or when quiet the first column alone."""
        if self.mode == "human" and rows:
            cells = [[_cell(row.get(c)) for c in columns] for row in rows]
            wide = [max(len(line[i]) for line in cells) for i in range(len(columns))]
            lines = ["  ".join(c.ljust(w) for c, w in zip(line, wide, strict=True)).rstrip() for line in cells]
        else:
            lines = [_cell(row.get(columns[0])) for row in rows]
        for row, line in zip(rows, lines, strict=True):
            self.object(row, line)

    def say(self, text: str) -> None:
        """What goes on, on stderr; nothing when quiet."""
        if not self.silent:
            print(text, file=sys.stderr, flush=True)

    def warning(self, text: str) -> None:
        """Something that works but may surprise."""
        self.say(f"Warning: {text}")

    def hint(self, text: str) -> None:
        """What to do next."""
        self.say(f"Hint: {text}")

    @contextmanager
    def progress(self) -> Iterator[OnStep]:
        """A function `on_step(name, done, total)` that shows how far the work is: bars on a terminal, else lines."""
        if self.silent:
            yield lambda name, i, n: None
        elif sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
            with _bars() as on_step:
                yield on_step
        else:
            yield Lines(self.say)


def _cell(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return "" if value is None else str(value)


@contextmanager
def _bars() -> Iterator[OnStep]:
    """rich's progress bars on stderr, one for each name."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, Any] = {}

        def on_step(name: str, i: int, n: int) -> None:
            if name not in tasks or i < bars.tasks[tasks[name]].completed:  # the same work, begun again
                tasks[name] = bars.add_task(name, total=n or None, completed=i)
            bars.update(tasks[name], completed=i, total=n or None)

        yield on_step


@dataclass
class Lines:
    """Progress as plain lines: the first step, then every five seconds or tenth of the way, and the last one."""

    say: Callable[[str], None]
    every: float = 5.0
    clock: Callable[[], float] = time.monotonic
    _name: str = field(default="", init=False)
    _last: int = field(default=-1, init=False)
    _begun: tuple[float, int] = field(default=(0.0, 0), init=False)
    _spoke: tuple[float, int] = field(default=(0.0, 0), init=False)

    def __call__(self, name: str, i: int, n: int) -> None:
        now = self.clock()
        fresh = name != self._name or i < self._last
        if fresh:
            self._name, self._begun = name, (now, i)
        self._last = i
        waited, came = now - self._spoke[0], i - self._spoke[1]
        due = waited >= self.every or (n and came * 10 >= n and waited >= 1) or (n and i == n)
        if fresh or due:
            self._spoke = (now, i)
            self.say(f"{name} {i}/{n or '?'}{self._left(now, i, n)}")

    def _left(self, now: float, i: int, n: int) -> str:
        """Time left at the mean pace since the first step seen."""
        begun, first = self._begun
        if not n or i >= n or i <= first:
            return ""
        left = round((now - begun) / (i - first) * (n - i))
        return f", {left // 60}:{left % 60:02d} left"
