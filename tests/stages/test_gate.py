import math
import random

import pytest

from specs.gate import GateSpec
from stages.gate import Verdict, judge
from stages.interval import FEWEST
from stages.measure import Measure, ratio

NAN, INF = math.nan, math.inf


def gate(**fields) -> GateSpec:
    return GateSpec.model_validate({"metric": "qa"} | fields)


def plain(**fields) -> GateSpec:
    """A gate that judges the value alone."""
    return gate(confidence=None, **fields)


def value(number: float, error: float | None = None, better="higher", n: int = 100) -> Measure:
    return Measure(number, error, n, better)


def accuracy(right: int, n: int, start: int = 0) -> Measure:
    """So many questions right, from ``start`` on."""
    return ratio([float(start <= one < start + right) for one in range(n)], [1.0] * n, "higher")


def bits(per_byte: float, n: int = 60, seed: int = 1, noise: float = 0.02) -> Measure:
    """Documents of many sizes; those of one ``n`` are the same ones."""
    sizes = [float(random.Random(n).randint(100, 5000)) for _ in range(n)]
    own, pick = random.Random(n + 1), random.Random(seed)
    hardness = [own.gauss(0, 0.2) for _ in sizes]
    return ratio(
        [size * (per_byte + hard + pick.gauss(0, noise)) for size, hard in zip(sizes, hardness, strict=True)],
        sizes,
        "lower",
    )


def verdict(rule: GateSpec, here: Measure | None, there: Measure | None = None, where: str = "base") -> Verdict:
    """The verdict where only `here` and one other place were measured, and only this metric and measure."""
    known = {
        ("here", rule.metric_name, rule.measure): here,
        (where, rule.metric_name, rule.measure): there,
    }
    (only,) = judge((rule,), lambda *key: known.get(key))
    return only


RULES = [
    plain(at_least=-1e9),
    plain(at_most=1e9),
    plain(improves_on="base"),
    plain(keeps="base", within=1e9),
    gate(improves_on="base"),
    gate(keeps="base", within="1000%"),
]


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("better", ["higher", "lower"])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_value_that_is_not_finite_fails_every_rule(rule, better, bad):
    found = verdict(rule, value(bad, 0.1, better), value(0.5, 0.1, better))
    assert (found.outcome, found.reason) == ("failed", f"qa is {bad}")


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_value_that_was_not_measured_fails_every_rule(rule):
    found = verdict(rule, None, value(0.5, 0.1))
    assert (found.outcome, found.reason) == ("failed", "qa was not measured here")
    assert (found.value, found.reference, found.difference, found.low, found.high, found.n) == (None,) * 6


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_value_of_no_examples_fails_every_rule(rule):
    assert verdict(rule, value(0.9, 0.0, n=0), value(0.5, 0.0)).outcome == "failed"


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule.reference], ids=str)
@pytest.mark.parametrize("better", ["higher", "lower"])
@pytest.mark.parametrize("there", [None, value(NAN, 0.1), value(INF, 0.1), value(-INF, 0.1), value(0.1, 0.1, n=0)])
def test_a_reference_that_cannot_be_compared_fails(rule, better, there):
    found = verdict(rule, value(0.5, 0.1, better), there)
    assert (found.outcome, found.reason) == ("failed", "qa was not measured on base")


@pytest.mark.parametrize("error", [None, NAN, INF])
@pytest.mark.parametrize(
    "rule",
    [gate(at_least=0.1), gate(at_most=9.0), gate(improves_on="base"), gate(keeps="base", within=9.0)],
    ids=str,
)
def test_a_value_whose_noise_is_unknown_fails_and_is_told_the_remedy(rule, error):
    """chrF or F1 of a whole set: no interval can be had of them."""
    found = verdict(rule, value(0.9, error), value(0.2, 0.0))
    assert found.outcome == "failed"
    assert found.reason == (
        "qa has neither results per example nor a standard error, so its noise is unknown: gate another measure, or "
        "write `confidence: null` to judge the value alone"
    )
    assert verdict(rule.model_copy(update={"confidence": None}), value(0.9, error), value(0.2, 0.0)).passed


