"""`vgen curate`: videos to a manifest of clips worth training on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from vgen.commands.families import Json, Quiet
from vgen.commands.output import Out, mode
from vgen.errors import UsageError, VgenError

if TYPE_CHECKING:
    from vgen.curate import Curated

EXAMPLES = (
    "vgen curate videos/ -o set.jsonl --report report.html",
    "vgen curate videos/ -o set.jsonl --min-motion 2 --max-text off --clips cut/",
    "vgen curate videos/ -o set.jsonl --scorer clip-aesthetic=shunk031/aesthetics-predictor-v1-vit-large-patch14",
    "vgen encode FAMILY set.jsonl -o latents/",
)
LIMIT = "NUMBER|SHARE%|off"

Inputs = Annotated[
    list[str] | None, typer.Argument(metavar="IN...", help="Videos, folders, globs, or world:COUNT[:SEED].")
]
Output = Annotated[Path | None, typer.Option("-o", "--output", metavar="FILE.jsonl", help="The manifest.")]
Report = Annotated[
    Path | None, typer.Option("--report", metavar="FILE.html", help="Also write tables, histograms and contact sheets.")
]
Clips = Annotated[
    Path | None, typer.Option("--clips", metavar="FOLDER", help="Also copy the kept clips to files, as they are.")
]
Captions = Annotated[
    Path | None, typer.Option("--captions", metavar="FILE", help="CSV or JSONL with columns file and caption.")
]
Scorers = Annotated[
    list[str] | None,
    typer.Option("--scorer", metavar="NAME[=REFERENCE]", help="A scorer to use, any number of times."),
]
Without = Annotated[
    list[str] | None, typer.Option("--without", metavar="NAME", help="A scorer to leave out, any number of times.")
]
Slow = Annotated[bool, typer.Option("--slow-dissolves", help="Look for dissolves of more than a second, too.")]
Snap = Annotated[bool, typer.Option("--snap/--no-snap", help="Begin clips at key frames, as copying needs it.")]
MinSeconds = Annotated[float, typer.Option("--min-seconds", min=0, help="Drop shorter clips.")]
MaxSeconds = Annotated[float, typer.Option("--max-seconds", min=0.1, help="Cut longer shots in equal parts.")]
MinSide = Annotated[int, typer.Option("--min-side", min=1, help="Drop clips with a shorter side of fewer pixels.")]
How = Annotated[
    Literal["auto", "fixed", "quantile"],
    typer.Option("--thresholds", help="What filters go by; auto takes quantiles from 10,000 clips on."),
]
MinMotion = Annotated[str | None, typer.Option("--min-motion", metavar=LIMIT, help="Least px per half second.")]
MaxText = Annotated[str | None, typer.Option("--max-text", metavar=LIMIT, help="Largest share of the frame with text.")]
MinAesthetic = Annotated[str | None, typer.Option("--min-aesthetic", metavar=LIMIT, help="Least aesthetic score.")]
MinSimilarity = Annotated[
    str | None, typer.Option("--min-similarity", metavar=LIMIT, help="Least similarity of frames and captions.")
]
Device = Annotated[str, typer.Option("--device", help="Where models that score run: cpu, cuda ...")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a manifest that is there; scores are kept.")]


def run(
    inputs: Inputs = None,
    output: Output = None,
    report: Report = None,
    clips: Clips = None,
    captions: Captions = None,
    scorer: Scorers = None,
    without: Without = None,
    slow_dissolves: Slow = False,
    snap: Snap = True,
    min_seconds: MinSeconds = 2.0,
    max_seconds: MaxSeconds = 60.0,
    min_side: MinSide = 256,
    thresholds: How = "auto",
    min_motion: MinMotion = None,
    max_text: MaxText = None,
    min_aesthetic: MinAesthetic = None,
    min_similarity: MinSimilarity = None,
    device: Device = "cpu",
    overwrite: Overwrite = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Cut videos into shots, score and caption them, and write a manifest that says which to keep and why."""
    asked = {name: _plain(value) for name, value in locals().items() if value is not None}
    out = Out(mode(json, quiet), silent=quiet)
    limits = {"motion_score": min_motion, "text_area": max_text, "aesthetic": min_aesthetic, "clip_sim": min_similarity}
    told = {name: text for name, text in limits.items() if text is not None}
    path = _check(inputs or [], captions, output, report, clips, told, snap=snap, overwrite=overwrite)

    from vgen import cuts, scorers
    from vgen.clips import discover
    from vgen.commands.quiet import hush
    from vgen.curate import Settings, curate, write
    from vgen.journal import Journal
    from vgen.record import Run

    hush()
    record = Run("curate", "", asked, {})
    chosen, broken = scorers.choose(scorer or [], without or [])
    for error in broken:
        out.warning(str(error))
    levels = (*cuts.CASCADE, cuts.SLOW) if slow_dissolves else cuts.CASCADE
    settings = Settings(levels, snap, min_seconds, max_seconds, min_side, thresholds, told)
    items = discover(inputs or [], captions)
    with out.progress() as on_step:
        found = curate(items, chosen, settings, Journal(_journal(path)), device, on_step)
    write(found.rows, path)
    for one in found.aside:
        out.warning(f"set aside {one.source}: {one.reason}")
    for text in found.problems:
        out.warning(text)
    missed = _extra(out, found, report, clips)
    facts = _facts(found)
    record.write(path, **facts, scorers=[one.told for one in chosen], motion_table=list(found.table))
    raise typer.Exit(_end(out, path, found, facts, failed=bool(broken or missed)))


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def _check(
    inputs: list[str],
    captions: Path | None,
    output: Path | None,
    report: Path | None,
    clips: Path | None,
    limits: dict[str, str],
    *,
    snap: bool,
    overwrite: bool,
) -> Path:
    """The manifest to write. Raises UsageError for what would only fail after hours of work."""
    from vgen.thresholds import limit_of

    if not inputs and not captions:
        raise UsageError("No input is given.", "Name videos, or folders of them.")
    if output is None:
        raise UsageError("curate needs a file to write to.", "Name it with -o set.jsonl.")
    if output.suffix != ".jsonl":
        raise UsageError(f"'{output}' is no name for a manifest.", "Let it end in .jsonl.")
    if report is not None and report.suffix not in (".html", ".htm"):
        raise UsageError(f"'{report}' is no name for a report.", "Let it end in .html.")
    if clips is not None and not snap:
        raise UsageError("Clips that do not begin at key frames cannot be copied.", "Leave out --no-snap or --clips.")
    if output.exists() and not overwrite:
        raise UsageError(f"'{output}' exists.", "Give --overwrite to replace it; scores that are kept are used again.")
    for name, text in limits.items():
        limit_of(name, text)
    return output


