"""What all tests share: a cache folder of their own, and a tiny checkpoint."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

# One thread: the tests fork, and a pool of threads does not survive that; busy machines are faster so, too.
os.environ["OMP_NUM_THREADS"] = "1"
# A run started in the background may ignore Ctrl-C, and its children with it; these tests send it to them.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what vgen caches away from the user's folder, and from what earlier runs left there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "VGEN_HOME", str(tmp_path_factory.mktemp("vgen-home")))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint of a text-to-video model, for one file of tests."""
    import tiny  # it takes seconds, and many files do without

    return tiny.checkpoint(tmp_path_factory.mktemp("checkpoint") / "c", "5b")