@pytest.mark.parametrize("error", [None, 0.5])
def test_the_value_alone_is_judged_only_where_the_spec_says_so(error):
    assert verdict(plain(at_least=0.6), value(0.6, error)).passed
    assert verdict(plain(at_most=0.6), value(0.6, error)).passed
    assert not verdict(gate(at_least=0.6), value(0.6, error)).passed


# Thresholds


@pytest.mark.parametrize("better", ["higher", "lower"])
@pytest.mark.parametrize(
    ("rule", "number", "outcome", "reason"),
    [
        (gate(at_least=0.6), 0.7, "passed", "qa 0.7 is at least 0.6; 0.618 to 0.782 at 95% over 100 examples"),
        (gate(at_least=0.6), 0.5, "failed", "qa 0.5 is not at least 0.6; 0.418 to 0.582 at 95% over 100 examples"),
        (
            gate(at_least=0.6),
            0.65,
            "undecided",
            "qa 0.65 may be at least 0.6; 0.568 to 0.732 at 95% over 100 examples; "
            "undecided: about 620 examples would decide",
        ),
        (gate(at_least=0.6, confidence=0.8), 0.65, "passed", "qa 0.65 is at least 0.6; 0.608 to 0.692 at 80% over"),
        (gate(at_most=3.0), 2.5, "passed", "qa 2.5 is at most 3; 2.42 to 2.58 at 95% over 100 examples"),
        (gate(at_most=3.0), 3.5, "failed", "qa 3.5 is not at most 3; 3.42 to 3.58 at 95% over 100 examples"),
        (gate(at_most=3.0), 2.95, "undecided", "qa 2.95 may be at most 3; 2.87 to 3.03 at 95% over 100 examples; und"),
        (plain(at_least=0.6), 0.6, "passed", "qa 0.6 is at least 0.6; 0.518 to 0.682 at 95% over 100 examples; the va"),
        (plain(at_least=0.0), -0.1, "failed", "qa -0.1 is not at least 0; -0.182 to -0.0178 at 95% over 100 examples"),
        (plain(at_most=0.0), 0.1, "failed", "qa 0.1 is not at most 0; 0.0178 to 0.182 at 95% over 100 examples; the "),
    ],
)
def test_thresholds(better, rule, number, outcome, reason):
    found = verdict(rule, value(number, 0.05, better))
    assert found.outcome == outcome
    assert found.reason.startswith(reason)
    threshold = rule.at_least if rule.at_least is not None else rule.at_most
    assert (found.value, found.reference, found.required, found.n) == (number, threshold, 0, 100)
    assert found.difference == pytest.approx(number - threshold)
    assert found.low < found.difference < found.high
    assert found.confidence == rule.confidence


def test_hits_are_counted_so_that_few_of_them_still_have_an_honest_interval():
    assert verdict(gate(at_least=0.9), accuracy(20, 20)).outcome == "undecided"
    assert verdict(gate(at_least=0.9), accuracy(60, 60)).outcome == "passed"
    assert verdict(gate(at_least=0.5), accuracy(7, 7)).outcome == "passed"
    assert verdict(gate(at_least=0.5), accuracy(0, 7)).outcome == "failed"


def test_a_rate_of_nothing_cannot_be_shown_to_be_nothing():
    found = verdict(gate(at_most=0.0), accuracy(0, 200))
    assert found.outcome == "undecided"
    assert found.enough is None
    assert found.reason.endswith("undecided: it is too close to what is asked for any number of examples to decide")
    assert verdict(gate(at_most=0.02), accuracy(0, 200)).passed


# Against another model


