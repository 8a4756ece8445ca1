"""One scale for all models of a chain: closed forms, ties, who always wins, and how often the intervals hold."""

import math

import numpy as np
import pytest

from stages.metrics.ranking import ANCHOR, PRIOR, Comparison, ranking


def points(won: int, tied: int, lost: int) -> tuple[float, ...]:
    return (1.0,) * won + (0.5,) * tied + (0.0,) * lost


def test_two_models_stand_as_far_apart_as_their_odds():
    base, tuned = ranking(["base", "tuned"], [Comparison("tuned", "base", points(60, 20, 20))])
    wanted = math.log((70 + PRIOR) / (30 + PRIOR))
    assert (base.elo, base.low, base.high) == (ANCHOR, ANCHOR, ANCHOR)
    assert tuned.strength == pytest.approx(wanted, abs=1e-7)
    assert tuned.elo == pytest.approx(ANCHOR + 400 / math.log(10) * wanted, abs=1e-4)
    assert tuned.low < tuned.elo < tuned.high


def test_a_chain_of_comparisons_adds_up():
    found = ranking(
        ["base", "one", "two"],
        [Comparison("one", "base", points(75, 0, 25)), Comparison("two", "one", points(25, 0, 75))],
    )
    assert found[1].strength == pytest.approx(math.log((75 + PRIOR) / (25 + PRIOR)), abs=1e-6)
    assert found[2].elo == pytest.approx(ANCHOR, abs=1e-3)
    assert found[2].low < ANCHOR < found[2].high


def test_who_always_wins_is_better_by_a_finite_amount_that_grows_with_the_evidence():
    few, many = (ranking(["b", "t"], [Comparison("t", "b", points(n, 0, 0))])[1] for n in (5, 500))
    assert math.isfinite(many.elo)
    assert few.elo < many.elo


def test_ties_only_and_a_model_that_nobody_compared():
    found = ranking(["b", "t", "alone"], [Comparison("t", "b", points(0, 30, 0))])
    assert [one.model for one in found] == ["b", "t"]
    assert found[1].elo == pytest.approx(ANCHOR)
    assert ranking(["b", "t"], []) == ()
    assert ranking(["b", "t"], [Comparison("t", "b", ())]) == ()


def test_the_interval_holds_about_as_often_as_it_says():
    draw, true, held = np.random.default_rng(5), 0.4, 0
    share = 1 / (1 + math.exp(-true))
    for _ in range(200):
        drawn = tuple((draw.random(120) < share).astype(float))
        tuned = ranking(["b", "t"], [Comparison("t", "b", drawn)])[1]
        held += tuned.low <= ANCHOR + 400 / math.log(10) * true <= tuned.high
    assert 0.90 <= held / 200 <= 0.985
