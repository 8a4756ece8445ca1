import math

import pytest

from specs.gate import GateSpec
from stages.gate import Verdict, judge
from stages.measure import Measure, ratio

NAN, INF = math.nan, math.inf


def gate(**fields) -> GateSpec:
    return GateSpec.model_validate({"metric": "qa"} | fields)


def value(number: float, error: float | None = None, better="higher", n: int = 100) -> Measure:
    return Measure(number, error, n, better)


def verdict(rule: GateSpec, here: Measure | None, there: Measure | None = None, where: str = "base") -> Verdict:
    """The verdict where only `here` and one other place were measured, and only this metric and measure."""
    known = {
        ("here", rule.metric_name, rule.measure): here,
        (where, rule.metric_name, rule.measure): there,
    }
    (only,) = judge((rule,), lambda *key: known.get(key))
    return only


RULES = [
    gate(at_least=-1e9),
    gate(at_most=1e9),
    gate(improves_on="base", standard_errors=0.0),
    gate(keeps="base", within=1e9),
    gate(improves_on="base"),
    gate(keeps="base", within="1000%"),
]


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("better", ["higher", "lower"])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_value_that_is_not_finite_fails_every_rule(rule, better, bad):
    found = verdict(rule, value(bad, 0.1, better), value(0.5, 0.1, better))
    assert not found.passed
    assert found.reason == f"qa is {bad}"


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_value_that_was_not_measured_fails_every_rule(rule):
    found = verdict(rule, None, value(0.5, 0.1))
    assert not found.passed
    assert found.reason == "qa was not measured here"
    assert (found.value, found.reference, found.change, found.standard_error, found.n) == (None,) * 5


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_value_of_no_examples_fails_every_rule(rule):
    assert not verdict(rule, value(0.9, 0.0, n=0), value(0.5, 0.0)).passed


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule.reference], ids=str)
@pytest.mark.parametrize("better", ["higher", "lower"])
@pytest.mark.parametrize("there", [None, NAN, INF, -INF])
def test_a_reference_that_cannot_be_compared_fails(rule, better, there):
    reference = None if there is None else value(there, 0.1, better)
    found = verdict(rule, value(0.5, 0.1, better), reference)
    assert not found.passed
    assert found.reason == "qa was not measured on base"


@pytest.mark.parametrize("error", [None, NAN, INF])
@pytest.mark.parametrize(
    "rule",
    [
        gate(at_least=0.1, standard_errors=1.0),
        gate(at_most=9.0, standard_errors=1.0),
        gate(improves_on="base"),
        gate(keeps="base", within=9.0, standard_errors=1.0),
    ],
    ids=str,
)
def test_a_rule_that_asks_for_the_noise_fails_where_it_is_unknown(rule, error):
    found = verdict(rule, value(0.9, error), value(0.2, 0.0))
    assert not found.passed
    assert found.reason == "qa has no standard error, and the gate asks for one"


@pytest.mark.parametrize("error", [None, 0.5])
def test_a_threshold_does_not_look_at_noise_unless_asked(error):
    assert verdict(gate(at_least=0.6), value(0.6, error)).passed
    assert verdict(gate(at_most=0.6), value(0.6, error)).passed


@pytest.mark.parametrize("better", ["higher", "lower"])
@pytest.mark.parametrize(
    ("fields", "number", "passed", "reason"),
    [
        ({"at_least": 0.6}, 0.7, True, "qa 0.7 >= 0.6"),
        ({"at_least": 0.6}, 0.6, True, "qa 0.6 >= 0.6"),
        ({"at_least": 0.6}, 0.5, False, "qa 0.5 not >= 0.6"),
        ({"at_least": 0.6, "standard_errors": 2.0}, 0.7, True, "qa 0.7 >= 0.6 with 0.1 to spare"),
        ({"at_least": 0.6, "standard_errors": 2.0}, 0.65, False, "qa 0.65 not >= 0.6 with 0.1 to spare"),
        ({"at_least": 0.0}, -0.1, False, "qa -0.1 not >= 0"),
        ({"at_most": 3.0}, 2.5, True, "qa 2.5 <= 3"),
        ({"at_most": 3.0}, 3.5, False, "qa 3.5 not <= 3"),
        ({"at_most": 3.0, "standard_errors": 2.0}, 2.95, False, "qa 2.95 not <= 3 with 0.1 to spare"),
        ({"at_most": 3.0, "standard_errors": 2.0}, 2.5, True, "qa 2.5 <= 3 with 0.1 to spare"),
        ({"at_most": 0.0}, 0.1, False, "qa 0.1 not <= 0"),
    ],
)
def test_thresholds(better, fields, number, passed, reason):
    found = verdict(gate(**fields), value(number, 0.05, better))
    assert (found.passed, found.reason) == (passed, reason)
    threshold = fields.get("at_least", fields.get("at_most"))
    assert (found.value, found.reference, found.standard_error, found.n) == (number, threshold, 0.05, 100)
    assert found.change == pytest.approx(number - threshold)


