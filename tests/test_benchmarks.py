"""The benchmark of large models refuses machines without a GPU, and its path runs, with tiny networks, without one."""

from __future__ import annotations

import sys
from pathlib import Path

from shell import run

LARGE = str(Path(__file__).parent.parent / "benchmarks" / "large.py")


def test_large_models_are_measured_on_a_gpu_alone():
    done = run([sys.executable, LARGE])
    assert done.code == 2
    assert done.err.endswith("torch finds no CUDA device here. --tiny runs the same path on the CPU.\n")


def test_the_whole_path_runs_with_tiny_networks(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text("before <!-- large results --> old <!-- large end --> after")
    done = run([sys.executable, LARGE, "--tiny", "--steps", "4", "--work", str(tmp_path), "--page", str(page)])
    assert done.code == 0, done.err
    name, weights, rate, alone, validated, _ = done.out.splitlines()[-1].strip("| ").split(" | ")
    assert (name, weights) == ("tiny", "1")
    assert all(float(figure) > 0 for figure in (rate, alone, validated))
    assert page.read_text().endswith("<!-- large end --> after")
    assert list(tmp_path.iterdir()) == [page]
