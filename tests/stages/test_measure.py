import math
import random
from itertools import pairwise

import pytest

from stages import evaluate
from stages.measure import Measure, ratio


def bootstrap(values: list, statistic, rounds: int = 2000) -> float:
    """The standard deviation of a statistic over seeded resamples of the examples."""
    pick = random.Random(5)
    found = [statistic(pick.choices(values, k=len(values))) for _ in range(rounds)]
    mean = math.fsum(found) / rounds
    return math.sqrt(math.fsum((one - mean) ** 2 for one in found) / (rounds - 1))


def ratio_of(pairs) -> float:
    return math.fsum(top for top, _ in pairs) / math.fsum(weight for _, weight in pairs)


def test_a_ratio_by_hand():
    # 9 / 6 = 1.5; residuals 2 - 1.5, 3 - 3, 4 - 4.5 = 0.5, 0, -0.5; sqrt(3/2 * 0.5) / 6
    found = ratio([2.0, 3.0, 4.0], [1.0, 2.0, 3.0], "lower")
    assert found.value == 1.5
    assert found.standard_error == pytest.approx(math.sqrt(0.75) / 6, rel=1e-12)
    assert (found.n, found.better) == (3, "lower")
    assert (found.numerators, found.weights) == ((2.0, 3.0, 4.0), (1.0, 2.0, 3.0))


def test_with_equal_weights_it_is_the_mean_and_its_textbook_error():
    hits = [1.0] * 30 + [0.0] * 70
    found = ratio(hits, [1.0] * 100, "higher")
    assert found.value == 0.3
    assert found.standard_error == pytest.approx(math.sqrt(0.3 * 0.7 / 99), rel=1e-12)


def test_the_error_does_not_depend_on_the_unit_of_the_weights():
    tops, weights = [2.0, 3.0, 5.0, 4.0], [1.0, 2.0, 2.0, 3.0]
    one = ratio(tops, weights, "lower")
    many = ratio([1000 * top for top in tops], [1000 * weight for weight in weights], "lower")
    assert many.value == pytest.approx(one.value)
    assert many.standard_error == pytest.approx(one.standard_error)


def test_the_error_of_a_ratio_agrees_with_a_bootstrap():
    pick = random.Random(1)
    weights = [pick.uniform(20, 200) for _ in range(300)]
    tops = [weight * pick.gauss(1.2, 0.3) + pick.gauss(0, 5) for weight in weights]
    found = ratio(tops, weights, "lower")
    assert found.standard_error == pytest.approx(bootstrap(list(zip(tops, weights, strict=True)), ratio_of), rel=0.1)


def test_the_error_shrinks_with_the_root_of_the_examples():
    tops, weights = [1.0, 0.0, 1.0, 1.0, 0.0], [1.0] * 5
    errors = [ratio(tops * times, weights * times, "higher").standard_error for times in (1, 4, 16, 64)]
    for larger, smaller in pairwise(errors[1:]):
        assert larger / smaller == pytest.approx(2, rel=0.02)


def test_equal_examples_have_no_noise_and_one_example_has_none_that_is_known():
    assert ratio([0.5, 0.5, 0.5], [1.0, 1.0, 1.0], "higher").standard_error == 0
    assert ratio([0.5], [1.0], "higher") == Measure(0.5, None, 1, "higher", (0.5,), (1.0,))


@pytest.mark.parametrize(("tops", "weights"), [([], []), ([0.0], [0.0]), ([1.0, 1.0], [0.0, 0.0]), ([1.0], [-1.0])])
def test_nothing_to_measure_is_refused(tops, weights):
    with pytest.raises(ValueError, match="nothing to measure: no examples"):
        ratio(tops, weights, "lower")


def test_lists_of_unequal_length_are_refused():
    with pytest.raises(ValueError, match="zip"):
        ratio([1.0], [1.0, 1.0], "lower")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_shows_in_the_ratio(bad):
    found = ratio([1.0, bad, 1.0], [1.0, 1.0, 1.0], "lower")
    assert not math.isfinite(found.value)
    assert not math.isfinite(found.standard_error)


def test_measures_of_the_same_examples_are_compared_one_by_one():
    ours = ratio([0.5, 1.0], [1.0, 2.0], "higher")
    assert ours.is_paired_with(ratio([0.1, 0.1], [1.0, 2.0], "higher"))
    assert not ours.is_paired_with(ratio([0.1, 0.1], [2.0, 1.0], "higher")), "other examples"
    assert not ours.is_paired_with(ratio([0.1, 0.1, 0.1], [1.0, 2.0, 3.0], "higher")), "more examples"
    assert not ours.is_paired_with(Measure(0.5, 0.1, 2, "higher"))
    assert not Measure(0.5, 0.1, 2, "higher").is_paired_with(Measure(0.5, 0.1, 2, "higher"))


def test_a_measure_survives_its_file(tmp_path):
    for measure in (ratio([2.0, 3.0], [1.0, 2.0], "lower"), Measure(0.5, None, 7, "higher")):
        kept = evaluate.Evaluation({"x": measure}, "x", {"tokens": 7}, {"chosen": [-1.5]}, 0.25)
        evaluate.save(kept, tmp_path / "x.json", {"model": "a"})
        assert evaluate.load(tmp_path / "x.json") == kept
