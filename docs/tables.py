"""The tables of README.md and docs/, made from the cards so that they cannot be out of date.

    python docs/tables.py            write them anew
    python docs/tables.py --check    exit with 1 where one is out of date

A table stands between <!-- table: KIND ARGUMENTS --> and <!-- end -->. The kinds are the functions of KINDS.
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from vgen import options
from vgen.cache import missing
from vgen.commands.surface import sections
from vgen.family import Checkpoint, Family, Rule, families, family

ROOT = Path(__file__).resolve().parent.parent
TABLE = re.compile(r"(<!-- table: ([^\n]+?) -->\n).*?(<!-- end -->)", re.DOTALL)
SHARED = {
    "encode": options.EncodeOptions,
    "decode": options.DecodeOptions,
    "finetune": options.TrainOptions,
    "sample": options.SampleOptions,
    "train-lora": options.LoraOptions,
    "interpolate": options.InterpolateOptions,
    "upscale": options.UpscaleOptions,
}
APART = ("This run", "Checkpoints", "Parts")  # sections of a help page that are not a verb's own options
Row = tuple[str, ...]


def table(head: Row, rows: Iterable[Row]) -> str:
    """A Markdown table."""
    lines = [head, tuple("---" for _ in head), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def flags(verb: str, name: str = "") -> str:
    """The options of a verb: those that all families share, or those that one family adds or tells otherwise."""
    shared = Family("FAMILY", "", "", {verb: SHARED[verb]}, "", ())
    rows = list(_options(shared, verb))
    if name:
        rows = [row for row in _options(family(name), verb) if row not in rows]
    return table(("option", "what it does"), ((f"`{option}`", told) for option, told in rows))


def _options(card: Family, verb: str) -> Iterator[tuple[str, str]]:
    for title, rows in sections(card, verb).items():
        if title not in APART:
            yield from rows


def house() -> str:
    """The options that every verb has beside its own."""
    shared = Family("FAMILY", "", "", {"sample": options.SampleOptions}, "", ())
    rows = sections(shared, "sample")["This run"]
    return table(("option", "what it does"), ((f"`{option}`", told) for option, told in rows))


def checkpoints(name: str) -> str:
    """The checkpoints of a family: what they are, where they lie, their licences."""
    card = family(name)
    rows = []
    for tag, one in _checkpoints(card):
        link = f"[{one.repo}](https://huggingface.co/{one.repo})" if one.repo else "in the package"
        rows.append((f"`{tag}`", one.summary, link, one.license))
    return table(("checkpoint", "makes", "weights", "licence"), rows)


def native(name: str) -> str:
    """What the checkpoints of a family were made for, and what they take."""
    head = ("checkpoint", "starts from", "frames x height x width", "fps", "steps", "guidance", "sampler")
    rows, usual = [], vars(family(name).options("sample"))
    for tag, one in _checkpoints(family(name)):
        told = one.defaults
        size = f"{told['num_frames']} x {told['height']} x {told['width']}"
        scales = [told[key] for key in ("guidance_scale", "min_guidance_scale", "max_guidance_scale") if key in told]
        values = (f"{told['fps']:g}", f"{told['num_inference_steps']:g}", " to ".join(f"{one:g}" for one in scales))
        rows.append((f"`{tag}`", " or ".join(one.modes), size, *values, str(told.get("sampler", usual["sampler"]))))
    return table(head, rows)


def rules(name: str) -> str:
    """The valid lengths and sizes of the checkpoints of a family; k is a whole number."""
    rows = []
    for tag, one in _checkpoints(family(name)):
        rows.append((f"`{tag}`", *(_rule(one.rules[key]) for key in ("num_frames", "height", "width"))))
    return table(("checkpoint", "`--num-frames`", "`--height`", "`--width`"), rows)


def _rule(rule: Rule) -> str:
    if rule.low == rule.high:
        return str(rule.low)
    if rule.step == 1:
        return "any"
    return f"{rule.step}k + {rule.offset}" if rule.offset else f"{rule.step}k"


def _checkpoints(card: Family) -> Iterator[tuple[str, Checkpoint]]:
    for one in card.checkpoints:
        yield f"{card.name}.{one.tag}", one
    if card.demo and card.describe and not missing(card.demo):
        yield "demo", card.describe(card.demo)


def parts(name: str) -> str:
    """The parts of a family that can be trained."""
    rows = ((f"`{part.name}`", part.summary, part.trains_on) for part in family(name).parts)
    return table(("part", "what it is", "trains on"), rows)


def lora_targets() -> str:
    """The layers that train-lora adapts when none are named."""
    cards = (card for card in families()[0] if card.lora_targets)
    rows = ((f"`{card.name}`", ", ".join(f"`{one}`" for one in card.lora_targets)) for card in cards)
    return table(("family", "layers"), rows)


def recipes(name: str, start: str = "demo") -> str:
    """The settings files beside the card of a family, by what their first line says, and the commands to run them.

    Those whose names begin with `start`. A line "# Its data: COMMAND" is a command that comes before, and what a line
    "# Not tried" says is told.
    """
    rows, lines = [], []
    for path in sorted((ROOT / "vgen" / "plugins" / name).glob(f"{start}-*.toml")):
        text, place = path.read_text(encoding="utf-8"), path.relative_to(ROOT)
        told = " ".join([text.partition("\n")[0][2:], *re.findall(r"^# (Not tried.*)$", text, re.MULTILINE)])
        rows.append((f"[{path.name}](../{place})", told, f"`{tomllib.loads(text)['output']}`"))
        lines += [*re.findall(r"^# Its data: (.+)$", text, re.MULTILINE), f"vgen finetune {name} --config {place}"]
    return table(("recipe", "what it does", "output"), rows) + "\n```sh\n" + "\n".join(lines) + "\n```\n"


def drawn() -> str:
    """What the clips of the drawn world show. Imports torch."""
    from vgen import world

    rows = (
        ("objects", world.OBJECTS),
        ("colours", tuple(world.COLOURS)),
        ("motions", world.PLAIN),
        ("motions of `world-full` beside these", tuple(m for m in world.FULL if m not in world.PLAIN)),
        ("backgrounds", world.BACKGROUNDS),
        ("cameras", world.CAMERAS),
    )
    return table(("what", "words"), ((name, ", ".join(words)) for name, words in rows))


KINDS: dict[str, Callable[..., str]] = {
    "flags": flags,
    "house": house,
    "checkpoints": checkpoints,
    "native": native,
    "rules": rules,
    "parts": parts,
    "recipes": recipes,
    "lora-targets": lora_targets,
    "world": drawn,
}


def renewed(text: str) -> str:
    """A page with its tables made anew."""

    def make(found: re.Match[str]) -> str:
        kind, *arguments = found[2].split()
        return f"{found[1]}{KINDS[kind](*arguments)}{found[3]}"

    return TABLE.sub(make, text)


def main() -> int:
    """Write the tables of all pages, or with --check name the pages that are out of date."""
    old = 0
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = page.read_text(encoding="utf-8")
        new = renewed(text)
        if new == text:
            continue
        old = 1
        if "--check" in sys.argv:
            print(f"{page.relative_to(ROOT)} is out of date: run python docs/tables.py")
        else:
            page.write_text(new, encoding="utf-8")
            print(f"wrote {page.relative_to(ROOT)}")
    return old if "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())
