"""Which steps are published, which are stale and why, which are missing. Pure: reads, never writes a step."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from specs.base import fingerprint, identity_fields
from specs.metric import JudgeSpec, PreferenceSpec
from specs.pipeline import BASE, PREVIOUS, Attempt
from stages import checkpoint, evaluate
from stages.artifact import EVALUATION, WORK, Artifact, damage, find, newest_of_stage, short
from stages.conditions import cut_up_otherwise
from stages.evaluate import Evaluation
from stages.gate import Verdict, judge, preference
from stages.identity import (
    MEASURING_LIBRARIES,
    Digests,
    base_identity,
    changes,
    metric_digests,
    model_digests,
    stage_identity,
    versions,
    work_key,
)
from stages.job import Job, Measurement
from stages.measure import Measure
from stages.objective import ObjectiveSpec
from stages.pipeline import Pipeline

RELEASE = "release"


@dataclass(frozen=True)
class Step:
    """One step of the chain: the base, a stage or the release."""

    order: int
    name: str
    stage: ObjectiveSpec | None
    identity: dict[str, Any]
    target: Path
    work: Path
    artifact: Artifact | None
    """What is published under this identity and undamaged."""
    reason: str
    """Why the step runs, or that it is kept."""
    damaged: Path | None
    measurements: tuple[Measurement, ...]
    attempt: int = 1
    """Which attempt at the stage this is, from 1."""
    attempts: int = 1
    """How many are planned, the first included."""
    words: str = ""
    """What differs from the stage as written."""

    @property
    def title(self) -> str:
        """The name for people: `knowledge (attempt 2 of 3: learning_rate 1e-05)`."""
        if self.attempts == 1:
            return self.name
        return f"{self.name} (attempt {self.attempt} of {self.attempts}: {self.words})"

    @property
    def key(self) -> str:
        """The identity's fingerprint."""
        return fingerprint(self.identity)

    @property
    def place(self) -> Path:
        """Where the artifact is, or will be."""
        return self.target if self.artifact is None else self.artifact.path

    @property
    def missing(self) -> tuple[Measurement, ...]:
        """The measurements that are not there yet."""
        return tuple(one for one in self.measurements if evaluate.load(Path(one.file)) is None)

    def evaluation(self, metric: str) -> Evaluation | None:
        """What a metric found here, or None."""
        for one in self.measurements:
            if one.metric == metric:
                return evaluate.load(Path(one.file))
        return None


@dataclass(frozen=True)
class Plan:
    """All steps of a pipeline, in order."""

    pipeline: Pipeline
    folder: Path
    store: Path
    steps: tuple[Step, ...]
    """Of a stage that may be tried several times, the attempt that the chain goes on with, or that is next."""
    others: tuple[Step, ...] = ()
    """The other attempts at these stages, published or not."""

    @property
    def named(self) -> tuple[Step, ...]:
        """All that the spec names."""
        return (*self.steps, *self.others)

    @property
    def chosen(self) -> Pipeline:
        """The spec with each stage as the chain goes on with it."""
        return self.pipeline.with_stages(step.stage for step in self.steps if step.stage is not None)

    @property
    def pending(self) -> tuple[Step, ...]:
        """The steps that have anything to do."""
        return tuple(step for step in self.steps if step.artifact is None or step.missing)

    def step(self, where: str, seen_from: Step) -> Step | None:
        """The step that a gate means by `here`, `previous`, `base` or a stage's name."""
        if where == "here":
            return seen_from
        if where == PREVIOUS:
            return self.steps[seen_from.order - 1] if seen_from.order else None
        return next((step for step in self.steps if step.name == where), None)

    def verdicts(self, step: Step) -> list[Verdict]:
        """What the gates of a step come to, from what is on the disk."""
        return _verdicts(step, lambda where: self.step(where, step))

    def job(self, step: Step) -> Job:
        """What the process of ``step`` is told."""
        start = self.steps[step.order - 1] if step.order else None
        return Job(
            kind="base" if step.order == 0 else "stage" if step.stage is not None else "release",
            pipeline=self.pipeline.with_stages(self._up_to(step)),
            folder=str(self.folder),
            name=step.name,
            identity=step.identity,
            target=str(step.place),
            work=str(step.work),
            start=None if start is None else str(start.place),
            make=step.artifact is None,
            measurements=step.missing,
        )

    def _up_to(self, step: Step) -> list[ObjectiveSpec]:
        """The stages of the chain, with the attempt that ``step`` is in its place."""
        steps = [step if one.order == step.order else one for one in self.steps]
        return [one.stage for one in steps if one.stage is not None]


