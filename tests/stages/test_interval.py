"""Intervals against published examples, exact arithmetic, scipy and the counting that no formula knows."""

import math

import numpy as np
import pytest
from scipy import stats

from stages.interval import BLOCKS, FEWEST, MOST, count_differing, counted, reported, resampled

PAIRS = (-1.0, 0.0, 1.0)


def paired(gained: int, lost: int, n: int, threshold: float = 0.0, confidence: float = 0.95):
    """The difference of two accuracies: so many examples gained, so many lost, the others alike."""
    shares = {1.0: gained / n, -1.0: lost / n, 0.0: 1 - (gained + lost) / n}
    return counted(shares, n, threshold, confidence)


def hits(found: int, n: int, threshold: float = 0.5, confidence: float = 0.95):
    return counted({1.0: found / n, 0.0: 1 - found / n}, n, threshold, confidence)


@pytest.mark.parametrize("n", [5, 50, 500])
@pytest.mark.parametrize("share", [0.0, 0.2, 0.6, 1.0])
def test_a_proportion_has_wilsons_interval_with_continuity_correction(share, n):
    found = round(share * n)
    wilson = stats.binomtest(found, n).proportion_ci(confidence_level=0.9, method="wilsoncc")
    interval = hits(found, n)
    assert (interval.low, interval.high) == pytest.approx((wilson.low, wilson.high), abs=1e-9)


def tango(gained: int, lost: int, n: int, shift: float) -> float:
    """The score statistic of Tango (1998), eq. 5, whose constrained estimate is a root of a quadratic."""
    b = -gained - lost + (2 * n - gained + lost) * shift
    c = -lost * shift * (1 - shift)
    q = (math.sqrt(b * b - 8 * n * c) - b) / (4 * n)
    return (gained - lost - n * shift) / math.sqrt(n * (2 * q + shift * (1 - shift)))


@pytest.mark.parametrize(("gained", "lost", "n"), [(9, 4, 44), (0, 3, 60), (30, 10, 200), (0, 0, 50), (5, 0, 25)])
def test_a_paired_difference_of_proportions_has_tangos_interval(gained, lost, n):
    """At each end the published statistic is the normal quantile, once the correction is taken off it."""
    interval = paired(gained, lost, n)
    for end, sign in ((interval.low, 1), (interval.high, -1)):
        gap = abs((gained - lost) / n - end)
        statistic = tango(gained, lost, n, end) * (gap - 0.5 / n) / gap
        assert statistic * sign == pytest.approx(stats.norm.ppf(0.95), rel=1e-6)


def test_without_any_difference_the_interval_is_that_of_the_rule_of_three_and_a_little_more():
    """Exactly: a loss of 1 - 0.05 ** (1 / n) is seen at least once in 95% of samples. A bootstrap says 0."""
    for n in (50, 150, 500, 2000):
        exact = 1 - 0.05 ** (1 / n)
        found = paired(0, 0, n)
        assert exact < -found.low < 1.25 * exact
        assert found.high == pytest.approx(-found.low)


def test_a_share_of_the_reference_also_knows_of_losses_that_were_not_seen():
    """Every one of 40 questions right before and after, 5% may be lost: that is not enough to tell."""
    shares = {0.05: 1.0, 1.0: 0.0, -0.95: 0.0, 0.0: 0.0}
    assert counted(shares, 40, 0.0, 0.95).low < 0 < counted(shares, 400, 0.0, 0.95).low


def test_values_at_the_edge_of_what_is_possible_have_an_end_there():
    assert hits(0, 30).low == 0
    assert hits(30, 30).high == 1
    assert paired(30, 0, 30).high == 1


