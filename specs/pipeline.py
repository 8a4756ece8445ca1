"""The whole spec: a base model, metrics, and stages in order."""

import difflib
import math
from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import Annotated, Any, Generic, Literal, NamedTuple, Self, TypeVar

from pydantic import Field, SerializeAsAny, ValidationError

from specs.base import Spec, identity_fields, name_only
from specs.data import DataLimits, DataSpec
from specs.explain import explain
from specs.gate import GateSpec
from specs.metric import JudgeSpec, MetricSpec, with_limit
from specs.model import ModelSpec
from specs.paths import Slug
from specs.release import ReleaseSpec
from specs.retry import ChangeSpec, Policy, RetrySpec, UnfitChange, changed, changed_fields, in_words
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
    on_gate_failure: Policy | RetrySpec = name_only("stop")
    """stop ends the run with exit code 3; warn records the verdict and goes on; approve waits until a person decides
    (`trivium approve`, or the Prefect UI); `{retry: [...], then: stop}` makes the stage anew with each of some changes
    in turn until one passes."""

    @property
    def policy(self) -> Policy:
        """What becomes of a run when the gates refuse the stage, and every other attempt at it."""
        return self.on_gate_failure.then if isinstance(self.on_gate_failure, RetrySpec) else self.on_gate_failure

    @property
    def changes(self) -> tuple[ChangeSpec, ...]:
        """What is tried in turn when the gates refuse the stage as written."""
        return self.on_gate_failure.retry if isinstance(self.on_gate_failure, RetrySpec) else ()

    def attempts(self) -> tuple["Attempt[Self]", ...]:
        """The stage as written and, after it, as each change makes it.

        Raises:
            specs.retry.UnfitChange, pydantic.ValidationError: a change does not fit; `PipelineSpec.problems` says so.
        """
        made = [(change, changed(self, change, on_gate_failure=self.policy)) for change in self.changes]
        total = 1 + len(made)
        others = [Attempt(n, total, in_words(self, one, change), one) for n, (change, one) in enumerate(made, start=2)]
        return (Attempt(1, total, "as written", self), *others)


StageT = TypeVar("StageT", bound=StageSpec)