@pytest.mark.parametrize(
    ("rule", "ours", "theirs", "better", "passed", "reason"),
    [
        (plain(improves_on="base"), 0.75, 0.5, "higher", True, "0.25 better than 0.5 (base); needed a gain"),
        (plain(improves_on="base"), 0.5, 0.5, "higher", False, "0 better than 0.5 (base); needed a gain"),
        (plain(improves_on="base"), 0.75, 0.5, "lower", False, "0.25 worse than 0.5 (base); needed a gain"),
        (
            plain(improves_on="base", by=0.5),
            2.0,
            2.5,
            "lower",
            True,
            "0.5 better than 2.5 (base); needed a gain of 0.5",
        ),
        (
            plain(improves_on="base", by="10%"),
            3.5,
            4.0,
            "lower",
            True,
            "0.5 better than 4 (base); needed a gain of 0.4",
        ),
        (
            plain(improves_on="base", by="10 %"),
            3.75,
            4.0,
            "lower",
            False,
            "0.25 better than 4 (base); needed a gain of",
        ),
        (
            plain(improves_on="base", by="50%"),
            -2.5,
            -4.0,
            "higher",
            False,
            "1.5 better than -4 (base); needed a gain of 2",
        ),
        (
            plain(keeps="base", within=0.25),
            0.75,
            1.0,
            "higher",
            True,
            "0.25 worse than 1 (base); allowed a loss of 0.25",
        ),
        (plain(keeps="base", within=0.25), 1.5, 1.0, "lower", False, "0.5 worse than 1 (base); allowed a loss of 0.25"),
        (plain(keeps="base"), 1.0, 1.0, "lower", True, "0 better than 1 (base); allowed no loss"),
        (
            plain(keeps="base", within="50%"),
            -5.5,
            -4.0,
            "higher",
            True,
            "1.5 worse than -4 (base); allowed a loss of 2",
        ),
        (plain(keeps="base", within="5%"), 4.5, 4.0, "lower", False, "0.5 worse than 4 (base); allowed a loss of 0.2"),
    ],
)
def test_values_that_are_judged_alone(rule, ours, theirs, better, passed, reason):
    found = verdict(rule, value(ours, None, better), value(theirs, None, better))
    assert found.passed == passed
    assert found.reason.startswith(f"qa {ours:g} is {reason}")
    assert found.reason.endswith("; the value alone was judged")
    assert (found.value, found.reference, found.n, found.low, found.high) == (ours, theirs, 100, None, None)
    assert found.difference == pytest.approx(ours - theirs)


def test_errors_that_a_library_states_add_up():
    here, there = value(0.6, 0.03), value(0.5, 0.04)
    found = verdict(gate(improves_on="base"), here, there)
    assert found.reason == (
        "qa 0.6 is 0.1 better than 0.5 (base), 0.0178 to 0.182 at 95% over 100 examples; needed a gain"
    )
    assert (found.low, found.high) == pytest.approx((0.1 - 1.644854 * 0.05, 0.1 + 1.644854 * 0.05), rel=1e-5)
    assert verdict(gate(improves_on="base", confidence=0.99), here, there).outcome == "undecided"


@pytest.mark.parametrize(
    ("rule", "ours", "outcome"),
    [
        (gate(improves_on="base"), 1.05, "passed"),
        (gate(improves_on="base"), 1.15, "failed"),
        (gate(improves_on="base"), 1.0995, "undecided"),
        (gate(improves_on="base", by=0.04), 1.05, "passed"),
        (gate(improves_on="base", by=0.06), 1.05, "failed"),
        (gate(improves_on="base", by=0.05), 1.05, "undecided"),
        (gate(improves_on="base", by="4%"), 1.04, "passed"),
        (gate(improves_on="base", by="7%"), 1.04, "failed"),
        (gate(keeps="base", within=0.02), 1.11, "passed"),
        (gate(keeps="base", within=0.02), 1.13, "failed"),
        (gate(keeps="base", within=0.02), 1.12, "undecided"),
        (gate(keeps="base", within="2%"), 1.11, "passed"),
        (gate(keeps="base", within="2%"), 1.15, "failed"),
        (gate(keeps="base"), 1.05, "passed"),
        (gate(keeps="base"), 1.1, "undecided"),
    ],
    ids=str,
)
def test_bits_per_byte_of_the_same_documents(rule, ours, outcome):
    here, there = bits(ours, seed=2), bits(1.1, seed=3)
    found = verdict(rule, here, there)
    assert found.outcome == outcome
    assert found.low < found.difference < found.high
    assert (found.high - found.low) / 2 < 0.02, "paired: documents differ by ten times as much"
    assert (found.enough is not None) == (outcome == "undecided")