@pytest.mark.parametrize("n", [20, 60, 300])
@pytest.mark.parametrize("skew", [False, True])
def test_the_bootstrap_agrees_with_scipy_where_both_are_good(n, skew):
    draw = np.random.default_rng(n)
    values = draw.exponential(size=n) if skew else draw.normal(size=n)
    found = resampled(list(values), [1.0] * n, 0.0, 0.95)
    theirs = stats.bootstrap(
        (values,), np.mean, confidence_level=0.9, method="BCa", n_resamples=4999, rng=np.random.default_rng(3)
    ).confidence_interval
    width = theirs.high - theirs.low
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(theirs.low, abs=0.15 * width)
    assert found.high == pytest.approx(theirs.high, abs=0.25 * width)


def test_an_example_is_resampled_with_its_weight():
    """Documents whose rate is the same differ by nothing, however their sizes do; other rates are the noise."""
    sizes = [float(size) for size in range(10, 60)]
    same = resampled([1.25 * size for size in sizes], sizes, 0.0, 0.95)
    assert same.low == same.high == 1.25
    rates = [1.25] * 25 + [1.5] * 25
    other = resampled([rate * size for rate, size in zip(rates, sizes, strict=True)], sizes, 0.0, 0.95)
    assert other.low < other.value < other.high


def test_intervals_are_deterministic_and_follow_unit_and_sign():
    draw = np.random.default_rng(5)
    tops, weights = list(draw.normal(1, 2, 80)), list(draw.lognormal(size=80))
    one = resampled(tops, weights, 0.0, 0.95)
    assert one == resampled(tops, weights, 0.0, 0.95)
    scaled = resampled([1000 * top for top in tops], weights, 0.0, 0.95)
    assert (scaled.low, scaled.high) == pytest.approx((1000 * one.low, 1000 * one.high))
    turned = resampled([-top for top in tops], weights, 0.0, 0.95)
    assert (turned.low, turned.high) == pytest.approx((-one.high, -one.low))


@pytest.mark.parametrize("differing", [1, 2, FEWEST - 1])
def test_a_difference_that_hangs_on_few_examples_has_no_bounds(differing):
    found = resampled([0.0] * (100 - differing) + [0.3 + n / 100 for n in range(differing)], [1.0] * 100, 0.0, 0.95)
    assert (found.low, found.high) == (-math.inf, math.inf)
    assert found.enough == math.ceil(100 * FEWEST / differing)


def test_examples_that_happen_to_agree_are_not_taken_for_too_few():
    assert count_differing([1.0, 1.0, 2.0, 3.0]) == 4
    assert count_differing([1.0, 1.0, 1.0, 2.0, 3.0]) == 2
    assert math.isfinite(resampled([0.1, 0.1, *(one / 7 for one in range(FEWEST - 2))], [1.0] * FEWEST, 0, 0.95).low)


def test_where_every_example_says_the_same_there_is_no_noise():
    sizes = [float(size) for size in range(1, FEWEST + 1)]
    found = resampled([0.1 * size for size in sizes], sizes, 0.0, 0.95)
    assert found.low == found.high == pytest.approx(0.1)
    few = resampled([0.1 * size for size in sizes[1:]], sizes[1:], 0.0, 0.95)
    assert (few.low, few.high, few.enough) == (-math.inf, math.inf, FEWEST)


@pytest.mark.parametrize("confidence", [0.6, 0.9, 0.95, 0.999])
def test_more_confidence_is_a_wider_interval(confidence):
    tops = list(np.random.default_rng(1).normal(size=100))
    for interval in (
        lambda sure: resampled(tops, [1.0] * 100, 0.0, sure),
        lambda sure: paired(9, 4, 100, confidence=sure),
        lambda sure: reported(0.5, 0.1, 100, 0.0, sure),
    ):
        narrow, wide = interval(0.55), interval(confidence)
        assert wide.low < narrow.low <= narrow.value <= narrow.high < wide.high


