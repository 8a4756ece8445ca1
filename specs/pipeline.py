"""The whole spec: a base model, metrics, and stages in order."""

import difflib
from collections.abc import Iterator
from fractions import Fraction
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import Field, SerializeAsAny

from specs.base import Spec, name_only
from specs.data import DataLimits, DataSpec
from specs.gate import GateSpec
from specs.metric import MetricSpec
from specs.model import ModelSpec
from specs.paths import Slug
from specs.train import TrainSpec

Location = tuple[str | int, ...]
"""A place in a spec: keys and list positions from the top."""

BASE = "base"
PREVIOUS = "previous"
RESERVED = (BASE, PREVIOUS, "release")


class StageSpec(Spec):
    """What every stage has, whatever its objective and method."""

    name: Slug = name_only()
    """The stage's name: in folders, tables, gates and the Prefect UI."""
    kind: str
    """The objective."""
    method: Any
    """The adaptation method."""
    data: Annotated[tuple[DataSpec, ...], Field(min_length=1)]
    """Training rows; several sources are mixed by their weights or shares."""
    data_limits: DataLimits = name_only(DataLimits())
    """What the data report may find before the stage is refused, instead of being told."""
    train: TrainSpec
    """Optimizer, schedule, batches, checkpoints."""
    seed: int | None = name_only(None)  # an identity names the seed that is used, not where it was written
    """Seed of this stage; by default the pipeline's."""
    gates: tuple[GateSpec, ...] = name_only(())
    """What must hold before the next stage starts. Gates never retrain: an edited one is judged again."""
    on_gate_failure: Literal["stop", "warn"] = name_only("stop")
    """stop ends the run with exit code 3; warn records the verdict and goes on."""


StageT = TypeVar("StageT", bound=StageSpec)


class PipelineSpec(Spec, Generic[StageT]):
    """A spec file. Generic over the stages, which `stages` defines: the grammar knows no objective."""

    name: Slug
    """Name of the pipeline: the folder of its artifacts, its name in the Prefect UI."""
    model: ModelSpec
    """The base model."""
    seed: int = 17
    """Seed of every stage that has none of its own."""
    metrics: dict[Slug, MetricSpec] = {}
    """Measured on the base and after every stage, by name."""
    stages: Annotated[tuple[SerializeAsAny[StageT], ...], Field(min_length=1)]
    """In order; each starts from what the one before published."""

    def problems(self) -> list[tuple[Location, str]]:
        """What is wrong between the parts: each with its place in the spec and a message."""
        return [*self._stage_names(), *self._gate_references(), *self._chat_stages(), *self._shares()]

    def _stage_names(self) -> Iterator[tuple[Location, str]]:
        seen: set[str] = set()
        for number, stage in enumerate(self.stages):
            where = ("stages", number, "name")
            if stage.name in RESERVED:
                yield where, f"stage name {stage.name!r} is reserved; rename the stage"
            if stage.name in seen:
                yield where, f"stage name {stage.name!r} is used twice; stage names are unique"
            seen.add(stage.name)

    def _gate_references(self) -> Iterator[tuple[Location, str]]:
        earlier = [BASE, PREVIOUS]
        for number, stage in enumerate(self.stages):
            for gate_number, gate in enumerate(stage.gates):
                where = ("stages", number, "gates", gate_number)
                if gate.metric_name not in self.metrics:
                    yield (*where, "metric"), _unknown("metric", gate.metric_name, list(self.metrics))
                if gate.reference is not None and gate.reference not in earlier:
                    rule = "improves_on" if gate.improves_on is not None else "keeps"
                    yield (*where, rule), _unknown("earlier stage", gate.reference, earlier)
            earlier.append(stage.name)

    def _chat_stages(self) -> Iterator[tuple[Location, str]]:
        known = [BASE, *(stage.name for stage in self.stages)]
        for name, metric in self.metrics.items():
            chosen = getattr(metric, "chat_template", False)
            for number, stage in enumerate(chosen if isinstance(chosen, tuple) else ()):
                if stage not in known:
                    yield ("metrics", name, "chat_template", number), _unknown("stage", stage, known)

    def _shares(self) -> Iterator[tuple[Location, str]]:
        for number, stage in enumerate(self.stages):
            shares = {place: source.share for place, source in enumerate(stage.data) if source.share is not None}
            if len(shares) == len(stage.data):
                yield (
                    ("stages", number, "data", 0, "share"),
                    "every source of this stage has a share, so nothing says how large the stage is; take it from one",
                )
            elif (total := sum(map(Fraction, map(str, shares.values())))) >= 1:
                yield (
                    ("stages", number, "data", max(shares), "share"),
                    f"the shares of this stage come to {float(total):g}, and leave nothing to the sources without one; "
                    "they must come to less than 1",
                )
        for name, metric in self.metrics.items():
            if (data := getattr(metric, "data", None)) is not None:
                for field in sorted({"share", "weight"} & data.model_fields_set):
                    yield ("metrics", name, "data", field), f"a metric measures each row once; remove {field}"

    def seed_of(self, stage: StageSpec) -> int:
        """The seed that ``stage`` trains with."""
        return self.seed if stage.seed is None else stage.seed


def _unknown(what: str, found: str, known: list[str]) -> str:
    near = difflib.get_close_matches(found, known, 1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"no {what} {found!r}; {hint}allowed: {', '.join(known) or 'none are defined'}"