@pytest.mark.parametrize(
    ("fields", "ours", "theirs", "better", "passed", "reason"),
    [
        (
            {"improves_on": "base", "standard_errors": 0.0},
            0.75,
            0.5,
            "higher",
            True,
            "qa 0.75 is 0.25 better than 0.5 (base); needed a gain of 0",
        ),
        (
            {"improves_on": "base", "standard_errors": 0.0},
            0.5,
            0.5,
            "higher",
            False,
            "qa 0.5 is 0 better than 0.5 (base); needed a gain of 0",
        ),
        (
            {"improves_on": "base", "standard_errors": 0.0},
            0.75,
            0.5,
            "lower",
            False,
            "qa 0.75 is 0.25 worse than 0.5 (base); needed a gain of 0",
        ),
        (
            {"improves_on": "base", "by": 0.5, "standard_errors": 0.0},
            2.0,
            2.5,
            "lower",
            True,
            "qa 2 is 0.5 better than 2.5 (base); needed a gain of 0.5",
        ),
        (
            {"improves_on": "base", "by": "10%", "standard_errors": 0.0},
            3.5,
            4.0,
            "lower",
            True,
            "qa 3.5 is 0.5 better than 4 (base); needed a gain of 0.4",
        ),
        (
            {"improves_on": "base", "by": "10 %", "standard_errors": 0.0},
            3.75,
            4.0,
            "lower",
            False,
            "qa 3.75 is 0.25 better than 4 (base); needed a gain of 0.4",
        ),
        (
            {"improves_on": "base", "by": "50%", "standard_errors": 0.0},
            -2.5,
            -4.0,
            "higher",
            False,
            "qa -2.5 is 1.5 better than -4 (base); needed a gain of 2",
        ),
        (
            {"keeps": "base", "within": 0.25},
            0.75,
            1.0,
            "higher",
            True,
            "qa 0.75 is 0.25 worse than 1 (base); allowed a loss of 0.25",
        ),
        (
            {"keeps": "base", "within": 0.25},
            1.5,
            1.0,
            "lower",
            False,
            "qa 1.5 is 0.5 worse than 1 (base); allowed a loss of 0.25",
        ),
        (
            {"keeps": "base"},
            1.0,
            1.0,
            "lower",
            True,
            "qa 1 is 0 better than 1 (base); allowed a loss of 0",
        ),
        (
            {"keeps": "base", "within": "50%"},
            -5.5,
            -4.0,
            "higher",
            True,
            "qa -5.5 is 1.5 worse than -4 (base); allowed a loss of 2",
        ),
        (
            {"keeps": "base", "within": "5%"},
            4.5,
            4.0,
            "lower",
            False,
            "qa 4.5 is 0.5 worse than 4 (base); allowed a loss of 0.2",
        ),
    ],
)
def test_comparisons(fields, ours, theirs, better, passed, reason):
    found = verdict(gate(**fields), value(ours, 0.01, better), value(theirs, 0.01, better))
    assert (found.passed, found.reason) == (passed, reason)
    assert (found.value, found.reference, found.n) == (ours, theirs, 100)
    assert found.change == pytest.approx(ours - theirs)
    assert found.standard_error == pytest.approx(math.hypot(0.01, 0.01))


def test_an_improvement_must_exceed_two_standard_errors_by_default():
    here, there = value(0.55, 0.03), value(0.5, 0.04)
    found = verdict(gate(improves_on="base"), here, there)
    assert not found.passed
    assert found.reason == "qa 0.55 is 0.05 better than 0.5 (base); needed a gain of 0 and more than 0.1"
    assert verdict(gate(improves_on="base", standard_errors=0.5), here, there).passed
    assert verdict(gate(improves_on="base"), value(0.61, 0.03), there).passed


def test_the_wanted_gain_and_the_noise_are_both_needed():
    there = value(0.5, 0.04)
    assert not verdict(gate(improves_on="base", by=0.2), value(0.65, 0.03), there).passed
    assert not verdict(gate(improves_on="base", by=0.01), value(0.55, 0.03), there).passed
    assert verdict(gate(improves_on="base", by=0.2), value(0.75, 0.03), there).passed