def test_many_examples_are_resampled_in_blocks_and_come_to_the_same():
    draw = np.random.default_rng(8)
    weights = draw.lognormal(size=3 * BLOCKS + 7)
    tops = weights * draw.normal(0.1, 1, len(weights))
    found = resampled(list(tops), list(weights), 0.0, 0.95)
    rest = tops - found.value * weights
    error = math.sqrt(math.fsum(rest**2)) / weights.sum()
    assert found.value == pytest.approx(tops.sum() / weights.sum())
    for end, sign in ((found.low, -1), (found.high, 1)):
        assert end == pytest.approx(found.value + sign * 1.645 * error, abs=0.15 * error)


def test_rows_that_repeat_themselves_do_not_hide_their_noise_in_blocks():
    repeating = np.tile([1.0, 0.0, -1.0, 2.0, -2.0, 0.5], 1000) + 0.01  # six in a block come to the same every time
    found = resampled(list(repeating), [1.0] * len(repeating), 0.0, 0.95)
    error = repeating.std() / math.sqrt(len(repeating))
    assert found.high - found.value == pytest.approx(1.645 * error, rel=0.15)


def test_a_library_s_own_error_is_taken_as_normal():
    found = reported(0.4, 0.02, 500, 0.35, 0.95)
    assert (found.low, found.high) == pytest.approx((0.4 - 1.644854 * 0.02, 0.4 + 1.644854 * 0.02))


# How many examples would do


def test_as_many_examples_as_are_recommended_decide_in_four_of_five_samples():
    draw = np.random.default_rng(2)
    gained, lost, n = 9, 4, 100
    wanted = paired(gained, lost, n).enough
    samples = draw.multinomial(wanted, [gained / n, lost / n, 1 - (gained + lost) / n], size=400)
    decided = [paired(int(one[0]), int(one[1]), wanted).low > 0 for one in samples]
    assert np.mean(decided) == pytest.approx(0.8, abs=0.06)


def test_as_many_documents_as_are_recommended_decide_in_four_of_five_samples():
    draw = np.random.default_rng(2)
    wanted = resampled(list(draw.permutation(np.linspace(-1, 1.4, 60))), [1.0] * 60, 0.0, 0.95).enough
    rows = draw.choice(np.linspace(-1, 1.4, 60), size=(200, wanted))
    decided = [resampled(list(row), [1.0] * wanted, 0.0, 0.95).low > 0 for row in rows]
    assert np.mean(decided) == pytest.approx(0.8, abs=0.08)


def test_where_nothing_differs_the_recommended_number_is_the_first_that_decides():
    wanted = paired(0, 0, 50, threshold=-0.02).enough
    assert wanted == 180
    assert paired(0, 0, wanted).low > -0.02
    assert paired(0, 0, wanted - 2).low < -0.02


def test_on_the_threshold_or_next_to_it_no_number_would_do():
    assert paired(4, 4, 50).enough is None
    assert reported(0.5, 0.1, 100, 0.5, 0.95).enough is None
    assert reported(0.5, 0.1, 100, 0.5 - 1e-6, 0.95).enough is None
    assert reported(0.5, 0.1, 100, 0.499, 0.95).enough < MOST


# Honest: a simulation over many seeds, the reason for the choice of methods

N = (50, 120, 500)
SAMPLES = 1000


def allowed(samples: int) -> float:
    """5%, and what chance adds to the share found in so many samples; one check in a thousand errs."""
    return stats.binom.ppf(0.999, samples, 0.055) / samples


