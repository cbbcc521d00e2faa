"""README.md and docs/ hold: tables equal the cards, commands run, links resolve, and what is named exists."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import sys
from fractions import Fraction
from pathlib import Path

import pytest
import tiny
import torch
from shell import Done, run, vgen
from typer.main import get_command

from vgen import adapter_file, latents, record, world
from vgen.cli import VERBS, build
from vgen.commands import exchange
from vgen.commands.surface import sections
from vgen.errors import UsageError, VgenError
from vgen.family import families, family
from vgen.generate import to_frames
from vgen.latents import Space
from vgen.settings import VARIABLES, gather, read
from vgen.store import Store
from vgen.video_write import write

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RECIPES = sorted((ROOT / "vgen" / "plugins").glob("*/*.toml"))
BLOCK = re.compile(r"^(<!-- [^\n]+ -->\n)?```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NOUNS = ("families", "checkpoints", "curate", "doctor")
EXCHANGE = get_command(exchange.app).commands.values()  # type: ignore[attr-defined]
CURATE = get_command(build("curate", completion=False)).commands["curate"]  # type: ignore[attr-defined]
NOUN_FLAGS = {"--version", "--yes", "--install-completion", "--show-completion"}
NOUN_FLAGS |= {
    flag
    for command in (*EXCHANGE, CURATE)
    for p in command.params
    for flag in (*p.opts, *p.secondary_opts)
    if flag.startswith("--")
}
SPACE = Space("pixels", 3, (1, 1, 1))


def blocks(language: str, marker: str = "") -> dict[str, str]:
    """The fenced blocks of a language that stand right after a marker, or after none, by page and number."""
    found: dict[str, str] = {}
    for page in PAGES:
        for number, (mark, kind, text) in enumerate(BLOCK.findall(page.read_text())):
            if (kind, mark.strip()) == (language, marker):
                found[f"{page.name}-{number}"] = text
    return found


def command(name: str) -> str:
    """One of the two commands of the README."""
    (line,) = blocks("sh", f"<!-- command: {name} -->").values()
    assert line.count("\n") == 1
    return line.strip()


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the docs speak of, and a `vgen` that runs its verbs dry."""
    desk = tmp_path_factory.mktemp("desk")
    pixels, _, caption, _ = world.clip(0, 0, 9, 64, 64)
    frames = to_frames(pixels)
    (desk / "clips").mkdir()
    write(desk / "clips" / "ball.mp4", frames, Fraction(8))
    (desk / "clips" / "ball.txt").write_text(caption)
    (desk / "captions.csv").write_text(f"file,caption\nball.mp4,{caption}\n")
    write(desk / "bears", frames[:1], Fraction(8))
    (desk / "bears" / "frame_00000.png").rename(desk / "bear.png")
    latents.write(desk / "clip.safetensors", {"latents": pixels}, {"space": SPACE, "fps": "8/1", "captions": [caption]})
    Store.open(desk / "latents", space=SPACE, create=True)
    pairs = {"transformer_blocks.0.attn1.to_q": (torch.ones(1, 192), torch.ones(192, 1))}
    for name in ("look", "motion"):
        adapter_file.write(desk / name / adapter_file.WEIGHTS, "transformer", pairs, {})
    demo = str(family("cogvideox").demo)
    shutil.copytree(demo, desk / "tuned")
    (desk / "tuned" / "run.toml").write_text('data = ["latents"]\noutput = "tuned"\n')
    (settings,) = (text for name, text in blocks("toml").items() if name.startswith("command-line.md"))
    (desk / "settings.toml").write_text(settings)
    plan = vgen("sample", "cogvideox", "a red ball rising", "--checkpoint", "demo", "--dry-run", "--json", cwd=desk)
    assert plan.code == 0, plan.err
    (desk / "ball.mp4.toml").write_text(record.dumps(plan.json()["options"]))
    for name in ("docs", "vgen"):
        (desk / name).symlink_to(ROOT / name, target_is_directory=True)
    (desk / "runs").mkdir()
    for path in RECIPES:
        told = read(path)
        (desk / told["output"]).symlink_to(str(family(path.parent.name).demo), target_is_directory=True)
        for data in told["data"]:
            if data.startswith("runs/"):
                Store.open(desk / data, space=SPACE, create=True)
    verbs = "|".join(VERBS)
    _program(desk / "dry", f'case "$1" in {verbs}) exec {sys.executable} -m vgen.cli "$@" --dry-run --json;; esac')
    _program(desk / "wet", "")
    return desk


def _program(folder: Path, first: str) -> None:
    """A program `vgen` in a folder."""
    folder.mkdir()
    path = folder / "vgen"
    path.write_text(f'#!/bin/sh\n{first}\nexec {sys.executable} -m vgen.cli "$@"\n')
    path.chmod(0o755)


def bash(desk: Path, text: str, how: str, **variables: str) -> Done:
    """Run lines of shell at the desk, as a person would, with its `vgen` dry or wet."""
    path = os.pathsep.join([str(desk / how), os.environ["PATH"]])
    fixed = {"PATH": path, "HOME": str(desk), "VGEN_FAMILIES": ""}
    return run(["bash", "-euo", "pipefail", "-c", text], desk, **fixed, **variables)


def test_tables_equal_the_cards():
    done = run([sys.executable, str(ROOT / "docs" / "tables.py"), "--check"], VGEN_FAMILIES="")
    assert (done.code, done.out) == (0, ""), done.err


@pytest.mark.parametrize("name", blocks("sh"))
def test_shell_blocks_run_dry(desk, name):
    done = bash(desk, blocks("sh")[name], "dry")
    assert done.code == 0, done.err