def test_a_share_of_a_noisy_reference_is_as_noisy():
    """All documents 4% better, whatever their hardness: 0.05 is as noisy as documents are, 4% are not."""
    there = bits(1.1, noise=0.0)
    here = ratio([0.96 * top for top in there.numerators], list(there.weights), "lower")
    share, amount = (verdict(gate(improves_on="base", by=by), here, there) for by in ("3.9%", 0.039 * there.value))
    assert share.required == pytest.approx(amount.required, rel=1e-5)
    assert share.high - share.low < 0.2 * (amount.high - amount.low)
    assert (share.outcome, amount.outcome) == ("passed", "undecided")


def test_of_a_negative_reference_a_share_is_of_its_size():
    there = ratio([-1.0 - n / 100 for n in range(40)], [1.0] * 40, "higher")
    here = ratio([0.5 * one for one in there.numerators], list(there.weights), "higher")
    assert verdict(gate(improves_on="base", by="49%"), here, there).passed
    assert verdict(gate(improves_on="base", by="51%"), here, there).outcome == "failed"
    assert verdict(gate(keeps="base", within="99%"), there, here).outcome == "failed"
    assert verdict(gate(keeps="base", within="101%"), there, here).passed


def test_answers_are_compared_one_by_one():
    """Nine questions more, none lost, is a gain; the same score from other questions may be chance."""
    there = accuracy(40, 100)
    assert verdict(gate(improves_on="base"), accuracy(49, 100), there).passed
    moved = verdict(gate(improves_on="base"), accuracy(49, 100, start=30), there)
    assert moved.outcome == "undecided"
    assert moved.difference == pytest.approx(0.09)


def test_where_no_answer_changed_the_sample_may_still_be_too_small():
    same = verdict(gate(keeps="base", within=0.02), accuracy(30, 50), accuracy(30, 50))
    assert same.outcome == "undecided"
    assert same.enough == 180
    assert same.reason == (
        "qa 0.6 is 0 better than 0.6 (base), -0.0689 to 0.0689 at 95% over 50 examples; allowed a loss of 0.02; "
        "undecided: about 180 examples would decide"
    )
    assert verdict(gate(keeps="base", within=0.02), accuracy(90, 180), accuracy(90, 180)).passed


def test_rates_between_miss_and_hit_are_counted_where_few_of_them_changed():
    """F1 of each example: what was not seen to change may change, up to the whole of it."""
    scores = [0.1 + 0.8 * one / 50 for one in range(50)]
    there = ratio(scores, [1.0] * 50, "higher")
    assert verdict(gate(keeps="base", within=0.02), there, there).outcome == "undecided"
    ties = ratio([0.0, 0.5, 1.0] * 20, [1.0] * 60, "higher")
    assert verdict(gate(keeps="base", within=0.02), ties, ties).outcome == "undecided"
    assert verdict(gate(keeps="base", within=0.1), ties, ties).passed


def test_of_a_rate_over_some_examples_the_others_are_not_counted():
    """The accuracy on pairs whose chosen answer is the longer one: half of these pairs."""
    some = [float(one % 2) for one in range(100)]
    here = ratio([0.0 if one < 8 else weight for one, weight in enumerate(some)], some, "higher")
    alone = ratio([0.0] * 4 + [1.0] * 46, [1.0] * 50, "higher")
    found, wanted = (verdict(gate(at_least=0.85), one) for one in (here, alone))
    assert (found.outcome, found.low, found.high) == ("undecided", wanted.low, wanted.high)
    assert found.enough == pytest.approx(2 * wanted.enough, abs=1)


def test_that_nothing_at_all_is_lost_needs_a_tolerance_or_a_gain():
    found = verdict(gate(keeps="base"), accuracy(60, 100), accuracy(60, 100))
    assert found.reason.endswith(
        "allowed no loss; undecided: no number of examples shows that nothing at all is lost: "
        "allow a loss with `within`"
    )
    assert verdict(gate(keeps="base"), accuracy(70, 100), accuracy(60, 100)).passed


