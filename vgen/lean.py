"""Leaner start: libraries that diffusers imports because they are installed, though this run does not use them.

peft, bitsandbytes, transformers and torch.compile's tracer are more than half of what importing a network of diffusers
costs, and a third of transformers is for several machines. A process says once which it does without (`leave_out`);
where diffusers, transformers or peft are then imported (`imports`), they find the others absent, and torch built for
one machine, which they are made for. Afterwards everything can be imported, as ever; but what was imported so does
without: a run that compiles, quantises or runs in several processes must not leave out anything.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

LIBRARIES = ("bitsandbytes", "peft", "transformers")
TRACER = "torch._dynamo"
_left_out: set[str] = set()


def leave_out(*kept: str) -> None:
    """Say that this process uses none of the libraries but those `kept`: from now on `imports` spares the others."""
    _left_out.update({*LIBRARIES, TRACER}.difference(kept))


@contextmanager
def imports(*needed: str) -> Iterator[None]:
    """Import diffusers, transformers or peft, or load their networks, in here. `needed` must not be missing this time.

    Does nothing before `leave_out`, nor for libraries that are imported already.
    """
    with _absent(_left_out.difference(needed)), _alone():
        yield


@contextmanager
def untraced() -> Iterator[None]:
    """Train in here: torch's optimizers import the tracer only to mark what they do."""
    with _absent(_left_out.intersection([TRACER])):
        yield


@contextmanager
def _absent(names: set[str]) -> Iterator[None]:
    """Have those of the libraries that are not imported yet seem not to be installed."""
    spared = {name for name in names if name not in sys.modules}
    stand_ins: dict[str, Any] = {name: _Tracer() if name == TRACER else None for name in spared}
    sys.modules.update(stand_ins)  # None is Python's own way to say that a module cannot be imported
    try:
        yield
    finally:
        for name, stand_in in stand_ins.items():
            if sys.modules.get(name, ...) is stand_in:
                del sys.modules[name]


@contextmanager
def _alone() -> Iterator[None]:
    """Have torch say that it was built without `torch.distributed`."""
    if not _left_out:
        yield
        return
    from torch import distributed

    told = distributed.is_available
    distributed.is_available = bool  # bool() is False
    try:
        yield
    finally:
        distributed.is_available = told


def _same(function: Any = None, *_: Any, **__: Any) -> Any:
    """What a decorator gives that marks nothing, whether it is called with the function or before it."""
    return _same if function is None else function


class _Tracer(ModuleType):
    """Stands where torch._dynamo will be: its marks for the compiler mark nothing, all else is the real one's.

    Libraries import it only to mark functions that a compiler should leave alone, or take as they are. Optimizers mark
    their own steps, and recomputing activations looks at its settings, a module that does without the rest.
    """

    allow_in_graph = assume_constant_result = disable = graph_break = staticmethod(_same)

    def __init__(self) -> None:
        super().__init__(TRACER)
        spec = importlib.util.find_spec(TRACER)
        self.__path__ = (spec and spec.submodule_search_locations) or []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # the import system asks for these
            raise AttributeError(name)
        if name == "config":
            return importlib.import_module(f"{TRACER}.{name}")
        if sys.modules.get(TRACER) is self:
            del sys.modules[TRACER]
        return getattr(importlib.import_module(TRACER), name)
