"""Gates: what must hold of a metric before the next stage starts."""

from typing import Annotated, Any

from pydantic import Field, StringConstraints, model_validator

from specs.base import Spec
from specs.paths import MetricName, Percent

CONFIDENCE = 0.95
"""Of a gate that does not say, and of the interval that is shown where the value alone is judged."""

Reference = Annotated[str, StringConstraints(min_length=1)]
Amount = Annotated[float, Field(ge=0)] | Percent
"""A difference: absolute (0.02), or relative to the reference (5%)."""


def share(amount: float | str) -> float | None:
    """``amount`` as a share of the reference, where it is a percentage."""
    return float(amount.rstrip("% ")) / 100 if isinstance(amount, str) else None


class GateSpec(Spec):
    """One rule over one metric. A value that is missing, nan or empty fails every rule."""

    metric: MetricName
    """A metric's name, or `name.measure` for another of its measures: `pairs.reward_margin`."""
    at_least: float | None = None
    """The value must reach this."""
    at_most: float | None = None
    """The value must not exceed this."""
    improves_on: Reference | None = None
    """`base`, `previous` or a stage: the value must be better than there, by `by` at least."""
    by: Amount = 0.0
    """With `improves_on`: by how much at least; 0.02 or 5%."""
    keeps: Reference | None = None
    """`base`, `previous` or a stage: the value must be no worse than there by more than `within`."""
    within: Amount = 0.0
    """With `keeps`: how much worse it may be; 0.02 or 5%."""
    confidence: Annotated[float, Field(gt=0.5, le=0.999)] | None = CONFIDENCE
    """The rule must hold with this confidence (one-sided), else it is undecided; null judges the value alone."""

    @model_validator(mode="before")
    @classmethod
    def _no_standard_errors(cls, fields: Any) -> Any:
        if isinstance(fields, dict) and "standard_errors" in fields:
            raise ValueError(
                "standard_errors is now confidence, 0.95 where a gate does not say: write `confidence: 0.977` for 2 "
                "standard errors, `confidence: null` for 0"
            )
        return fields

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
    def rule(self) -> str:
        """The one of `RULES` that it has."""
        return next(name for name in RULES if getattr(self, name) is not None)

    @property
    def reference(self) -> str | None:
        """`base`, `previous`, a stage's name, or None for an absolute rule."""
        return self.improves_on if self.improves_on is not None else self.keeps

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
        sure = "by its value alone" if self.confidence is None else f"at {100 * self.confidence:.4g}%"
        return f"{self.metric} {rule}, {sure}"


RULES = ("at_least", "at_most", "improves_on", "keeps")
"""The fields of which a gate has exactly one."""
