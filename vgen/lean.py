"""Leaner start: libraries that diffusers imports because they are installed, though this run does not use them.

peft, bitsandbytes, transformers and torch.compile's tracer are more than half of what importing a network of diffusers
costs. A process that only runs networks says so once (`leave_out`); where families then import diffusers (`imports`),
it finds those libraries absent, which it is made for. Afterwards everything can be imported, as ever; diffusers itself
does without, so a run that trains, adapts, quantises or compiles must not leave anything out.
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


def leave_out() -> None:
    """Say that this process only runs networks: from now on `imports` spares what that does not take."""
    _left_out.update(LIBRARIES, [TRACER])


@contextmanager
def imports(*needed: str) -> Iterator[None]:
    """Import diffusers or transformers, or load their networks, in here. `needed` must not be missing this time.

    Does nothing before `leave_out`, nor for libraries that are imported already.
    """
    spared = {name for name in _left_out.difference(needed) if name not in sys.modules}
    stand_ins: dict[str, Any] = {name: _Tracer() if name == TRACER else None for name in spared}
    sys.modules.update(stand_ins)  # None is Python's own way to say that a module cannot be imported
    try:
        yield
    finally:
        for name, stand_in in stand_ins.items():
            if sys.modules.get(name, ...) is stand_in:
                del sys.modules[name]


def _same(function: Any = None, *_: Any, **__: Any) -> Any:
    """What a decorator gives that marks nothing, whether it is called with the function or before it."""
    return _same if function is None else function


class _Tracer(ModuleType):
    """Stands where torch._dynamo will be: its marks for the compiler mark nothing, all else is the real one's.

    Libraries import it only to mark functions that a compiler should leave alone, or take as they are.
    """

    allow_in_graph = assume_constant_result = disable = staticmethod(_same)

    def __init__(self) -> None:
        super().__init__(TRACER)
        spec = importlib.util.find_spec(TRACER)
        self.__path__ = (spec and spec.submodule_search_locations) or []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # the import system asks for these
            raise AttributeError(name)
        if sys.modules.get(TRACER) is self:
            del sys.modules[TRACER]
        return getattr(importlib.import_module(TRACER), name)
