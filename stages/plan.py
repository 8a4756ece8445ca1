"""Which steps are published, which are stale and why, which are missing. Pure: reads, never writes a step."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specs.base import fingerprint, identity_fields
from specs.metric import PreferenceSpec
from specs.pipeline import BASE, PREVIOUS
from stages import checkpoint, evaluate
from stages.artifact import EVALUATION, WORK, Artifact, damage, find, newest_of_stage, short
from stages.conditions import cut_up_otherwise
from stages.evaluate import Evaluation
from stages.identity import (
    MEASURING_LIBRARIES,
    Digests,
    base_identity,
    changes,
    metric_digests,
    stage_identity,
    versions,
    work_key,
)
from stages.job import Job, Measurement
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

    def job(self, step: Step) -> Job:
        """What the process of ``step`` is told."""
        start = self.steps[step.order - 1] if step.order else None
        return Job(
            kind="base" if step.order == 0 else "stage" if step.stage is not None else "release",
            pipeline=self.pipeline,
            folder=str(self.folder),
            name=step.name,
            identity=step.identity,
            target=str(step.place),
            work=str(step.work),
            start=None if start is None else str(start.place),
            make=step.artifact is None,
            measurements=step.missing,
        )


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
        forced_from: run this stage and all after it, published or not.
        until: leave out the stages after this one, and the release.

    Raises:
        InvalidInput: a file of the spec is missing.
    """
    store = root / pipeline.name
    digest = Digests(root / ".digests.json")
    planner = _Planner(pipeline, folder, store, digest, forced_from)
    planner.add(BASE, None, base_identity(pipeline, folder, digest))
    for stage in pipeline.stages:
        planner.add(stage.name, stage, stage_identity(pipeline, stage, planner.parent, folder, digest))
        if stage.name == until:
            break
    else:
        document = {"kind": RELEASE, "parent": planner.parent, "dtype": pipeline.model.dtype}
        planner.add(RELEASE, None, document)
    if root.exists():
        digest.save()
    return Plan(pipeline, folder, store, tuple(planner.steps))


class _Planner:
    def __init__(self, pipeline: Pipeline, folder: Path, store: Path, digest: Digests, forced_from: str | None) -> None:
        self.pipeline, self.folder, self.store, self.digest = pipeline, folder, store, digest
        self.forced_from = forced_from
        self.forced = False
        self.steps: list[Step] = []

    @property
    def parent(self) -> str:
        return self.steps[-1].key

    def add(self, name: str, stage: ObjectiveSpec | None, identity: dict[str, Any]) -> None:
        key = fingerprint(identity)
        self.forced = self.forced or name == self.forced_from
        order = len(self.steps)
        target = self.store / f"{order:02d}-{name}-{short(key)}"
        artifact = find(self.store, key)
        damaged = None
        if artifact is not None and self._moved(artifact):
            damaged, artifact, reason = artifact.path, None, "the base folder is elsewhere now"
        elif artifact is not None and (found := damage(artifact, self.digest)):
            damaged, artifact, reason = artifact.path, None, f"damaged since it was published: {found[0]}"
        elif self.forced and artifact is not None:
            damaged, artifact, reason = artifact.path, None, f"forced by --from {self.forced_from}"
        elif artifact is not None:
            reason = "published"
        elif target.exists():
            damaged, reason = target, "damaged since it was published: its manifest is missing or was changed"
        else:
            reason = self._why(name, identity)
        place = target if artifact is None else artifact.path
        work = self.store / WORK / work_key(identity)
        if artifact is None and (newest := checkpoint.newest_sealed(work / "checkpoints")) is not None:
            reason += f"; resumes at step {checkpoint.step_of(newest)}"
            if stage is not None and (changed := cut_up_otherwise(newest, stage)):
                reason += f" ({changed}: equal within rounding, not bit for bit)"
        measurements = () if name == RELEASE else self._measurements(name, place, key)
        self.steps.append(Step(order, name, stage, identity, target, work, artifact, reason, damaged, measurements))

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
        found = []
        for metric, spec in self.pipeline.metrics.items():
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
        return tuple(found)

    def _reference(self, metric: str) -> str | None:
        if not self.steps:
            return None
        return next(one.file for one in self.steps[-1].measurements if one.metric == metric)
