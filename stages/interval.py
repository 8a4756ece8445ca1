"""Confidence intervals of a mean over examples, and how many examples would decide what these do not.

Each end of an interval holds with the asked confidence by itself: it is a pair of one-sided bounds. Which method is
used, and what a simulation says of each, is in ``docs/gates.md``. Everything is deterministic: same numbers, same ends.
"""

import functools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

RESAMPLES = 4999
"""Of the bootstrap. (RESAMPLES + 1) x 5% is a whole number, so that the 95% bound is one of the resamples."""
LEAST_DOUBT = 1 / (RESAMPLES + 1)
"""1 - confidence below which the bound would lie beyond every resample."""
SEED = 17
BLOCKS = 1000
"""Examples beyond this are summed in so many drawn blocks, and blocks are resampled: as valid, and of bounded cost."""
FEWEST = 20
"""Examples that differ, below which a bootstrap is not believed: so few do not show what their spread is."""
POWER = 0.8
"""The chance that as many examples as are recommended decide, were the truth what was measured."""
MOST = 10_000_000
"""A recommendation beyond this is none."""
_STEP = 0.5
"""Continuity correction of a count, in examples."""
_SAME = 1e-12
"""What rounding leaves of a difference of nothing, relative to what is subtracted."""
_CLOSE = 1e-10
"""How far from a root is near enough, relative to where it was looked for."""
_ROW = 512


@dataclass(frozen=True, slots=True)
class Interval:
    """What is known of a mean."""

    value: float
    low: float
    """With the asked confidence it is at least this."""
    high: float
    """With the asked confidence it is at most this."""
    enough: int | None
    """Examples that would tell it from the threshold; None where no number would."""


def counted(shares: Mapping[float, float], n: int, threshold: float, confidence: float) -> Interval:
    """The score interval of a mean whose examples take few known values: hits, paired hits and misses, ties.

    It is Wilson's of one proportion, Tango's of two paired ones, and Nam and Blackwelder's where one of them is
    multiplied, with a continuity correction. Unlike a bootstrap it knows of what was not seen yet: that none of fifty
    examples was lost does not mean that none ever is.

    Args:
        shares: every value that an example can have, also those that none has, and the share of examples that do.
        n: examples.
        threshold: what the mean is compared with.
        confidence: of each end.
    """
    value = math.fsum(one * share for one, share in shares.items())
    limit = NormalDist().inv_cdf(confidence)

    def end(edge: float) -> float:
        def beyond(mean: float) -> float:
            return abs(value - mean) - _STEP / n - limit * math.sqrt(_variance_if(shares, value, mean) / n)

        return edge if edge == value or beyond(edge) <= 0 else _root(beyond, edge, value)

    low, high = end(min(shares)), end(max(shares))
    spread = math.fsum(share * (one - value) ** 2 for one, share in shares.items())
    inside = min(shares) < threshold < max(shares)
    supposed = _variance_if(shares, value, threshold) if inside else spread
    return Interval(value, low, high, _enough(value - threshold, supposed, spread, _STEP, confidence))


def resampled(tops: Sequence[float], weights: Sequence[float], threshold: float, confidence: float) -> Interval:
    """The studentised bootstrap interval of sum(tops) / sum(weights), an example being resampled with its weight.

    Without bounds where too few examples say another thing than the others do.
    """
    import numpy as np

    x, w = _blocks(np.asarray(tops, dtype=np.float64)), _blocks(np.asarray(weights, dtype=np.float64))
    value = float(x.sum() / w.sum())
    rest = x - value * w
    scale = float(np.abs(rest).max())
    if len(tops) < FEWEST:
        return Interval(value, -math.inf, math.inf, FEWEST)
    if scale <= _SAME * abs(value) * float(w.max()):  # every example says the same
        return Interval(value, value, value, None)
    if (differing := count_differing(tops)) < FEWEST:
        return Interval(value, -math.inf, math.inf, math.ceil(len(tops) * FEWEST / max(1, differing)))
    rest /= scale
    n = len(rest)
    sums = _resample(np.stack([rest, w, rest * rest, rest * w, w * w], axis=1))
    change = sums[:, 0] / sums[:, 1]
    squares = sums[:, 2] - 2 * change * sums[:, 3] + change**2 * sums[:, 4]
    squares[squares < _SAME * float(rest @ rest)] = 0
    errors = np.sqrt(squares * n / (n - 1)) / sums[:, 1]
    with np.errstate(divide="ignore", invalid="ignore"):
        scores = np.sort(np.where(change == 0, 0.0, change / errors))
    error = float(np.sqrt((rest @ rest) * n / (n - 1)) / w.sum())
    tail = max(0, math.floor((RESAMPLES + 1) * (1 - confidence) + 1e-9) - 1)
    low, high = (value - float(scores[at]) * error * scale for at in (RESAMPLES - 1 - tail, tail))
    spread = (error * scale) ** 2 * len(tops)
    return Interval(value, low, high, _enough(value - threshold, spread, spread, 0.0, confidence))