def test_keeping_beyond_the_noise_is_stricter_than_keeping():
    here, there = value(0.46, 0.03), value(0.5, 0.04)
    assert verdict(gate(keeps="base", within=0.1), here, there).passed
    found = verdict(gate(keeps="base", within=0.1, standard_errors=2.0), here, there)
    assert not found.passed
    assert found.reason == "qa 0.46 is 0.04 worse than 0.5 (base); allowed a loss of 0.1 less 0.1"


PERCENT = [n / 100 for n in range(2, 97)]
"""Accuracies over 100 questions: a step of two of them is 0.02, not 0.020000000000000018."""


def test_a_loss_of_exactly_what_is_allowed_is_allowed_whatever_the_rounding():
    rule = gate(keeps="base", within=0.02)
    higher = [here for here in PERCENT if not verdict(rule, value(here), value(round(here + 0.02, 2))).passed]
    lower = [
        there
        for there in PERCENT
        if not verdict(rule, value(round(there + 0.02, 2), better="lower"), value(there, better="lower")).passed
    ]
    assert (higher, lower) == ([], [])


def test_a_gain_of_exactly_what_is_needed_is_enough_whatever_the_rounding():
    rule = gate(improves_on="base", by=0.02, standard_errors=0.0)
    assert [there for there in PERCENT if not verdict(rule, value(round(there + 0.02, 2)), value(there)).passed] == []


def test_rounding_never_turns_no_gain_into_one():
    rule = gate(improves_on="base", standard_errors=0.0)
    assert [one for one in PERCENT if verdict(rule, value(one), value(one)).passed] == []


def test_the_same_examples_are_compared_one_by_one():
    """A gain that is small against the spread of the examples and large against that of their differences."""
    spread = [float(n) for n in range(50)]
    here = ratio([one + 0.5 + (n % 2) / 10 for n, one in enumerate(spread)], [1.0] * 50, "higher")
    there = ratio(spread, [1.0] * 50, "higher")
    assert verdict(gate(improves_on="base"), here, there).passed
    blind = [Measure(one.value, one.standard_error, one.n, one.better) for one in (here, there)]
    assert not verdict(gate(improves_on="base"), *blind).passed


@pytest.mark.parametrize("where", ["base", "previous", "knowledge"])
def test_a_gate_looks_where_it_says(where):
    rule = gate(improves_on=where, standard_errors=0.0)
    assert verdict(rule, value(2.0), value(1.0), where=where).passed
    assert verdict(rule, value(2.0), value(1.0), where="elsewhere").reason == f"qa was not measured on {where}"


def test_a_gate_judges_the_measure_that_it_names():
    rule = GateSpec(metric="pairs.reward_margin", at_least=0.5)
    known = {("here", "pairs", "reward_margin"): value(0.7), ("here", "pairs", None): value(0.1)}
    (found,) = judge((rule,), lambda *key: known.get(key))
    assert (found.passed, found.reason) == (True, "pairs.reward_margin 0.7 >= 0.5")


def test_every_gate_gets_its_verdict_in_the_order_of_the_spec():
    gates = (gate(at_least=0.9), GateSpec(metric="other", at_least=0.1), gate(at_most=0.9))
    found = judge(gates, lambda where, metric, _: value(0.5) if (where, metric) == ("here", "qa") else None)
    assert [one.passed for one in found] == [False, False, True]
    assert [one.gate for one in found] == ["qa at least 0.9", "other at least 0.1", "qa at most 0.9"]
    assert judge((), lambda *_: None) == []


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"at_least": 0.6, "standard_errors": 2.0}, "qa at least 0.6, 2 s.e. clear"),
        ({"improves_on": "base", "by": "5%"}, "qa improves on base by 5%, 2 s.e. clear"),
        ({"improves_on": "previous", "standard_errors": 0.0}, "qa improves on previous"),
        ({"keeps": "base", "within": 0.02}, "qa keeps base within 0.02"),
    ],
)
def test_the_rule_in_words(fields, words):
    assert verdict(gate(**fields), None).gate == words


def test_a_verdict_is_kept_as_plain_json():
    record = verdict(gate(at_least=0.6), value(0.75, 0.25)).as_record()
    assert record == {
        "gate": "qa at least 0.6",
        "passed": True,
        "value": 0.75,
        "reference": 0.6,
        "change": 0.75 - 0.6,
        "standard_error": 0.25,
        "n": 100,
        "reason": "qa 0.75 >= 0.6",
    }
