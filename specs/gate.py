"""Gates: what must hold of a metric before the next stage starts."""

from typing import Annotated

from pydantic import Field, StringConstraints, model_validator

from specs.base import Spec
from specs.paths import MetricName, Percent

DEFAULT_STANDARD_ERRORS = 2.0
"""How far beyond its noise an improvement must be when a gate does not say."""


Reference = Annotated[str, StringConstraints(min_length=1)]
Amount = Annotated[float, Field(ge=0)] | Percent
"""A difference: absolute (0.02), or relative to the reference (5%)."""


def absolute(amount: float | str, reference: float) -> float:
    """``amount`` in the metric's own unit: a percentage is taken of ``reference``."""
    if isinstance(amount, str):
        return float(amount.rstrip("% ")) / 100 * abs(reference)
    return amount


class GateSpec(Spec):
    """One rule over one metric. A value that is missing, nan or empty fails every rule."""

    metric: MetricName
    """A metric's name, or `name.measure` for another of its measures: `pairs.reward_margin`."""
    at_least: float | None = None
    """The value must reach this."""
    at_most: float | None = None
    """The value must not exceed this."""
    improves_on: Reference | None = None
    """`base`, `previous` or a stage: the value must be better than there, by `by` and beyond its noise."""
    by: Amount = 0.0
    """With `improves_on`: by how much at least; 0.02 or 5%."""
    keeps: Reference | None = None
    """`base`, `previous` or a stage: the value must be no worse than there by more than `within`."""
    within: Amount = 0.0
    """With `keeps`: how much worse it may be; 0.02 or 5%."""
    standard_errors: Annotated[float, Field(ge=0)] | None = None
    """How many standard errors beyond the threshold the value must be: 2 for improves_on, else 0, by default."""

    @model_validator(mode="after")
    def _one_rule(self) -> "GateSpec":
        rules = [name for name in RULES if getattr(self, name) is not None]
        if len(rules) != 1:
            found = " and ".join(rules) or "none of them"
            raise ValueError(f"a gate has one of {', '.join(RULES)}; found {found}")
        if self.by != 0 and self.improves_on is None:
            raise ValueError("by goes with improves_on")
        if self.within != 0 and self.keeps is None:
            raise ValueError("within goes with keeps")
        return self

    @property
    def metric_name(self) -> str:
        """The metric without its measure."""
        return self.metric.partition(".")[0]

    @property
    def measure(self) -> str | None:
        """The measure that the gate names, or None for the metric's own choice."""
        return self.metric.partition(".")[2] or None

    @property
    def reference(self) -> str | None:
        """`base`, `previous`, a stage's name, or None for an absolute rule."""
        return self.improves_on if self.improves_on is not None else self.keeps

    @property
    def noise(self) -> float:
        """How many standard errors beyond the threshold the value must be."""
        if self.standard_errors is not None:
            return self.standard_errors
        return DEFAULT_STANDARD_ERRORS if self.improves_on is not None else 0.0

    def __str__(self) -> str:
        """The rule in words, as tables show it."""
        if self.at_least is not None:
            rule = f"at least {self.at_least:g}"
        elif self.at_most is not None:
            rule = f"at most {self.at_most:g}"
        elif self.improves_on is not None:
            rule = f"improves on {self.improves_on}" + (f" by {self.by}" if self.by else "")
        else:
            rule = f"keeps {self.keeps} within {self.within}"
        noise = f", {self.noise:g} s.e. clear" if self.noise else ""
        return f"{self.metric} {rule}{noise}"


RULES = ("at_least", "at_most", "improves_on", "keeps")
"""The fields of which a gate has exactly one."""