@pytest.mark.parametrize("name", blocks("sh", "<!-- runs -->"))
def test_shell_blocks_so_marked_run_in_full(desk, name):
    done = bash(desk, blocks("sh", "<!-- runs -->")[name], "wet")
    assert done.code == 0, done.err
    outputs = [Path(word) for word in done.out.splitlines() if (desk / word).is_file()]
    assert outputs
    assert all((desk / f"{path}.toml").is_file() for path in outputs)


def test_clips_to_a_tuned_model_as_the_page_says_with_fewer_steps(desk):
    """In a folder of its own: encode, finetune, sample and decode, on a tiny checkpoint."""
    tiny.checkpoint(desk / "own" / "tiny")
    for name in ("clips", "wet"):
        (desk / "own" / name).symlink_to(desk / name, target_is_directory=True)
    page = blocks("sh")["finetune.md-0"].replace("1000", "2").splitlines()
    page.append("vgen decode cogvideox latents/ -o decoded/ball.mp4 --contact-sheet")
    small = {"VGEN_CHECKPOINT": "tiny", "VGEN_NUM_INFERENCE_STEPS": "2"}
    for line, answer in zip(page, ("latents", "tuned", "after.mp4", "decoded/ball.mp4"), strict=True):
        done = bash(desk / "own", line, "wet", **small)
        assert (done.code, done.out) == (0, f"{answer}\n"), done.err
    log = (desk / "own" / "tuned" / "training" / "log.jsonl").read_text().splitlines()
    assert [json.loads(step)["step"] for step in log] == [1, 2]


def test_the_reader_in_the_docs_reads(desk):
    (reader,) = blocks("python", "<!-- runs -->").values()
    done = run([sys.executable, "-c", reader, "clip.safetensors"], desk)
    assert done.code == 0, done.err
    first, second = done.out.splitlines()
    assert first.split()[1:3] == ["pixels", "8/1"]
    assert second == "latents F32 [3, 9, 64, 64] whole"
    path = desk / "clip.safetensors"
    (desk / "hurt.safetensors").write_bytes(path.read_bytes()[:-1] + b"\xff")
    assert run([sys.executable, "-c", reader, "hurt.safetensors"], desk).out.splitlines()[1].endswith("damaged")


def test_the_first_command_of_the_readme_makes_a_clip(desk):
    *install, main = command("run").split(" && ")
    assert install == ["python3 -m venv .venv", ".venv/bin/pip install ."]
    assert main.startswith(".venv/bin/vgen sample cogvideox")
    done = bash(desk, main.removeprefix(".venv/bin/"), "wet")
    assert (done.code, done.out) == (0, "skating.mp4\n"), done.err
    assert {"skating.mp4", "skating.mp4.toml", "skating.sheet.png"} <= {path.name for path in desk.iterdir()}


def test_the_second_command_of_the_readme_runs_these_tests():
    assert command("test").split(" && ") == [
        "python3 -m venv .venv",
        '.venv/bin/pip install -e ".[test]"',
        ".venv/bin/python -m pytest",
    ]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_recipes_set_only_options_that_exist(recipe):
    verb = "train-lora" if recipe.name.startswith("lora-") else "finetune"
    values, origins = gather(family(recipe.parent.name).options(verb), {}, {}, recipe)
    assert {name for name, origin in origins.items() if origin == str(recipe)} == read(recipe).keys()
    assert values["output"].parts[0] == "runs"  # which git leaves out


def test_links_resolve():
    for page in (*PAGES, ROOT / "CHANGELOG.md"):
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            if not link.startswith("https://"):
                assert (page.parent / link.partition("#")[0]).exists(), f"{page.name}: {link}"


def test_every_page_is_linked_from_the_readme():
    text = PAGES[0].read_text()
    assert not [page.name for page in PAGES[1:] if f"(docs/{page.name})" not in text]


def test_words_of_the_command_line_exist():
    cards = families()[0]
    rows = [row for card in cards for verb in card.verbs for part in sections(card, verb).values() for row in part]
    flags = {word for name, _ in rows for word in re.findall(r"--[\w-]+", name)} | NOUN_FLAGS
    variables = {f"VGEN_{flag[2:].upper().replace('-', '_')}" for flag in flags} | {*VARIABLES}
    for page in (*PAGES, ROOT / "CHANGELOG.md"):
        text = re.sub(r"^.*(pip install|python docs/|python benchmarks/).*$", "", page.read_text(), flags=re.MULTILINE)
        assert set(re.findall(r"(?<![\w<!-])--[a-z][\w-]*", text)) <= flags, page.name
        assert set(re.findall(r"VGEN_[A-Z_]*[A-Z]\b", text)) <= variables, page.name
        assert set(re.findall(r"`vgen ([a-z][a-z-]*)", text)) <= {*VERBS, *NOUNS}, page.name


def test_families_verbs_and_checkpoints_in_commands_exist():
    cards = {card.name: card for card in families()[0]}
    lines = [line for page in PAGES for line in re.findall(r"^(?:VGEN_\w+=\S+ )*vgen .+$", page.read_text(), re.M)]
    assert len(lines) > 20
    for line in lines:
        words = shlex.split(line.partition("vgen ")[2])
        if words[0] in VERBS and words[1] in cards:
            assert words[0] in cards[words[1]].verbs, line


def test_exit_codes_are_the_table_of_them():
    text = (ROOT / "docs" / "command-line.md").read_text().partition("## Exit codes")[2].partition("##")[0]
    told = [int(code) for code in re.findall(r"^\| (\d+) \|", text, re.MULTILINE)]
    assert told == [0, VgenError.exit_code, UsageError.exit_code, 3, 130]
    assert vgen("--version").code == 0
    assert vgen("checkpoints", "verify", "cogvideox.5b").code == VgenError.exit_code
    assert vgen("sample", "cogvideox", "--no-such-flag").code == UsageError.exit_code
