"""How fast vgen is beside what it replaces: ratios of paired runs, as a table in Markdown.

Each run is a process of its own, with compiled bytecode and without a network; the two of a pair take turns in going
first. A ratio is the median of the pairs' ratios; times and memory are medians of the runs.

    python benchmarks/speed.py                       # everything: about 10 minutes on two quiet cores
    python benchmarks/speed.py --only help --pairs 3
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from plain.bare import source

from vgen import registry
from vgen.family import family, resolve

HERE = Path(__file__).parent
BIN = Path(sys.executable).parent
VGEN, CLI = str(BIN / "vgen"), str(BIN / "diffusers-cli")
PROMPT = "a teddy bear skating"
LEVELS = 2  # of 255: how far frames of two samplers may be apart
LATENTS = 1e-4
START, END = "<!-- results -->", "<!-- end -->"


@dataclass(frozen=True)
class Took:
    """What a process took: seconds of wall time and of CPU, and the peak of its memory in MiB."""

    wall: float
    cpu: float
    mib: float


Run = Callable[[], Took]


@dataclass(frozen=True)
class Row:
    """One comparison. `goal` bounds vgen's share of the other's time, or, with `times`, how many times faster it is."""

    name: str
    ours: list[Took]
    others: list[Took]
    goal: float | None
    times: bool = False

    def ratio(self, field: str) -> float:
        """The median over the pairs of ours to the other's, or the other way round with `times`."""
        pairs = [(getattr(a, field), getattr(b, field)) for a, b in zip(self.ours, self.others, strict=True)]
        return median(b / a if self.times and field != "mib" else a / b for a, b in pairs)

    def line(self) -> str:
        """The row of the table."""
        ratio = self.ratio("wall")
        met = "" if self.goal is None else "yes" if (ratio >= self.goal if self.times else ratio <= self.goal) else "no"
        bound = "" if self.goal is None else f"{'>=' if self.times else '<='} {self.goal:.3g}"
        wall, their_wall = (f"{median(t.wall for t in took):.2f} s" for took in (self.ours, self.others))
        mib, their_mib = (f"{median(t.mib for t in took):.0f} MiB" for took in (self.ours, self.others))
        cells = [self.name, wall, their_wall, f"**{ratio:.3f}**", f"{self.ratio('cpu'):.3f}", bound, met]
        return f"| {' | '.join([*cells, mib, their_mib, format(self.ratio('mib'), '.2f')])} |"


HEAD = """| measured | vgen | other | ratio | of CPU | goal | met | vgen's peak | other's | ratio |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"""


