"""Whether a preference is one for length: by hand, with the noise that the jackknife gives."""

import math

import numpy as np
import pytest

from stages.measure import Measure
from stages.metrics import preference
from stages.metrics.whole import whole

CHOSEN, REJECTED = [0.5, -0.2, 0.1, 0.0, 0.3], [0.1, 0.1, 0.4, 0.0, -0.1]
LONGER = [10.0, -4.0, 6.0, 3.0, 0.0]
"""Tokens by which the chosen answer is longer."""
MARGINS = [c - r for c, r in zip(CHOSEN, REJECTED, strict=True)]


@pytest.fixture
def measures() -> dict[str, Measure]:
    return preference._of_reward({"chosen": CHOSEN, "rejected": REJECTED}, LONGER)


def test_the_bias_is_how_much_longer_the_preferred_answer_is(measures):
    assert measures["length_bias"].numerators == (10, 4, -6, 0, 0)  # a tie prefers nothing
    assert measures["length_bias"].value == pytest.approx(8 / 5)
    assert measures["length_bias"].better == "lower"
    policy = preference._of_policy(MARGINS, LONGER)
    assert policy["policy_length_bias"].numerators == measures["length_bias"].numerators


def test_the_accuracy_is_told_apart_by_which_answer_is_longer(measures):
    assert measures["accuracy_chosen_longer"].value == pytest.approx(1 / 3)
    assert measures["accuracy_chosen_longer"].weights == (1, 0, 1, 1, 0)
    assert measures["accuracy_chosen_shorter"].value == 0
    assert measures["accuracy_chosen_shorter"].weights == (0, 1, 0, 0, 0)
    alike = preference._of_reward({"chosen": CHOSEN, "rejected": REJECTED}, [1.0] * 5)
    assert "accuracy_chosen_shorter" not in alike


def test_the_correlation_is_pearsons_and_its_noise_the_jackknifes(measures):
    found = measures["length_correlation"]
    assert found.value == pytest.approx(np.corrcoef(MARGINS, LONGER)[0, 1])
    without = [np.corrcoef(np.delete(MARGINS, n), np.delete(LONGER, n))[0, 1] for n in range(5)]
    assert found.standard_error == pytest.approx(math.sqrt(4 / 5 * np.sum((without - np.mean(without)) ** 2)))
    assert sum(found.numerators) / 5 == pytest.approx(found.value)


@pytest.mark.parametrize("longer", [[1.0] * 5, [0.0] * 5])
def test_where_no_length_differs_there_is_no_correlation(longer):
    found = preference._of_reward({"chosen": CHOSEN, "rejected": REJECTED}, longer)
    assert "length_correlation" not in found
    same = preference._of_reward({"chosen": CHOSEN, "rejected": CHOSEN}, LONGER)
    assert "length_correlation" not in same
    assert same["length_bias"].value == 0


@pytest.mark.parametrize("pairs", [1, 2, 4])
def test_a_few_pairs_are_measured_without_a_noise_that_they_do_not_show(pairs):
    found = preference._of_reward({"chosen": CHOSEN[:pairs], "rejected": REJECTED[:pairs]}, LONGER[:pairs])
    assert found["reward_accuracy"].n == pairs
    if pairs > 1:
        assert found["length_correlation"].n == pairs
        assert (found["length_correlation"].standard_error is None) == (pairs == 2)


def test_the_noise_of_a_correlation_is_that_of_fresh_samples():
    draw = np.random.default_rng(0)
    found = []
    for _ in range(300):
        x, noise = draw.normal(size=(2, 80))
        found.append(preference._correlation(list(0.5 * x + noise), list(x)))
    spread = np.std([one.value for one in found])
    assert np.mean([one.standard_error for one in found]) == pytest.approx(spread, rel=0.1)


def test_the_jackknife_of_a_mean_is_the_mean_and_its_error():
    values = [1.0, 2.0, 4.0, 8.0]
    found = whole(3.75, 4, [(15 - one) / 3 for one in values], "higher")
    assert found.numerators == pytest.approx(values)
    assert found.standard_error == pytest.approx(np.std(values, ddof=1) / 2)
    assert whole(3.75, 4, [1.0, 2.0, math.nan, 3.0], "higher").standard_error is None
    assert whole(3.75, 4, (), "higher") == Measure(3.75, None, 4, "higher")
