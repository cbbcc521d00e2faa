"""Thresholds: which clips of a set are kept, and Elo ratings by which thresholds are calibrated.

Filters and shares are those of Stable Video Diffusion (arXiv 2311.15127, section 3.3 and appendix E).
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

from vgen.errors import UsageError
from vgen.scorers import STANDIN

Row = dict[str, Any]  # a line of a manifest
Thresholds = Literal["auto", "fixed", "quantile"]
MANY = 10_000  # clips from which on "auto" means quantiles
SCALE, START = 400.0, 1000.0  # of Elo ratings


@dataclass(frozen=True)
class Filter:
    """A score that decides: which end of it is bad, the share that is dropped by quantile, and the fixed limit.

    `absolute` says that the limit holds for the published scorer alone, not for one that stands in for it.
    """

    field: str
    bad: Literal["low", "high"]
    share: float
    limit: float | None
    absolute: bool = False


FILTERS = (
    Filter("motion_score", "low", 0.25, 0.5),
    Filter("text_area", "high", 0.25, 0.07),
    Filter("aesthetic", "low", 0.25, 4.5, absolute=True),
    Filter("clip_sim", "low", 0.5, None),
)


def judge(
    rows: Sequence[Row], thresholds: Thresholds = "auto", limits: Mapping[str, str] | None = None
) -> tuple[dict[str, float], float]:
    """Decide on every row that is not dropped yet. Gives the shares that pass each filter, and all of them.

    `limits` replace those of filters by field (see `limit_of`). `thresholds` says what the others go by; "auto" means
    quantiles from 10,000 clips on. By quantile, exactly the share of the clips that have a score is dropped, equal
    scores in the order of clip_id.
    """
    judged = [row for row in rows if row["decision"] == "keep"]
    by_share = thresholds == "quantile" or (thresholds == "auto" and len(judged) >= MANY)
    passed: dict[str, float] = {}
    for one in FILTERS:
        scored = [row for row in judged if row.get(one.field) is not None]
        if not scored:
            continue
        limit = _limit(one, (limits or {}).get(one.field), scored, by_share)
        if limit is None:
            continue
        bad = _worst(one, scored, limit[1]) if limit[0] == "share" else _beyond(one, scored, limit[1])
        passed[one.field] = 1 - len(bad) / len(scored)
        for row, reason in bad:
            row["reasons"].append(reason)
    for row in judged:
        row["reasons"] += [f"label {name}" for name, told in row.get("negative_labels", {}).items() if told]
        row["decision"] = "drop" if row["reasons"] else "keep"
    return passed, sum(row["decision"] == "keep" for row in judged) / max(1, len(judged))


def limit_of(name: str, text: str) -> tuple[str, float] | None:
    """What a limit that was given means: a number, a share such as "25%", or "off". Raises UsageError."""
    if text == "off":
        return None
    try:
        told = ("share", float(text[:-1]) / 100) if text.endswith("%") else ("fixed", float(text))
    except ValueError as error:
        raise UsageError(f"'{text}' is no limit for {name}.", "Write a number, a share as 25%, or off.") from error
    if told[0] == "share" and not 0 <= told[1] <= 1:
        raise UsageError(f"'{text}' is no share of the clips.", "Write a share from 0% to 100%.")
    return told


def _limit(one: Filter, text: str | None, scored: Sequence[Row], by_share: bool) -> tuple[str, float] | None:
    """How a filter decides: ("share", 0 to 1), ("fixed", a number), or not at all. Raises UsageError."""
    if text is not None:
        return limit_of(one.field, text)
    if by_share:
        return "share", one.share
    standin = one.absolute and any(row["scorer"].get(one.field) == STANDIN for row in scored)
    return None if one.limit is None or standin else ("fixed", one.limit)


def _worst(one: Filter, scored: Sequence[Row], share: float) -> list[tuple[Row, str]]:
    """The share of the rows with the worst scores, and why."""
    sense = 1 if one.bad == "low" else -1
    ranked = sorted(scored, key=lambda row: (sense * row[one.field], row["clip_id"]))
    end = "lowest" if one.bad == "low" else "highest"
    return [
        (row, f"{one.field} {row[one.field]:g} is among the {end} {share:.0%}")
        for row in ranked[: int(share * len(ranked))]
    ]


def _beyond(one: Filter, scored: Sequence[Row], limit: float) -> list[tuple[Row, str]]:
    """The rows on the wrong side of a limit, and why."""
    sign = "<" if one.bad == "low" else ">"
    return [
        (row, f"{one.field} {row[one.field]:g} {sign} {limit:g}")
        for row in scored
        if (row[one.field] < limit if one.bad == "low" else row[one.field] > limit)
    ]


def elo(votes: Sequence[tuple[str, str, float]], k: float = 1.0) -> dict[str, float]:
    """Ratings of models after `votes` in their order: (one, another, share of the win that is the first one's).

    All start at 1000. A vote moves both by k times the difference between it and what was expected,
    1 / (1 + 10 ** ((R_other - R) / 400)).
    """
    ratings: dict[str, float] = {}
    for one, other, won in votes:
        a, b = ratings.setdefault(one, START), ratings.setdefault(other, START)
        change = k * (won - 1 / (1 + 10 ** ((b - a) / SCALE)))
        ratings[one], ratings[other] = a + change, b - change
    return ratings


def elo_medians(
    votes: Sequence[tuple[str, str, float]], k: float = 1.0, *, shuffles: int = 1000, seed: int = 0
) -> dict[str, tuple[float, float, float]]:
    """Median ratings over shuffled orders of the votes, each with the 5 % and the 95 % quantile."""
    rng, order = random.Random(seed), list(votes)
    found: dict[str, list[float]] = {}
    for _ in range(shuffles):
        rng.shuffle(order)
        for name, rating in elo(order, k).items():
            found.setdefault(name, []).append(rating)
    low, high = int(0.05 * shuffles), min(shuffles - 1, int(0.95 * shuffles))
    ranked = {name: sorted(ratings) for name, ratings in sorted(found.items())}
    return {name: (median(ratings), ratings[low], ratings[high]) for name, ratings in ranked.items()}
