"""Runs vgen as a shell does: a process of its own, its streams and its exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TOYS = Path(__file__).parent / "toys"
FAMILIES = "toy=toy_family:family"
BROKEN = f"{FAMILIES},broken=broken_family:family"


@dataclass(frozen=True)
class Done:
    """What a process left behind."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        """The answer on stdout, which is one JSON object."""
        return json.loads(self.out)


def environment(**more: str) -> dict[str, str]:
    """A clean environment: no settings of the user's, the toys installed, no network, no GPU."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("VGEN_", "HF_", "_VGEN", "COLUMNS"))}
    kept |= {"VGEN_HOME": os.environ["VGEN_HOME"]} if "VGEN_HOME" in os.environ else {}  # the tests' own
    fixed = {"VGEN_FAMILIES": FAMILIES, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return {**kept, "PYTHONPATH": str(TOYS), "HF_HOME": "/nonexistent/hf", **fixed, **more}


def run(program: list[str], cwd: Path | None = None, **variables: str) -> Done:
    """Run a program to its end."""
    done = subprocess.run(program, cwd=cwd, env=environment(**variables), capture_output=True, text=True, timeout=120)
    return Done(done.returncode, done.stdout, done.stderr)


def vgen(*words: str | Path, cwd: Path | None = None, **variables: str) -> Done:
    """Run vgen to its end."""
    return run([sys.executable, "-m", "vgen.cli", *map(str, words)], cwd, **variables)


def complete(line: str, **variables: str) -> list[str]:
    """What bash would be offered for the last word of a line."""
    words = line.split(" ")
    count = str(len(words) - 1)
    done = vgen(COMP_WORDS=line, COMP_CWORD=count, _VGEN_COMPLETE="complete_bash", **variables)
    assert done.code == 0, done.err
    return done.out.split()
