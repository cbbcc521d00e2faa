"""The report of a curation: one HTML file with tables, histograms and contact sheets, and nothing outside of it."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from vgen.curate import Curated, Row, still, totals
from vgen.files import replacing
from vgen.probe import BadClip

SHOWN = 48  # clips on a contact sheet
THUMB = (192, 144)  # pixels of a picture on it, at most
BINS = 24
COLUMNS = {
    "clips": "clips",
    "mean_seconds": "mean length, s",
    "mean_frames": "mean frames",
    "total_seconds": "total time, s",
    "clips_per_source": "clips per source",
}
STYLE = """body{font:14px/1.4 sans-serif;margin:2em auto;max-width:1100px;color:#222}
table{border-collapse:collapse;margin:1em 0}th,td{border:1px solid #ccc;padding:.3em .7em;text-align:right}
th:first-child,td:first-child{text-align:left}figure{display:inline-block;margin:4px;width:192px;vertical-align:top}
figcaption{font-size:11px;overflow-wrap:anywhere}.note{color:#666}svg{background:#fafafa}"""


def write(found: Curated, path: Path) -> None:
    """Write the report of a curated set, whole or not at all."""
    kept = [row for row in found.rows if row["decision"] == "keep"]
    dropped = [row for row in found.rows if row["decision"] != "keep"]
    parts = [
        "<h1>Curated clips</h1>",
        _table(["set", *COLUMNS.values()], [["raw", *_columns(found.rows)], ["kept", *_columns(kept)]]),
        f"<p>All filters together keep {found.joint:.1%} of the clips that were scored.</p>",
        _table(["filter", "share that passes"], [[name, f"{share:.1%}"] for name, share in found.passed.items()]),
        "<h2>Why clips were dropped</h2>",
        _table(["reason", "clips"], [[name, str(n)] for name, n in _reasons(dropped).most_common()]),
        "<h2>Scores</h2><p class=note>All scored clips; kept ones dark.</p>",
        *_histograms(found.rows),
        *_asides(found),
        f"<h2>Kept ({len(kept)})</h2>",
        *_sheet(found, kept),
        f"<h2>Dropped ({len(dropped)})</h2>",
        *_sheet(found, dropped),
    ]
    page = f"<!doctype html><meta charset=utf-8><title>Curated clips</title><style>{STYLE}</style>" + "\n".join(parts)
    with replacing(path) as file:
        file.write(page.encode())


def _columns(rows: Sequence[Row]) -> list[str]:
    told = totals(rows)
    return [f"{told[name]:g}" for name in COLUMNS]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    cells = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><tr>{''.join(f'<th>{escape(cell)}</th>' for cell in head)}</tr>{cells}</table>"


def _reasons(rows: Iterable[Row]) -> Counter[str]:
    """How many clips each kind of reason took, its own figures left out."""
    kinds: Counter[str] = Counter()
    for row in rows:
        kinds.update(
            {"length" if " s < " in r else "size" if "pixels" in r else r.partition(" ")[0] for r in row["reasons"]}
        )
    return kinds


def _histograms(rows: Sequence[Row]) -> list[str]:
    """One for each number that clips are scored by."""
    made = []
    for name in dict.fromkeys(name for row in rows for name in row["scorer"]):
        scored = [row for row in rows if isinstance(row.get(name), (int, float))]
        if scored:
            by = ", ".join(sorted({row["scorer"][name] for row in scored}))
            made.append(f"<h3>{escape(name)}</h3><p class=note>by {escape(by)}</p>{_bars(name, scored)}")
    return made


def _bars(name: str, rows: Sequence[Row]) -> str:
    """A histogram as SVG."""
    low, high = min(row[name] for row in rows), max(row[name] for row in rows)
    width = (high - low) / BINS or 1.0
    counts: list[list[int]] = [[0, 0] for _ in range(BINS)]
    for row in rows:
        place = min(BINS - 1, int((row[name] - low) / width))
        counts[place][0] += 1
        counts[place][1] += row["decision"] == "keep"
    tall = 100 / max(both for both, _ in counts)
    bars = [
        f'<rect x="{20 * i + 10}" y="{110 - n * tall:.1f}" width="18" height="{n * tall:.1f}" fill="{colour}"/>'
        for i, pair in enumerate(counts)
        for n, colour in zip(pair, ("#c8d3e6", "#35507f"), strict=True)
    ]
    ends = f'<text x="10" y="126">{low:g}</text><text x="490" y="126" text-anchor="end">{high:g}</text>'
    return f'<svg width="500" height="130" font-size="11">{"".join(bars)}{ends}</svg>'


def _asides(found: Curated) -> list[str]:
    """What gave no clips, and what scorers failed at."""
    parts = []
    if found.aside:
        parts += ["<h2>Set aside</h2>", _table(["input", "reason"], [[one.source, one.reason] for one in found.aside])]
    if found.problems:
        parts += ["<h2>Failed scores</h2>", _table(["clip"], [[text] for text in found.problems])]
    return parts


def _sheet(found: Curated, rows: Sequence[Row]) -> list[str]:
    """Middle frames of clips spread evenly over a set, with what is told of them."""
    step = max(1.0, len(rows) / SHOWN)
    chosen = [rows[int(k * step)] for k in range(min(SHOWN, len(rows)))]
    left = f"<p class=note>{len(chosen)} of {len(rows)}, evenly spread.</p>" if len(chosen) < len(rows) else ""
    return [left, *(_figure(found, row) for row in chosen)]


def _figure(found: Curated, row: Row) -> str:
    """One clip of a sheet."""
    try:
        picture = Image.fromarray(still(found.items[row["source"]], row))
        picture.thumbnail(THUMB)
        data = io.BytesIO()
        picture.save(data, "JPEG", quality=80)
        shown = f'<img src="data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}">'
    except BadClip as error:
        shown = escape(error.reason)
    return f"<figure>{shown}<figcaption>{escape(_words(row))}</figcaption></figure>"


def _words(row: Row) -> str:
    """What a sheet says of a clip: where it is from, its scores, its captions, and why it was dropped."""
    told: list[Any] = [f"{Path(row['source']).name} {row['start_frame']}-{row['end_frame']}"]
    scored = [name for name in row["scorer"] if isinstance(row.get(name), (int, float))]
    told += [f"{name} {row[name]:.3g}" for name in scored]
    told += [row["camera"]["word"]] if row.get("camera", {}) and row["camera"].get("word") else []
    told += list(row["captions"].values()) + row["reasons"]
    return " · ".join(told)
