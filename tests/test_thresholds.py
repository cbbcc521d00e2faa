"""Thresholds: fixed, by share or off, with reasons; and Elo ratings of votes."""

import pytest

from vgen.errors import UsageError
from vgen.scorers import STANDIN
from vgen.thresholds import elo, elo_medians, judge, limit_of


def clips(count: int, **scores: object) -> list[dict[str, object]]:
    """Rows of a manifest; a callable score is asked with the number of the row."""
    return [
        {
            "clip_id": f"clip-{k:03d}",
            "decision": "keep",
            "reasons": [],
            "scorer": dict.fromkeys(scores, "published"),
            **{name: told(k) if callable(told) else told for name, told in scores.items()},
        }
        for k in range(count)
    ]


def kept(rows: list[dict[str, object]]) -> list[str]:
    return [str(row["clip_id"]) for row in rows if row["decision"] == "keep"]


def test_a_quarter_of_100_clips_is_exactly_25():
    rows = clips(100, motion_score=lambda k: (37 * k) % 100)
    passed, joint = judge(rows, "quantile")
    assert (len(kept(rows)), passed, joint) == (75, {"motion_score": 0.75}, 0.75)
    assert all((row["motion_score"] < 25) == (row["decision"] == "drop") for row in rows)  # type: ignore[operator]
    assert rows[0]["reasons"] == ["motion_score 0 is among the lowest 25%"]


def test_equal_scores_are_dropped_in_the_order_of_their_names():
    rows = clips(100, motion_score=1.0)
    judge(rows, "quantile")
    assert kept(rows) == [f"clip-{k:03d}" for k in range(25, 100)]


def test_quantiles_of_the_paper_and_joint_survival():
    told = {"motion_score": lambda k: k % 10, "text_area": lambda k: k // 10 % 10 / 100}
    rows = clips(1000, **told, aesthetic=lambda k: k // 100, clip_sim=lambda k: k)
    passed, joint = judge(rows, "quantile")
    assert passed == {"motion_score": 0.75, "text_area": 0.75, "aesthetic": 0.75, "clip_sim": 0.5}
    assert joint == len(kept(rows)) / 1000
    assert 0 < joint < 0.5


def test_fixed_limits_hold_for_few_clips_and_quantiles_for_10000():
    few = clips(100, text_area=lambda k: k / 1000)
    judge(few)
    assert len(kept(few)) == 71  # up to 7 %
    assert few[-1]["reasons"] == ["text_area 0.099 > 0.07"]
    many = clips(10_000, text_area=0.01)
    judge(many)
    assert len(kept(many)) == 7500


def test_limits_that_are_given_replace_those_of_filters():
    rows = clips(20, motion_score=lambda k: k / 10, text_area=0.5)
    judge(rows, "auto", {"motion_score": "50%", "text_area": "off"})
    assert len(kept(rows)) == 10
    rows = clips(20, motion_score=lambda k: k / 10)
    judge(rows, "quantile", {"motion_score": "1.5"})
    assert len(kept(rows)) == 5
    assert limit_of("aesthetic", "12.5%") == ("share", 0.125)
    for text in ("x", "120%", "%"):
        with pytest.raises(UsageError):
            limit_of("aesthetic", text)


def test_the_fixed_aesthetic_limit_does_not_hold_for_a_stand_in():
    rows = clips(4, aesthetic=3.0)
    assert judge(rows)[0] == {"aesthetic": 0.0}
    rows = clips(4, aesthetic=3.0)
    for row in rows:
        row["scorer"] = {"aesthetic": STANDIN}
    assert judge(rows)[0] == {}
    assert len(kept(rows)) == 4


def test_what_no_scorer_could_tell_is_not_judged_and_labels_are():
    rows = clips(8, motion_score=lambda k: None if k < 4 else 0.0, clip_sim=None)
    rows[0]["negative_labels"] = {"static": True, "screenshot": False}
    judge(rows)
    assert kept(rows) == ["clip-001", "clip-002", "clip-003"]
    assert rows[0]["reasons"] == ["label static"]


def test_elo_follows_its_recursion():
    """The winner of n votes in a row gains d = 1 - 1 / (1 + 10 ** (-gap / 400)) each time, the gap grows by 2 d."""
    gap = 0.0
    for count in range(1, 200):
        gap += 2 * (1 - 1 / (1 + 10 ** (-gap / 400)))
        ratings = elo([("a", "b", 1.0)] * count)
        assert ratings["a"] - ratings["b"] == pytest.approx(gap)
        assert ratings["a"] + ratings["b"] == pytest.approx(2000)
    assert elo([("a", "b", 0.5)] * 9) == {"a": 1000.0, "b": 1000.0}


def test_elo_ranks_models_in_any_order_of_the_votes():
    models = ("none", "12.5%", "25%", "50%")
    votes = [(a, b, 1.0 if i > j else 0.0) for i, a in enumerate(models) for j, b in enumerate(models) if i != j] * 16
    found = elo_medians(votes, shuffles=200)
    again = elo_medians(votes[::-1], shuffles=200, seed=1)
    assert sorted(models, key=lambda name: found[name][0]) == list(models)
    for name in models:
        middle, low, high = found[name]
        assert low <= middle <= high
        assert abs(again[name][0] - middle) <= max(high - low, 1.0)