def test_too_few_examples_are_undecided_whatever_they_say():
    few = [ratio([float(one) + n for one in range(FEWEST - 1)], [1.0] * (FEWEST - 1), "higher") for n in (5, 0)]
    found = verdict(gate(improves_on="base"), *few)
    assert (found.outcome, found.enough, found.low, found.high) == ("undecided", FEWEST, None, None)
    assert found.reason == (
        "qa 14 is 5 better than 9 (base); needed a gain; undecided: too few of 19 examples differ to know how much "
        "they vary, about 20 may do"
    )
    assert verdict(plain(improves_on="base"), *few).passed
    single = verdict(gate(at_least=0.1), ratio([0.5], [2.0], "higher"))
    assert single.outcome == "undecided"


def test_models_of_other_examples_are_compared_by_their_errors():
    here, there = bits(1.0, n=60), bits(1.1, n=80)
    found = verdict(gate(improves_on="base"), here, there)
    error = math.hypot(here.standard_error, there.standard_error)
    assert found.high - found.low == pytest.approx(2 * 1.644854 * error, rel=1e-4)


PERCENT = [n / 100 for n in range(2, 97)]
"""Accuracies over 100 questions: a step of two of them is 0.02, not 0.020000000000000018."""


def test_a_loss_of_exactly_what_is_allowed_is_allowed_whatever_the_rounding():
    rule = plain(keeps="base", within=0.02)
    higher = [here for here in PERCENT if not verdict(rule, value(here), value(round(here + 0.02, 2))).passed]
    lower = [
        there
        for there in PERCENT
        if not verdict(rule, value(round(there + 0.02, 2), better="lower"), value(there, better="lower")).passed
    ]
    assert (higher, lower) == ([], [])


def test_a_gain_of_exactly_what_is_needed_is_enough_whatever_the_rounding():
    rule = plain(improves_on="base", by=0.02)
    assert [there for there in PERCENT if not verdict(rule, value(round(there + 0.02, 2)), value(there)).passed] == []


def test_rounding_never_turns_no_gain_into_one():
    rule = plain(improves_on="base")
    assert [one for one in PERCENT if verdict(rule, value(one), value(one)).passed] == []


@pytest.mark.parametrize("where", ["base", "previous", "knowledge"])
def test_a_gate_looks_where_it_says(where):
    rule = plain(improves_on=where)
    assert verdict(rule, value(2.0), value(1.0), where=where).passed
    assert verdict(rule, value(2.0), value(1.0), where="elsewhere").reason == f"qa was not measured on {where}"


def test_a_gate_judges_the_measure_that_it_names():
    rule = GateSpec(metric="pairs.reward_margin", at_least=0.5, confidence=None)
    known = {("here", "pairs", "reward_margin"): value(0.7), ("here", "pairs", None): value(0.1)}
    (found,) = judge((rule,), lambda *key: known.get(key))
    assert (found.passed, found.value) == (True, 0.7)


def test_every_gate_gets_its_verdict_in_the_order_of_the_spec():
    gates = (plain(at_least=0.9), GateSpec(metric="other", at_least=0.1), plain(at_most=0.9))
    found = judge(gates, lambda where, metric, _: value(0.5) if (where, metric) == ("here", "qa") else None)
    assert [one.passed for one in found] == [False, False, True]
    assert [one.gate for one in found] == [
        "qa at least 0.9, by its value alone",
        "other at least 0.1, at 95%",
        "qa at most 0.9, by its value alone",
    ]
    assert judge((), lambda *_: None) == []


def test_a_verdict_is_kept_as_plain_json():
    record = verdict(gate(at_least=0.6), value(0.75, 0.0625)).as_record()
    assert record == {
        "gate": "qa at least 0.6, at 95%",
        "outcome": "passed",
        "value": 0.75,
        "reference": 0.6,
        "difference": 0.75 - 0.6,
        "low": 0.0471966,
        "high": 0.252803,
        "required": 0.0,
        "margin": 0.15,
        "confidence": 0.95,
        "n": 100,
        "enough": None,
        "reason": "qa 0.75 is at least 0.6; 0.647 to 0.853 at 95% over 100 examples",
    }