def _journal(path: Path) -> Path:
    """Where the scores of a manifest are kept."""
    return path.with_name(f"{path.stem}.scores.jsonl")


def _extra(out: Out, found: Curated, report: Path | None, clips: Path | None) -> bool:
    """Write the report and the copies; whether some clip could not be copied."""
    missed = False
    if report is not None:
        from vgen.commands.report import write

        write(found, report)
    if clips is not None:
        from vgen.curate import copies

        count = 0
        for path, frames, reason in copies(found.rows, clips):
            count += frames > 0
            missed = missed or bool(reason)
            if reason:
                out.warning(f"not copied: {path.name}: {reason}")
        out.say(f"{count} clips copied to {clips}.")
    return missed


def _facts(found: Curated) -> dict[str, Any]:
    """The figures of a curated set."""
    from vgen.curate import totals

    kept = [row for row in found.rows if row["decision"] == "keep"]
    told = {"raw": totals(found.rows), "kept": totals(kept), "passed": found.passed, "joint": round(found.joint, 6)}
    return {**told, "set_aside": len(found.aside)}


def _end(out: Out, path: Path, found: Curated, facts: dict[str, Any], *, failed: bool) -> int:
    """Say what came of it, and the exit code: 3 where inputs or scores are missing. Raises VgenError for no clips."""
    raw, kept = facts["raw"], facts["kept"]
    for name, share in found.passed.items():
        out.say(f"{name}: {share:.0%} of the clips pass.")
    out.say(f"{kept['clips']} of {raw['clips']} clips kept, {kept['total_seconds']:g} s of {raw['total_seconds']:g} s.")
    if not kept["clips"]:
        why = "; ".join(dict.fromkeys(reason for row in found.rows for reason in row["reasons"]))
        told = why[:300] or "no input could be read"
        raise VgenError(f"None of {raw['clips']} clips was kept: {told}.", f"See {path}.")
    out.result(path, **facts)
    return 3 if found.aside or found.problems or failed else 0
