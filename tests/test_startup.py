"""Every help page, completion and dry run in a process of its own: none may import what takes seconds."""

import json
import os
import sys

import pytest
from shell import BROKEN, run

from vgen.family import families

HEAVY = {
    "accelerate",
    "av",
    "bitsandbytes",
    "decord",
    "diffusers",
    "huggingface_hub",
    "numpy",
    "peft",
    "PIL",
    "safetensors",
    "sentencepiece",
    "tokenizers",
    "torch",
    "transformers",
}
SCRIPT = """
import json, sys
from vgen.cli import main
try:
    main()
except SystemExit as end:
    print(json.dumps([end.code or 0, sorted({name.partition(".")[0] for name in sys.modules})]), file=sys.stderr)
"""
VERBS = ("sample", "encode", "decode", "finetune", "train-lora", "interpolate", "upscale")
REGISTRY = ("list", "show", "verify", "remove", "search", "pull", "push", "export", "import")
NOUNS = ("families", "doctor", "curate", "checkpoints", *(f"checkpoints {name}" for name in REGISTRY))
PAGES = [
    "--help",
    "-h",
    *(f"{name} --help" for name in (*VERBS, *NOUNS)),
    *(f"{verb} {card.name} -h" for card in families()[0] for verb in card.verbs),
]


def start(line: str, **variables: str) -> tuple[int, set[str], str]:
    """Exit code, imported top-level modules and stdout of a command line."""
    done = run([sys.executable, "-c", SCRIPT, *line.split()], **variables)
    code, modules = json.loads(done.err.splitlines()[-1])
    return code, set(modules), done.out


@pytest.mark.parametrize("page", PAGES)
def test_a_help_page_is_light_and_has_two_examples(page):
    code, modules, text = start(page)
    assert code == 0
    assert not modules & HEAVY
    assert text.startswith("Usage: ")
    shown = text.partition("\nExamples:\n")[2].splitlines()
    assert len(shown) >= 2
    assert all(line.startswith("  vgen ") for line in shown)


@pytest.mark.parametrize(
    "line", ["--version", "families", "families --json", "checkpoints list", "checkpoints show toy.demo"]
)
def test_nouns_are_light(line):
    code, modules, text = start(line)
    assert (code, modules & HEAVY) == (0, set())
    assert text


def test_a_dry_run_is_light():
    code, modules, _ = start("sample toy bear --dry-run --json")
    assert (code, modules & HEAVY) == (0, set())


@pytest.mark.parametrize("line", ["vgen sample toy --", "vgen sa", "vgen sample toy --checkpoint "])
def test_completion_is_light(line):
    words = {"COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}
    code, modules, text = start("", _VGEN_COMPLETE="complete_bash", **words)
    assert (code, modules & HEAVY) == (0, set())
    assert text


def test_a_broken_plugin_is_one_line_and_the_others_list():
    code, modules, text = start("sample --help", VGEN_FAMILIES=BROKEN)
    assert (code, modules & HEAVY) == (0, set())
    assert "toy" in text


def test_help_takes_no_time():
    """Generous: a page costs 0.1 s of CPU, torch alone 1.6 s."""

    def page() -> float:
        begun = sum(os.times()[2:4])
        run([sys.executable, "-m", "vgen.cli", "sample", "--help"])
        return sum(os.times()[2:4]) - begun

    assert min(page() for _ in range(3)) < 1.0
