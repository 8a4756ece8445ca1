"""Which steps are published, which are stale and why, which are missing. Pure: reads, never writes a step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from specs.base import fingerprint
from specs.gate import GateSpec
from specs.pipeline import BASE, PREVIOUS, Attempt
from specs.retry import Policy
from stages import checkpoint, evaluate
from stages.artifact import WORK, Artifact, damage, find, newest_of_stage, short
from stages.conditions import cut_up_otherwise
from stages.evaluate import Evaluation
from stages.gate import Verdict, judge, preference
from stages.identity import (
    Digests,
    base_identity,
    changes,
    stage_identity,
    work_key,
)
from stages.job import Job, Measurement, Tier
from stages.measure import Measure
from stages.measurements import Measured, Measurements
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
    gates: tuple[GateSpec, ...] = ()
    """What must hold of its measurements."""
    policy: Policy = "stop"
    """What becomes of the run if it does not."""
    tier: Tier = "stages"
    """Which measurements of it these are. A step that the release is compared with has those of both tiers: its own in
    `Plan.steps`, those of the release in `Plan.references`."""

    @property
    def title(self) -> str:
        """The name for people: `knowledge (attempt 2 of 3: learning_rate 1e-05)`."""
        if self.tier == "release" and self.name != RELEASE:
            return f"{self.name} (for the release)"
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

    @property
    def record(self) -> dict[str, Any]:
        """What the manifest keeps of how it was made; empty where it is not published."""
        return {} if self.artifact is None else self.artifact.manifest["record"]

    @property
    def seconds_measuring(self) -> float:
        """What the measurements that are there took."""
        kept = (evaluate.load(Path(one.file)) for one in self.measurements)
        return sum(one.seconds for one in kept if one is not None)

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
    references: tuple[Step, ...] = ()
    """The steps that the release is compared with, with what is measured of them for that."""

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
        ahead = [step for step in self.steps if step.artifact is None or step.missing]
        # Before the release, which is judged by them; what is not made yet is ahead anyway.
        compared = [step for step in self.references if step.artifact is not None and step.missing]
        at = next((n for n, step in enumerate(ahead) if step.name == RELEASE), len(ahead))
        return (*ahead[:at], *compared, *ahead[at:])

    def step(self, where: str, seen_from: Step) -> Step | None:
        """The step that a gate means by `here`, `previous`, `base` or a stage's name."""
        return _meant(where, seen_from, self.steps, self.steps if seen_from.name != RELEASE else self.references)

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
        planner.add_release(document)
    if root.exists():
        digest.save()
    return Plan(pipeline, folder, store, tuple(planner.steps), tuple(planner.others), tuple(planner.references))


class _Planner:
    def __init__(self, pipeline: Pipeline, folder: Path, store: Path, digest: Digests, forced_from: str | None) -> None:
        self.pipeline, self.folder, self.store, self.digest = pipeline, folder, store, digest
        self.forced_from = forced_from
        self.forced = False
        self.steps: list[Step] = []
        self.others: list[Step] = []
        self.references: list[Step] = []
        self.measurements = Measurements(pipeline, folder, digest)

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
        if step.artifact is None or step.missing:
            return True
        seen = self._seen_from(step)
        compared = [(seen(gate.reference), gate.metric_name) for gate in step.gates if gate.reference is not None]
        return any(place is None or place.evaluation(metric) is None for place, metric in compared)

    def _seen_from(self, step: Step) -> Callable[[str], Step | None]:
        return lambda where: _meant(where, step, self.steps, self.steps)

    def _attempt(self, attempt: Attempt[ObjectiveSpec]) -> Step:
        stage = attempt.stage
        step = self._step(
            stage.name, stage, stage_identity(self.pipeline, stage, self.parent, self.folder, self.digest)
        )
        step = replace(
            step,
            attempt=attempt.number,
            attempts=attempt.of,
            words=attempt.words,
            gates=stage.gates,
            policy=stage.policy,
        )
        if attempt.number > 1 and step.artifact is None and step.damaged is None:
            step = replace(
                step, reason=f"attempt {attempt.number} of {attempt.of}: {attempt.words}{self._resumes(step)}"
            )
        return step

    def _made_anew(self, step: Step) -> Step:
        if step.artifact is None:
            return step
        reason = f"forced by --from {self.forced_from}" + self._resumes(step)
        anew = replace(step, artifact=None, damaged=step.artifact.path, reason=reason)
        return anew if step.name == RELEASE else self._between(anew)

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
        work = self.store / WORK / work_key(identity)
        step = Step(order, name, stage, identity, target, work, artifact, reason, damaged, ())
        if artifact is None:
            step = replace(step, reason=reason + self._resumes(step))
        return step if name == RELEASE else self._between(step)

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

    def _measured(self, step: Step) -> Measured:
        before = self._measured(self.steps[step.order - 1]) if step.order else None
        return Measured(step.name, step.place, step.key, before, {one.metric: one for one in step.measurements})

    def _between(self, step: Step) -> Step:
        return replace(step, measurements=self.measurements.between_stages(self._measured(step)))

    def add_release(self, identity: dict[str, Any]) -> None:
        """The release, with what is measured of it in full, and of what its gates compare it with."""
        self.add(RELEASE, identity)
        release, spec = self.steps[-1], self.pipeline.release
        if spec is None:
            return
        others = {step.name: self._measured(step) for step in self.steps[:-1]}
        last = self._measured(self.steps[-2])
        # It is the last stage's model: questions are put to it as to that, and its rewards are over the same start.
        model = Measured(last.name, release.place, release.key, last.before)
        found = self.measurements.before_release(model, others, spec)
        self.steps[-1] = replace(
            release,
            measurements=tuple(found.pop(release.key).values()),
            gates=spec.gates,
            policy=spec.on_gate_failure,
            tier="release",
        )
        self.references = [
            replace(step, measurements=tuple(found[step.name].values()), gates=(), tier="release")
            for step in self.steps
            if step.name in found
        ]


def _meant(where: str, seen_from: Step, chain: Sequence[Step], named: Sequence[Step]) -> Step | None:
    """The step that `here`, `previous` (the one before in the chain), `base` or a stage's name means."""
    if where == "here":
        return seen_from
    if where == PREVIOUS:
        return chain[seen_from.order - 1] if seen_from.order else None
    return next((step for step in named if step.name == where), None)


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

    return judge(step.gates, measured, step.attempts)