def make_plan(
    pipeline: Pipeline,
    folder: Path,
    root: Path,
    *,
    forced_from: str | None = None,
    until: str | None = None,
) -> Plan:
    """Compare the spec with what is published.

    Args:
        pipeline: the validated spec.
        folder: the spec's folder, from which its relative paths start.
        root: where artifacts are; the pipeline's are in a folder of its name.
        forced_from: run this stage and all after it, published or not; attempts that its gates refuse stay as they are.
        until: leave out the stages after this one, and the release.

    Raises:
        InvalidInput: a file of the spec is missing.
    """
    store = root / pipeline.name
    digest = Digests(root / ".digests.json")
    planner = _Planner(pipeline, folder, store, digest, forced_from)
    planner.add(BASE, base_identity(pipeline, folder, digest))
    for stage in pipeline.stages:
        planner.add_stage(stage)
        if stage.name == until:
            break
    else:
        document = {"kind": RELEASE, "parent": planner.parent, "dtype": pipeline.model.dtype}
        planner.add(RELEASE, document)
    if root.exists():
        digest.save()
    return Plan(pipeline, folder, store, tuple(planner.steps), tuple(planner.others))


class _Planner:
    def __init__(self, pipeline: Pipeline, folder: Path, store: Path, digest: Digests, forced_from: str | None) -> None:
        self.pipeline, self.folder, self.store, self.digest = pipeline, folder, store, digest
        self.forced_from = forced_from
        self.forced = False
        self.steps: list[Step] = []
        self.others: list[Step] = []

    @property
    def parent(self) -> str:
        return self.steps[-1].key

    def add(self, name: str, identity: dict[str, Any]) -> None:
        """The base or the release."""
        self.forced = self.forced or name == self.forced_from
        step = self._step(name, None, identity)
        self.steps.append(self._made_anew(step) if self.forced else step)

    def add_stage(self, stage: ObjectiveSpec) -> None:
        """The stage, as the attempt that the chain goes on with."""
        self.forced = self.forced or stage.name == self.forced_from
        attempts = [self._attempt(one) for one in stage.attempts()]
        passing, chosen = self._choice(attempts)
        if self.forced:
            again = {step.key for step in (*passing, chosen)}
            attempts = [self._made_anew(step) if step.key in again else step for step in attempts]
            chosen = next(step for step in attempts if step.key in again)
        self.steps.append(chosen)
        self.others += [step for step in attempts if step is not chosen]

    def _choice(self, attempts: list[Step]) -> tuple[list[Step], Step]:
        """The attempts that pass; and the best of them, or else the next to try, or else the best that was refused."""
        if len(attempts) == 1:
            return [], attempts[0]
        found = {step.key: _verdicts(step, self._seen_from(step)) for step in attempts}
        unknown = [step for step in attempts if self._is_unknown(step)]
        passing = [step for step in attempts if step not in unknown and all(one.passed for one in found[step.key])]
        if unknown and not passing:
            return [], unknown[0]
        return passing, max(passing or attempts, key=lambda step: preference(found[step.key]))

    def _is_unknown(self, step: Step) -> bool:
        """Whether an attempt cannot be judged yet: it, or what its gates compare it with, is not there or measured."""
        if step.stage is None or step.artifact is None or step.missing:
            return True
        seen = self._seen_from(step)
        compared = [(seen(gate.reference), gate.metric_name) for gate in step.stage.gates if gate.reference is not None]
        return any(place is None or place.evaluation(metric) is None for place, metric in compared)

    def _seen_from(self, step: Step) -> Callable[[str], Step | None]:
        def seen(where: str) -> Step | None:
            if where == "here":
                return step
            if where == PREVIOUS:
                return self.steps[-1]
            return next((one for one in self.steps if one.name == where), None)

        return seen

    def _attempt(self, attempt: Attempt[ObjectiveSpec]) -> Step:
        stage = attempt.stage
        step = self._step(
            stage.name, stage, stage_identity(self.pipeline, stage, self.parent, self.folder, self.digest)
        )
        step = replace(step, attempt=attempt.number, attempts=attempt.of, words=attempt.words)
        if attempt.number > 1 and step.artifact is None and step.damaged is None:
            step = replace(
                step, reason=f"attempt {attempt.number} of {attempt.of}: {attempt.words}{self._resumes(step)}"
            )
        return step

    def _made_anew(self, step: Step) -> Step:
        if step.artifact is None:
            return step
        reason = f"forced by --from {self.forced_from}" + self._resumes(step)
        return replace(
            step,
            artifact=None,
            damaged=step.artifact.path,
            reason=reason,
            measurements=self._measurements(step.name, step.target, step.key),
        )

    def _step(self, name: str, stage: ObjectiveSpec | None, identity: dict[str, Any]) -> Step:
        key = fingerprint(identity)
        order = len(self.steps)
        target = self.store / f"{order:02d}-{name}-{short(key)}"
        artifact = find(self.store, key)
        damaged = None
        if artifact is not None and self._moved(artifact):
            damaged, artifact, reason = artifact.path, None, "the base folder is elsewhere now"
        elif artifact is not None and (found := damage(artifact, self.digest)):
            damaged, artifact, reason = artifact.path, None, f"damaged since it was published: {found[0]}"
        elif artifact is not None:
            reason = "published"
        elif target.exists():
            damaged, reason = target, "damaged since it was published: its manifest is missing or was changed"
        else:
            reason = self._why(name, identity)
        place = target if artifact is None else artifact.path
        work = self.store / WORK / work_key(identity)
        measurements = () if name == RELEASE else self._measurements(name, place, key)
        step = Step(order, name, stage, identity, target, work, artifact, reason, damaged, measurements)
        return replace(step, reason=reason + self._resumes(step)) if artifact is None else step

    def _resumes(self, step: Step) -> str:
        """Where a step goes on that was begun."""
        newest = checkpoint.newest_sealed(step.work / "checkpoints")
        if newest is None:
            return ""
        changed = None if step.stage is None else cut_up_otherwise(newest, step.stage)
        apart = f" ({changed}: equal within rounding, not bit for bit)" if changed else ""
        return f"; resumes at step {checkpoint.step_of(newest)}{apart}"

    def _moved(self, artifact: Artifact) -> bool:
        """Whether a base that refers to a folder refers to another one than the spec names now."""
        elsewhere = artifact.manifest["record"].get("model_path")
        return elsewhere is not None and Path(elsewhere) != (self.folder / str(self.pipeline.model.path)).resolve()

    def _why(self, name: str, identity: dict[str, Any]) -> str:
        old = newest_of_stage(self.store, name)
        if old is None:
            return "never run"
        found = changes(old.manifest["inputs"], identity)
        return "changed: " + "; ".join(found[:3]) + (f"; and {len(found) - 3} more" if len(found) > 3 else "")

    def _measurements(self, name: str, place: Path, key: str) -> tuple[Measurement, ...]:
        found: list[Measurement] = []
        for metric, spec in self.pipeline.metrics.items():
            if isinstance(spec, JudgeSpec):
                continue
            chat = getattr(spec, "chat_template", False)
            applied = chat if isinstance(chat, bool) else name in chat
            reference = self._reference(metric) if isinstance(spec, PreferenceSpec) else None
            identity = {
                "model": key,
                # Whether the template is applied here counts, not where else it is.
                "metric": {key: value for key, value in identity_fields(spec).items() if key != "chat_template"},
                "data": metric_digests(spec, self.folder, self.digest),
                "dtype": self.pipeline.model.dtype,
                "chat_template": applied,
                "reference": self.parent if reference else None,
                "versions": versions(MEASURING_LIBRARIES),
                "code": evaluate.VERSIONS[spec.kind],
            }
            file = place / EVALUATION / f"{metric}-{short(fingerprint(identity))}.json"
            found.append(
                Measurement(
                    metric=metric,
                    file=str(file),
                    identity=identity,
                    chat_template=applied,
                    reference=reference,
                )
            )
        judged = [self._judged(name, place, key, metric, found) for metric in self.pipeline.metrics]
        return (*found, *(one for one in judged if one is not None))

    def _judged(self, step: str, place: Path, key: str, metric: str, found: list[Measurement]) -> Measurement | None:
        """The comparison of a step's answers with another's; None where there is no other, or it is no judge's."""
        spec = self.pipeline.metrics[metric]
        if not isinstance(spec, JudgeSpec) or not self.steps:
            return None
        other = (
            self.steps[-1]
            if spec.against == PREVIOUS
            else next((s for s in self.steps if s.name == spec.against), None)
        )
        if other is None or other.name == step:
            return None
        ours = next(one for one in found if one.metric == spec.answers)
        theirs = next(one for one in other.measurements if one.metric == spec.answers)
        identity = {
            "model": key,
            "metric": identity_fields(spec),
            "judge": None if spec.model is None else model_digests(spec.model, self.folder, self.digest),
            "answers": [fingerprint(ours.identity), fingerprint(theirs.identity)],
            "versions": versions(MEASURING_LIBRARIES),
            "code": evaluate.VERSIONS[spec.kind],
        }
        return Measurement(
            metric=metric,
            file=str(place / EVALUATION / f"{metric}-{short(fingerprint(identity))}.json"),
            identity=identity,
            chat_template=False,
            reference=theirs.file,
            answers=ours.file,
        )

    def _reference(self, metric: str) -> str | None:
        if not self.steps:
            return None
        return next(one.file for one in self.steps[-1].measurements if one.metric == metric)


def _verdicts(step: Step, seen: Callable[[str], Step | None]) -> list[Verdict]:
    """What the gates of a step come to.

    Args:
        step: a stage, made and measured.
        seen: which step a gate means by `here`, `previous`, `base` or a stage's name.
    """

    def measured(where: str, metric: str, measure: str | None) -> Measure | None:
        place = seen(where)
        evaluation = None if place is None else place.evaluation(metric)
        return None if evaluation is None else evaluation.measure(measure)

    return judge(() if step.stage is None else step.stage.gates, measured, step.attempts)
