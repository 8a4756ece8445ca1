"""A measured value that knows its noise: kept per example, so that two models are compared on the same ones."""

import math
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Measure:
    """A ratio of sums over examples: accuracy (hits / 1), bits per byte (bits / bytes), and so on.

    Where a library gives no per-example values, ``numerators`` is empty and the value and its error are
    the library's.
    """

    value: float
    standard_error: float | None
    n: int
    better: Literal["higher", "lower"]
    numerators: tuple[float, ...] = ()
    weights: tuple[float, ...] = ()

    def is_paired_with(self, other: "Measure") -> bool:
        """Whether both were measured on the same examples, so that these can be compared one by one."""
        return bool(self.numerators) and self.weights == other.weights

    def as_json(self) -> dict[str, Any]:
        """The measure as evaluation files keep it."""
        return {name: getattr(self, name) for name in self.__slots__}


def ratio(numerators: list[float], weights: list[float], better: Literal["higher", "lower"]) -> Measure:
    """The measure sum(numerators) / sum(weights) with the standard error of a ratio estimator.

    Raises:
        ValueError: no examples, or no weight.
    """
    total = math.fsum(weights)
    if not weights or total <= 0:
        raise ValueError("nothing to measure: no examples")
    value = math.fsum(numerators) / total
    residuals = [top - value * weight for top, weight in zip(numerators, weights, strict=True)]
    return Measure(value, _error(residuals, total), len(weights), better, tuple(numerators), tuple(weights))


def _error(residuals: list[float], total: float) -> float | None:
    n = len(residuals)
    if n < 2:
        return None
    return math.sqrt(n / (n - 1) * math.fsum(value * value for value in residuals)) / total