@pytest.mark.parametrize("n", N)
@pytest.mark.parametrize(
    ("right", "lost", "factor", "threshold"),
    [
        (0.5, 0.15, 1.0, 0.0),  # improves_on, as good as the reference; keeps, within nothing
        (0.5, 0.05, 1.0, 0.0),
        (0.8, 0.05, 1.0, -0.02),  # keeps within 0.02, what is lost being 0.02
        (0.5, 0.02, 1.0, -0.02),  # nothing is ever gained
        (0.9, 0.05, 0.95, 0.0),  # keeps within 5%
        (0.5, 0.05, 1.05, 0.0),  # improves_on by 5%
    ],
)
def test_accuracies_that_are_no_better_pass_in_one_of_twenty_samples(n, right, lost, factor, threshold):
    """Pairs of hits and misses: exactly on the threshold, as correlated as models of one chain are."""
    gained = threshold + factor * lost - (1 - factor) * (right - lost)
    cells = np.array([right - lost, gained, lost, 1 - right - gained])
    values = [1 - factor, 1.0, -factor, 0.0]
    samples, times = np.unique(np.random.default_rng(n).multinomial(n, cells, size=SAMPLES), axis=0, return_counts=True)
    intervals = []
    for one in samples:
        shares = dict.fromkeys(values, 0.0)
        for value, count in zip(values, one, strict=True):
            shares[value] += count / n
        intervals.append(counted(shares, n, threshold, 0.95))
    assert times[[one.low > threshold for one in intervals]].sum() / SAMPLES <= allowed(SAMPLES)
    assert times[[one.high < threshold for one in intervals]].sum() / SAMPLES <= allowed(SAMPLES)


@pytest.mark.parametrize("n", N)
@pytest.mark.parametrize("rate", [0.25, 0.6, 0.9])
def test_accuracies_on_a_threshold_pass_it_in_one_of_twenty_samples(n, rate):
    """Exact: no sample is drawn, every number of hits counts with its probability."""
    chances = stats.binom.pmf(range(n + 1), n, rate)
    intervals = [hits(found, n, rate) for found in range(n + 1)]
    assert chances[[one.low > rate for one in intervals]].sum() <= 0.06
    assert chances[[one.high < rate for one in intervals]].sum() <= 0.06


def documents(draw: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Bits of two models that are equally good, beyond one another, on documents whose sizes span a hundredfold."""
    sizes = np.round(draw.lognormal(6, 1, n)) + 1
    hardness = draw.normal(1.1, 0.2, n)
    ours, theirs = (sizes * hardness + draw.gamma(4, 0.25, n) * 0.3 * np.sqrt(sizes * 40) for _ in range(2))
    return ours - theirs, sizes


def margins(draw: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Reward margins around nothing, with heavy tails."""
    return draw.standard_t(5, n), np.ones(n)


def skewed(draw: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """A few pairs moved far, most hardly: skewed, centred on its mean."""
    return draw.gamma(2, 1, n) - 2, np.ones(n)


@pytest.mark.parametrize("n", N)
@pytest.mark.parametrize("kind", [documents, margins, skewed])
def test_documents_and_margins_that_are_no_better_pass_in_one_of_twenty_samples(kind, n):
    samples = 500
    draw = np.random.default_rng(n + 1)
    intervals = [resampled(*map(list, kind(draw, n)), 0.0, 0.95) for _ in range(samples)]
    for beyond in ([one.low > 0 for one in intervals], [one.high < 0 for one in intervals]):
        assert np.mean(beyond) <= allowed(samples)
    assert np.mean([one.low <= 0 <= one.high for one in intervals]) <= 0.95, (
        "an interval that is never wrong is too wide"
    )


def test_what_is_better_passes():
    """Power: 5 points gained among 500 questions, 1% fewer bits, a margin of a fifth of its spread."""
    draw = np.random.default_rng(4)
    gains = draw.multinomial(500, [0.08, 0.03, 0.89], size=300)
    assert np.mean([paired(int(one[0]), int(one[1]), 500).low > 0 for one in gains]) > 0.9
    fewer = []
    for _ in range(100):
        bits, sizes = documents(draw, 120)
        fewer.append(resampled(list(bits - 0.011 * sizes * 5), list(sizes), 0.0, 0.95).high < 0)
    assert np.mean(fewer) > 0.9
    moved = [resampled(list(draw.standard_t(5, 300) + 0.25), [1.0] * 300, 0.0, 0.95).low > 0 for _ in range(100)]
    assert np.mean(moved) > 0.9