class Attempt(NamedTuple, Generic[StageT]):
    """A stage as it is tried once."""

    number: int
    """From 1, the stage as written."""
    of: int
    """How many are planned, the first included."""
    words: str
    """What differs from the stage as written."""
    stage: StageT


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
    diagnostics: Literal["spectra", "norms", "off"] = "spectra"
    """What is kept of how training changed the weights: `norms` leaves out what needs singular values."""
    stages: Annotated[tuple[SerializeAsAny[StageT], ...], Field(min_length=1)]
    """In order; each starts from what the one before published."""
    release: ReleaseSpec | None = name_only(None)
    """What the released model must hold up to, on all rows; by default it is released once the last stage passed."""

    def problems(self) -> list[tuple[Location, str]]:
        """What is wrong between the parts: each with its place in the spec and a message."""
        return [
            *self._stage_names(),
            *self._gate_references(),
            *self._chat_stages(),
            *self._judges(),
            *self._shares(),
            *self._changes(),
            *self._release(),
        ]

    def placed_stages(self) -> Iterator[tuple[Location, StageT]]:
        """Every stage at its place and, after it, its further attempts, each at the place of the change that makes it.

        Changes that fit no stage are left out: `problems` tells of them.
        """
        for number, stage in enumerate(self.stages):
            place: Location = ("stages", number)
            yield place, stage
            for at, change in enumerate(stage.changes):
                try:
                    made = changed(stage, change, on_gate_failure=stage.policy)
                except (UnfitChange, ValidationError):
                    continue
                yield (*place, *_change(at)), made

    def metric(self, name: str, tier: str) -> MetricSpec:
        """A metric with the rows of its tier: `stages` as the spec has it, `release` as the release asks for it."""
        spec = self.metrics[name]
        return spec if tier != "release" or self.release is None else with_limit(spec, self.release.limit)

    @property
    def metrics_in_full(self) -> dict[str, MetricSpec]:
        """Each metric with all the rows that any tier measures: what training rows must not hold."""
        found = dict(self.metrics)
        for name in () if self.release is None else self.release.measured:
            spec = self.metrics[name]
            rows = spec.answers if isinstance(spec, JudgeSpec) else name  # a judge has none of its own
            found[rows] = max(found[rows], self.metric(rows, "release"), key=lambda one: one.limit or math.inf)
        return found

    def placed_gates(self) -> Iterator[tuple[Location, GateSpec]]:
        """Every gate at its place: the stages', and then the release's."""
        for number, stage in enumerate(self.stages):
            yield from ((("stages", number, "gates", at), gate) for at, gate in enumerate(stage.gates))
        if self.release is not None:
            yield from ((("release", "gates", at), gate) for at, gate in enumerate(self.release.gates))

    def compared_with(self, place: Location, gate: GateSpec) -> str | None:
        """The step that a gate compares with, by its name; None where it has a threshold.

        Args:
            place: the gate's, as in `placed_gates`.
            gate: one that `problems` has nothing against.
        """
        if gate.reference != PREVIOUS or place[0] != "stages":
            return gate.reference
        number = int(place[1])
        return self.stages[number - 1].name if number else BASE

    def with_stages(self, stages: Iterable[StageSpec]) -> Self:
        """The same pipeline with these in the place of its first stages: the attempts that a run goes on with."""
        first = tuple(stages)
        return self.model_copy(update={"stages": (*first, *self.stages[len(first) :])})

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
                    yield (*where, gate.rule), _unknown("earlier stage", gate.reference, earlier)
            earlier.append(stage.name)

    def _release(self) -> Iterator[tuple[Location, str]]:
        if self.release is None:
            return
        known = [BASE, *(stage.name for stage in self.stages)]
        for at, gate in enumerate(self.release.gates):
            where = ("release", "gates", at)
            if gate.metric_name not in self.metrics:
                yield (*where, "metric"), _unknown("metric", gate.metric_name, list(self.metrics))
            if gate.reference == PREVIOUS:
                yield (
                    (*where, gate.rule),
                    f"the step before the release is the same model; name one of {', '.join(known)}",
                )
            elif gate.reference is not None and gate.reference not in known:
                yield (*where, gate.rule), _unknown("step", gate.reference, known)
        for at, name in enumerate(self.release.metrics):
            if name not in self.metrics:
                yield ("release", "metrics", at), _unknown("metric", name, list(self.metrics))

    def _changes(self) -> Iterator[tuple[Location, str]]:
        """Changes that make no stage of a stage, or none that was not tried before."""
        for number, stage in enumerate(self.stages):
            place: Location = ("stages", number)
            if stage.changes and not stage.gates:
                yield (*place, "on_gate_failure"), "nothing refuses this stage: retry goes with gates; add some"
            tried = [(self._result(stage), "the stage as written")]
            for at, change in enumerate(stage.changes):
                try:
                    fields = changed_fields(stage, change)
                    made = changed(stage, change, on_gate_failure=stage.policy)
                except UnfitChange as error:
                    yield (*place, *_change(at), *error.where), error.message
                except ValidationError as error:
                    for where, _, message in explain(type(stage), error.errors(include_url=False), fields):
                        yield (*place, *_change(at), *_in_change(where, stage, change)), message
                else:
                    same = [name for result, name in tried if result == self._result(made)]
                    if same:
                        yield (*place, *_change(at)), f"makes the same of the stage as {same[0]}; change something else"
                    tried.append((self._result(made), f"change {at + 1}"))

    def _result(self, stage: StageT) -> tuple[Any, ...]:
        """What of a stage decides what is made of it; paths, because a file's content is not known here."""
        return identity_fields(stage), self.seed_of(stage), [source.path for source in stage.data]

    def _judges(self) -> Iterator[tuple[Location, str]]:
        generations = [name for name, metric in self.metrics.items() if metric.kind == "generation"]
        known = [BASE, PREVIOUS, *(stage.name for stage in self.stages)]
        for name, metric in self.metrics.items():
            if metric.kind != "judge":
                continue
            if metric.answers not in generations:
                yield ("metrics", name, "answers"), _unknown("metric of kind generation", metric.answers, generations)
            if metric.against not in known:
                yield ("metrics", name, "against"), _unknown("step", metric.against, known)
                continue
            stages = [stage.name for stage in self.stages]
            first = stages.index(metric.against) + 1 if metric.against in stages else 0
            judged = stages[first:]
            for place, gate in self.placed_gates():
                if gate.metric_name != name:
                    continue
                if place[0] == "stages" and stages[int(place[1])] not in judged:
                    where = (*place, "metric")
                    yield where, f"metric {name} compares with stage {metric.against}, which comes no earlier"
                elif (other := self.compared_with(place, gate)) is not None and other not in judged:
                    yield (
                        (*place, gate.rule),
                        f"metric {name} is not measured on {other}, which comes no later than {metric.against}, whose "
                        "answers it compares with; `at_least: 0.5` asks for as many won as lost",
                    )

    def _chat_stages(self) -> Iterator[tuple[Location, str]]:
        known = [BASE, *(stage.name for stage in self.stages)]
        for name, metric in self.metrics.items():
            chosen = getattr(metric, "chat_template", False)
            for number, stage in enumerate(chosen if isinstance(chosen, tuple) else ()):
                if stage not in known:
                    yield ("metrics", name, "chat_template", number), _unknown("stage", stage, known)

    def _shares(self) -> Iterator[tuple[Location, str]]:
        for place, stage in self.placed_stages():
            shares = {at: source.share for at, source in enumerate(stage.data) if source.share is not None}
            if len(shares) == len(stage.data):
                yield (
                    (*place, "data", 0, "share"),
                    "every source of this stage has a share, so nothing says how large the stage is; take it from one",
                )
            elif (total := sum(map(Fraction, map(str, shares.values())))) >= 1:
                yield (
                    (*place, "data", max(shares), "share"),
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


def _change(number: int) -> Location:
    """The place of a change within its stage."""
    return ("on_gate_failure", "retry", number)


def _in_change(where: Location, stage: StageSpec, change: ChangeSpec) -> Location:
    """Where in a change that stands what is wrong at ``where`` in the stage that it makes."""
    if where[:1] == ("data",) and len(where) > 1 and isinstance(change.data, dict):
        return ("data", stage.data[int(where[1])].label, *where[2:])
    return where


def _unknown(what: str, found: str, known: list[str]) -> str:
    near = difflib.get_close_matches(found, known, 1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"no {what} {found!r}; {hint}allowed: {', '.join(known) or 'none are defined'}"
