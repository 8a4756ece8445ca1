"""Measures of a whole set, such as a correlation or the share of distinct n-grams, with what each example adds to them.

The jackknife (Efron and Stein 1981): what the measure is without an example tells that example's part in it, so that
two models are compared on the same examples here, too.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from stages.measure import Measure, ratio


def whole(value: float, n: int, without: Sequence[float], better: Literal["higher", "lower"]) -> Measure:
    """A measure whose per-example numbers are the jackknife's pseudo-values, moved so that their mean is the value.

    Args:
        value: of all examples.
        n: how many there are.
        without: of all examples but one, for each; none of them, or one that is no number, give no noise.
        better: the direction.
    """
    if n < 2 or len(without) != n or not all(map(math.isfinite, (value, *without))):
        return Measure(value, None, n, better)
    mean = math.fsum(without) / n
    return replace(ratio([value + (n - 1) * (mean - one) for one in without], [1.0] * n, better), value=value)
