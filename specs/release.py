"""The full tier: what the released model is held to, on all rows, before anybody gets it."""

from typing import Annotated

from pydantic import Field, model_validator

from specs.base import Spec
from specs.gate import GateSpec
from specs.paths import Slug
from specs.retry import Policy


class ReleaseSpec(Spec):
    """What is measured of the released model, and of the steps that its gates compare it with, and must hold."""

    gates: tuple[GateSpec, ...] = ()
    """What must hold of the released model, against a threshold, the base or a stage."""
    metrics: tuple[Slug, ...] = ()
    """Metrics to measure beside those that the gates name, for the report."""
    limit: Annotated[int, Field(gt=0)] | None = None
    """The first n rows only, whatever the metrics say; by default all rows, or as many as a metric can have."""
    on_gate_failure: Policy = "stop"
    """stop ends the run with exit code 3, and the link to the released model does not lead to this one; warn records
    the verdict."""

    @model_validator(mode="after")
    def _measures_something(self) -> "ReleaseSpec":
        if not self.gates and not self.metrics:
            raise ValueError("names nothing to measure: add gates or metrics, or remove release")
        return self

    @property
    def measured(self) -> tuple[str, ...]:
        """The metrics of the full tier, by name."""
        return tuple(dict.fromkeys([*(gate.metric_name for gate in self.gates), *self.metrics]))

    def compared_over(self, metric: str) -> frozenset[str]:
        """The steps that a metric of the released model is compared with."""
        found = {gate.reference for gate in self.gates if gate.metric_name == metric}
        return frozenset(name for name in found if name is not None)
