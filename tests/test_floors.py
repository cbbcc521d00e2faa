"""The house stands as drawn: imports go down, families keep to themselves, commands name no family."""

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import vgen
from vgen.family import installed

ROOT = Path(vgen.__file__).parent
README = ROOT.parent / "README.md"
WORDS = ("errors", "options", "family")
ACTS = ("camera_check", "camera_data", "curate", "encode", "finetune", "generate", "interpolate", "leave_out", "lora")
ACTS += ("picture", "train", "validation")
FLOORS = {**dict.fromkeys(WORDS, 0), **dict.fromkeys(ACTS, 2), "plugins": 3, "commands": 4, "cli": 4}  # else 1
TRAINING = {
    "camera_check": {"generate", "lora"},
    "camera_data": {"encode", "generate"},
    "finetune": {"train", "validation"},
    "interpolate": {"generate"},
    "leave_out": {"interpolate"},
    "lora": {"finetune"},
    "picture": {"generate"},
    "validation": {"generate"},
}  # within floor 2


@cache
def files() -> dict[str, Path]:
    """All modules by dotted name without the leading "vgen."."""
    parts = {path: path.relative_to(ROOT).with_suffix("").parts for path in sorted(ROOT.rglob("*.py"))}
    names = {".".join(part for part in some if part != "__init__"): path for path, some in parts.items()}
    return {name: path for name, path in names.items() if name}


def floor(name: str) -> int:
    """The floor of a module: 0 words, 1 subjects, 2 acts, 3 families, 4 the face."""
    return FLOORS.get(name.partition(".")[0], 1)


def family_of(name: str) -> str:
    """The family that a module belongs to, or nothing."""
    return name.split(".")[1] if name.startswith("plugins.") else ""


def imported(path: Path) -> Iterator[tuple[str, int]]:
    """The modules of vgen that a file imports, anywhere in it, or has imported by `family.fetch`; with the line."""
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            deep = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name.removeprefix("vgen.") in files() else str(node.module) for name in deep]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names = re.findall(r"^(vgen(?:\.\w+)+):\w+$", node.value)
        yield from ((name.removeprefix("vgen."), node.lineno) for name in names if name.startswith("vgen."))


@cache
def edges() -> list[tuple[str, str, str]]:
    """(importer, imported, where) over the whole package."""
    return [(a, b, f"{path}:{line}") for a, path in files().items() for b, line in imported(path) if a != b]


def test_every_import_names_a_file():
    assert {b for _, b, _ in edges()} <= set(files())


def test_imports_only_go_down():
    own = {w for a, b, w in edges() if family_of(a) and family_of(a) == family_of(b)}
    up = [f"{where}: {a} imports {b}" for a, b, where in edges() if floor(b) > floor(a) and where not in own]
    assert not up


def test_words_lean_on_each_other_in_one_order():
    """errors, then options, then family."""
    assert {(a, b) for a, b, _ in edges() if floor(a) == 0} == {("family", "errors"), ("family", "options")}


def picture() -> tuple[str, dict[str, set[str]]]:
    """The README's fenced block after <!-- floors -->: its rows of files, and its lines "store -> files, latents"."""
    block = README.read_text().partition("<!-- floors -->")[2].split("```")[1]
    rows, _, arrows = block.partition("Neighbours")
    return rows, {name: set(to.split(", ")) for name, to in re.findall(r"^(\w+) -> (.+)$", arrows, re.MULTILINE)}


def test_steps_within_a_floor_are_those_of_the_picture():
    real: dict[int, dict[str, set[str]]] = {1: {}, 2: {}}
    for a, b, _ in edges():
        if floor(a) == floor(b) and floor(a) in real:
            real[floor(a)].setdefault(a, set()).add(b)
    assert real == {1: picture()[1], 2: TRAINING}


def test_the_picture_shows_every_file_on_its_floor():
    rows = re.split(r"^(?=\d)", picture()[0], flags=re.MULTILINE)[1:]
    drawn = {int(row[0]): set(re.findall(r"\w+", row)) for row in rows}
    assert sorted(drawn) == [0, 1, 2, 3, 4]
    for level, words in drawn.items():
        assert {name.rpartition(".")[2] for name in files() if floor(name) == level} <= words
    for level in (0, 1, 2):
        assert {name for name in files() if floor(name) != level}.isdisjoint(drawn[level])


def test_no_family_imports_another():
    pairs = [(family_of(a), family_of(b), where) for a, b, where in edges()]
    assert not [where for a, b, where in pairs if a and b and a != b]


def test_only_entry_points_lead_to_families():
    """Nothing outside a family imports it, and words, acts and face do not name one."""
    assert not [where for a, b, where in edges() if family_of(b) and not family_of(a)]
    ours = [name for name in installed() if (ROOT / "plugins" / name).is_dir()]
    assert ours
    names = re.compile(rf"\b({'|'.join(ours)})\b", re.IGNORECASE)
    assert not [
        str(path) for name, path in files().items() if floor(name) in (0, 2, 4) and names.search(path.read_text())
    ]


def test_what_help_pages_import_is_the_standard_library():
    """Floor 0, and those of floor 1 that a help page or a dry run needs."""
    for name in (*WORDS, "settings", "record", "registry", "cache", "files", "outputs"):
        for node in ast.parse(files()[name].read_text()).body:
            tops = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            tops += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            assert {top.partition(".")[0] for top in tops} <= {"vgen", "__future__", *sys.stdlib_module_names}, name