def count_differing(values: Sequence[float]) -> int:
    """How many are not as most are; all of them where no value is that of more than half."""
    alike = max(Counter(values).values())
    return len(values) - (alike if 2 * alike > len(values) else 0)


def reported(value: float, error: float, n: int, threshold: float, confidence: float) -> Interval:
    """The normal interval of a value whose standard error a library states."""
    margin = NormalDist().inv_cdf(confidence) * error
    spread = error**2 * n
    return Interval(value, value - margin, value + margin, _enough(value - threshold, spread, spread, 0.0, confidence))


def _enough(gap: float, supposed: float, spread: float, step: float, confidence: float) -> int | None:
    """Examples that tell a mean from a threshold ``gap`` away with the asked confidence and power.

    Args:
        gap: the mean as measured, less the threshold.
        supposed: variance of an example where the mean is the threshold.
        spread: variance of an example as measured.
        step: the continuity correction, in examples.
        confidence: of the bound.
    """
    normal = NormalDist()
    gap = abs(gap)
    if gap == 0:
        return None
    noise = normal.inv_cdf(confidence) * math.sqrt(supposed) + normal.inv_cdf(POWER) * math.sqrt(spread)
    root = (noise + math.sqrt(noise**2 + 4 * gap * step)) / (2 * gap)  # gap x - noise = step / x, x = sqrt(examples)
    return math.ceil(root**2) if root**2 <= MOST else None


def _variance_if(shares: Mapping[float, float], value: float, mean: float) -> float:
    """The variance of an example under the likeliest shares whose mean is ``mean``.

    Those are share / (1 + factor x (one - mean)) (Owen's empirical likelihood), the factor being the root of what makes
    the mean right; where that would need a value that nobody has seen, the value gets the share that is missing.
    """
    far = min(shares) if value > mean else max(shares)
    if mean == far:
        return 0.0
    if math.isclose(mean, value, rel_tol=_SAME, abs_tol=_SAME):
        return sum(share * (one - mean) ** 2 for one, share in shares.items())
    end, missing = far - mean, shares[far]
    near = [(one - mean, share) for one, share in shares.items() if share and one != far]

    def excess(factor: float) -> float:
        """How much too far from ``far`` the mean is, times what is infinite at the last factor."""
        without = sum(gap * share / (1 + factor * gap) for gap, share in near)
        return -(without * (1 + factor * end) + end * missing if missing else without) * math.copysign(1, end)

    last = -1 / end
    if not missing and excess(last) >= 0:
        unseen = excess(last) * abs(last)
        return sum(gap * gap * share / (1 + last * gap) for gap, share in near) + unseen * end**2
    factor = _root(excess, 0.0, last)
    return sum(gap * gap * share / (1 + factor * gap) for gap, share in [*near, (end, missing)])


def _root(function: Callable[[float], float], above: float, below: float) -> float:
    """Where a continuous function is 0, between where it is positive and where it is not (the Illinois method)."""
    high, low = function(above), function(below)
    found, before, was_above = above, below, None
    for _ in range(100):
        found = (above * low - below * high) / (low - high)
        if abs(found - before) <= _CLOSE * max(abs(above), abs(below)):
            break
        before, value = found, function(found)
        is_above = value > 0
        if is_above:
            above, high = found, value
            low /= 2 if was_above is True else 1
        else:
            below, low = found, value
            high /= 2 if was_above is False else 1
        was_above = is_above
    return found


def _blocks(values: "Floats") -> "Floats":
    """Sums over blocks of examples. Which ones share a block is drawn: neighbours in a file may be alike by design."""
    import numpy as np

    if len(values) <= BLOCKS:
        return values
    values = values[np.random.default_rng((SEED, len(values))).permutation(len(values))]
    return np.add.reduceat(values, np.linspace(0, len(values), BLOCKS, endpoint=False).astype(int))


def _resample(columns: "Floats") -> "Floats":
    """The sums of every column over each resample of the rows."""
    import numpy as np

    counts = _counts(len(columns))
    parts = [counts[start : start + _ROW].astype(np.float64) @ columns for start in range(0, RESAMPLES, _ROW)]
    return np.concatenate(parts)


@functools.lru_cache(maxsize=8)
def _counts(n: int) -> "NDArray[np.uint8]":
    """How often each resample holds each of ``n`` examples: the same for every gate over as many."""
    import numpy as np

    draw = np.random.default_rng((SEED, n))
    counts = np.empty((RESAMPLES, n), dtype=np.uint8)
    for row in counts:
        row[:] = np.bincount(draw.integers(0, n, size=n), minlength=n)
    return counts