def process(*words: object, home: Path) -> Took:
    """Run a program to its end. Raises RuntimeError with what it said when it fails."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("VGEN_", "PYTHONDONTWRITE"))}
    env = {**kept, "HF_HUB_OFFLINE": "1", "VGEN_HOME": str(home), "PYTHONWARNINGS": "ignore"}
    with tempfile.TemporaryFile() as said:
        begun = time.perf_counter()
        child = subprocess.Popen([str(word) for word in words], env=env, stdout=subprocess.DEVNULL, stderr=said)
        _, status, used = os.wait4(child.pid, 0)
        wall = time.perf_counter() - begun
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            said.seek(0)
            raise RuntimeError(f"{words} ended with {child.returncode}: {said.read().decode()[-2000:]}")
    return Took(wall, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024)


def paired(ours: Run, other: Run, pairs: int) -> tuple[list[Took], list[Took]]:
    """Both, `pairs` times, taking turns in going first; after one run of each that is not counted."""
    ours(), other()
    a, b = [], []
    for i in range(pairs):
        for run, took in ((ours, a), (other, b)) if i % 2 == 0 else ((other, b), (ours, a)):
            took.append(run())
    return a, b


class Bench:
    """The comparisons. `work` is a folder for what they write."""

    def __init__(self, checkpoint: str, pairs: int, work: Path) -> None:
        self.card = family("cogvideox")
        self.found = registry.resolve(self.card, checkpoint, accelerator=False)
        assert self.found.folder is not None, f"{checkpoint} is not on this machine"
        self.folder, self.pairs, self.work, self.home = self.found.folder, pairs, work, work / "home"
        self.options = resolve(self.card, self.card.options("sample")(prompt=PROMPT), self.found.checkpoint)

    def row(self, name: str, ours: Run, other: Run, goal: float | None, times: bool = False) -> Row:
        """Measure one comparison."""
        print(f"{name} ...", file=sys.stderr, flush=True)
        return Row(name, *paired(ours, other, self.pairs), goal, times)

    def plain(self, script: str, *words: object) -> Took:
        """Run one of the plain scripts."""
        return process(sys.executable, HERE / "plain" / script, *words, home=self.home)

    def help(self) -> Iterator[Row]:
        """(a) Help pages."""
        bare, quiet = self.work / "bare.py", self.work / "quiet.py"
        bare.write_text(source(self.card, rich=True))
        quiet.write_text(source(self.card, rich=False))

        def page(*words: object) -> Run:
            return lambda: process(*words, "--help", home=self.home)

        for words in ((), ("sample", "cogvideox")):
            name, ours = " ".join(("vgen", *words, "--help")), page(VGEN, *words)
            yield self.row(f"`{name}` / `diffusers-cli --help`", ours, page(CLI), 1 / 40)
            yield self.row(f"`{name}` / bare Typer app", ours, page(sys.executable, bare, *words), 1.6)
            yield self.row(f"`{name}` / bare Typer app without rich", ours, page(sys.executable, quiet, *words), None)

    def sample(self) -> Iterator[Row]:
        """(b) The whole process of one sample, with a text seen before and with a new one."""
        told = ["--steps", self.options.num_inference_steps, "--guidance", self.options.guidance_scale]
        told += ["--fps", self.options.fps, "--length", self.length()]
        count = iter(range(10**6))

        def ours(home: Path, out: Path) -> Took:
            words = (VGEN, "sample", "cogvideox", PROMPT, "--checkpoint", self.folder, "--seed", 1)
            return process(*words, "--device", "cpu", "--overwrite", "-o", out, home=home)

        def other(out: Path) -> Took:
            return self.plain("sample.py", self.folder, PROMPT, out, *told)

        ours(self.home, self.work / "a")
        other(self.work / "b")
        same_frames(self.work / "a", self.work / "b")
        mp4 = self.work / "x.mp4", self.work / "y.mp4"
        yield self.row("sample, text seen before", lambda: ours(self.home, mp4[0]), lambda: other(mp4[1]), 0.6)
        new = self.work / "new"
        yield self.row("sample, new text", lambda: ours(new / str(next(count)), mp4[0]), lambda: other(mp4[1]), 0.6)

    def length(self) -> int:
        """Tokens of text that the checkpoint takes."""
        return int(json.loads((self.folder / "transformer" / "config.json").read_text())["max_text_seq_length"])

    def loop(self) -> Iterator[Row]:
        """(c) The sampling loop alone."""
        yield loops("sampling loop", "loop.py", self.folder, self.work, self.pairs)

    def encode(self, count: int) -> Iterator[Row]:
        """(d) Clips to latents: whole acts over a folder of files."""
        clips, native = self.work / "clips", self.options
        size = ["--num-frames", native.num_frames, "--height", native.height, "--width", native.width]
        process(sys.executable, HERE / "plain" / "clips.py", clips, count, home=self.home)
        outs = (self.work / "out" / str(i) for i in range(10**6))

        def ours() -> Took:
            words = (VGEN, "encode", "cogvideox", clips, "--checkpoint", self.folder, "-o", next(outs))
            return process(*words, "--device", "cpu", *size, home=self.home)

        def other() -> Took:
            frames = ["--frames", native.num_frames, *size[2:]]
            return self.plain("encode.py", self.folder, clips, next(outs), *frames)

        (self.work / "out").mkdir()
        yield self.row(f"encode {count} clips", ours, other, 2.0, times=True)


def loops(name: str, script: str, folder: Path, work: Path, pairs: int) -> Row:
    """The loops of a plain script, vgen's and the pipeline's. Raises RuntimeError where their latents do not agree."""

    def say(*words: object) -> Any:
        env = {**os.environ, "VGEN_HOME": str(work / "home"), "HF_HUB_OFFLINE": "1"}
        program = [sys.executable, str(HERE / "plain" / script), *map(str, words)]
        done = subprocess.run(program, env=env, capture_output=True, text=True, check=True)
        return json.loads(done.stdout.splitlines()[-1])

    print(f"{name} ...", file=sys.stderr, flush=True)
    sides = ("vgen", "diffusers")
    mib = {side: say(side, folder, work / f"{side}.pt")["kib"] / 1024 for side in sides}
    turns = say("pairs", folder, 2 * pairs + 1)
    ours, others = ([Took(*turn[side], mib[side]) for turn in turns] for side in sides)
    compare = "import sys, torch; a, b = map(torch.load, sys.argv[1:]); print((a - b).abs().max().item())"
    files = [work / "vgen.pt", work / "diffusers.pt"]
    apart = subprocess.run([sys.executable, "-c", compare, *files], capture_output=True, text=True, check=True)
    print(f"latents of the two loops are {float(apart.stdout):.1e} apart", file=sys.stderr)
    if float(apart.stdout) > LATENTS:
        raise RuntimeError(f"the loops do not agree: their latents are {apart.stdout.strip()} apart")
    return Row(name, ours, others, 0.98)


def same_frames(a: Path, b: Path) -> None:
    """Compare two folders of PNGs. Raises RuntimeError where they are further apart than `LEVELS`."""
    import numpy as np
    from PIL import Image

    names = sorted(path.name for path in a.glob("*.png"))
    others = sorted(path.name for path in b.glob("*.png"))
    pairs = [[np.asarray(Image.open(p), np.int16) for p in (a / x, b / y)] for x, y in zip(names, others, strict=True)]
    worst = max(int(abs(x - y).max()) for x, y in pairs)
    print(f"{len(pairs)} frames of the two samplers are at most {worst} of 255 apart", file=sys.stderr)
    if worst > LEVELS:
        raise RuntimeError(f"the samplers do not agree: their frames are {worst} of 255 apart")


def tell(text: str, page: Path | None, start: str, end: str) -> None:
    """Print a table and put it into a page, where one is given, between its markers."""
    print(text)
    if page:
        before, _, rest = page.read_text().partition(start)
        page.write_text(f"{before}{start}\n{text}\n{end}{rest.partition(end)[2]}")


def main() -> None:
    """Measure and print."""
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--checkpoint", default="demo", help="a checkpoint on this machine")
    ask.add_argument("--pairs", type=int, default=5)
    ask.add_argument("--clips", type=int, default=64, help="clips to encode")
    ask.add_argument("--page", type=Path, help="put the table into this page, between its markers, too")
    ask.add_argument("--only", nargs="*", choices=("help", "sample", "loop", "encode"), help="some of them")
    given = ask.parse_args()
    only = given.only or ("help", "sample", "loop", "encode")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as work:
        bench = Bench(given.checkpoint, given.pairs, Path(work))
        for name in only:  # help first: a child's peak counts from what this process had when it started it
            rows += bench.encode(given.clips) if name == "encode" else getattr(bench, name)()
    load = ", ".join(f"{x:.1f}" for x in os.getloadavg())
    about = f"{os.cpu_count()} cores, load {load}, {given.pairs} pairs, checkpoint {Path(given.checkpoint).name}."
    tell("\n".join([about, "", HEAD, *(row.line() for row in rows)]), given.page, START, END)


if __name__ == "__main__":
    main()