def test_the_same_measurements_come_to_the_same_verdict():
    rule = gate(improves_on="base", by="1%")
    assert verdict(rule, bits(1.0), bits(1.1)) == verdict(rule, bits(1.0), bits(1.1))


# Honest, from the gate to the verdict


SAMPLES = 400


def passes(rule: GateSpec, sample) -> float:
    """How often a gate passes over many samples, the number of the sample being its seed."""
    return sum(verdict(rule, *sample(random.Random(seed))).passed for seed in range(SAMPLES)) / SAMPLES


def questions(right: float, gained: float, lost: float, n: int = 120):
    """Two models on the same questions: the reference is right at that rate, some are gained and some lost."""

    def sample(pick: random.Random) -> tuple[Measure, Measure]:
        cells = [(1.0, 1.0), (0.0, 1.0), (1.0, 0.0), (0.0, 0.0)]
        drawn = pick.choices(cells, [right - lost, lost, gained, 1 - right - gained], k=n)
        return tuple(ratio([one[side] for one in drawn], [1.0] * n, "higher") for side in (0, 1))

    return sample


def texts(change: float, n: int = 60):
    """Bits of two models on the same documents, whose sizes span a hundredfold."""

    def sample(pick: random.Random) -> tuple[Measure, Measure]:
        sizes = [float(1 + int(pick.lognormvariate(6, 1))) for _ in range(n)]
        theirs = [size * max(0.2, pick.gauss(1.1, 0.2)) for size in sizes]
        ours = [
            bits * (1 + change) + pick.gauss(0, 1.5) * math.sqrt(size) for bits, size in zip(theirs, sizes, strict=True)
        ]
        return ratio(ours, sizes, "lower"), ratio(theirs, sizes, "lower")

    return sample


@pytest.mark.parametrize(
    ("rule", "sample"),
    [
        (gate(improves_on="base"), questions(0.5, 0.1, 0.1)),
        (gate(improves_on="base", by=0.05), questions(0.5, 0.15, 0.1)),
        (gate(improves_on="base", by="10%"), questions(0.5, 0.15, 0.1)),
        (gate(keeps="base", within=0.03), questions(0.7, 0.02, 0.05)),
        (gate(keeps="base", within="5%"), questions(0.8, 0.02, 0.06)),
        (gate(at_least=0.5), questions(0.5, 0.1, 0.1)),
        (gate(at_most=0.7), questions(0.7, 0.1, 0.1)),
        (gate(improves_on="base"), texts(0.0)),
        (gate(improves_on="base", by="4%"), texts(-0.04)),
        (gate(keeps="base", within="8%"), texts(0.08)),
        (gate(keeps="base", within=0.11), texts(0.1)),
        (gate(at_most=1.1), texts(0.0)),
    ],
    ids=lambda one: str(one) if isinstance(one, GateSpec) else "",
)
def test_a_model_exactly_on_the_threshold_passes_in_one_of_twenty_samples(rule, sample):
    assert passes(rule, sample) <= 0.085, "5% and what chance adds to it in so many samples; once in a thousand more"


@pytest.mark.parametrize(
    ("rule", "sample"),
    [
        (gate(improves_on="base"), questions(0.5, 0.18, 0.05)),
        (gate(keeps="base", within=0.05), questions(0.7, 0.05, 0.02)),
        (gate(at_least=0.5), questions(0.65, 0.1, 0.1)),
        (gate(improves_on="base", by="4%"), texts(-0.08)),
        (gate(keeps="base", within="8%"), texts(0.02)),
    ],
    ids=lambda one: str(one) if isinstance(one, GateSpec) else "",
)
def test_a_model_well_beyond_the_threshold_passes(rule, sample):
    assert passes(rule, sample) > 0.8
