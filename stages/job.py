"""What a stage's process is told: one file, complete, so that the same command reruns the stage by hand."""

from pathlib import Path
from typing import Any, Literal

from specs.base import Spec
from stages.artifact import lock_file
from stages.documents import write_json
from stages.lock import MAKE
from stages.objective import ObjectiveSpec
from stages.pipeline import Pipeline

STAGE = "stage"
"""The kind of a job that trains; the other kinds are `base` and `release`."""


Tier = Literal["stages", "release"]
"""When a metric is measured: cheaply between the stages, or in full before the release."""


class Measurement(Spec):
    """One metric to measure, and where it is kept."""

    metric: str
    """Name of the metric in the spec."""
    file: str
    """The evaluation file to write."""
    identity: dict[str, Any]
    """What the evaluation depends on."""
    chat_template: bool
    """Whether a harness task is put as a user's turn."""
    reference: str | None
    """The evaluation file of another model: of the stage's start, for preferences; of whom a judge compares with."""
    answers: str | None = None
    """The evaluation file of this model's answers, for a judge."""
    tier: Tier = "stages"
    """Which rows are measured."""


class Job(Spec):
    """The work of one process: make an artifact, or measure one, or both."""

    kind: Literal["base", "stage", "release"]
    pipeline: Pipeline
    folder: str
    """What relative paths in the spec start from."""
    name: str
    """The step's name: `base`, a stage's, or `release`."""
    identity: dict[str, Any]
    """The document whose fingerprint is the artifact's identity."""
    target: str
    """Where the artifact is published."""
    work: str
    """Where it is made; kept over crashes, so that a rerun resumes."""
    start: str | None
    """The artifact that the step starts from; None for the base."""
    make: bool
    """Whether the artifact is to be made; if not, it is there and only measurements are missing."""
    measurements: tuple[Measurement, ...]
    """In the order of the spec."""

    @property
    def stage(self) -> ObjectiveSpec:
        """The stage that a job of kind `stage` makes."""
        return next(stage for stage in self.pipeline.stages if stage.name == self.name)

    @property
    def lock(self) -> Path:
        """The lock that admits one writer."""
        return lock_file(Path(self.target).parent, Path(self.work).name, MAKE)


def write_job(job: Job, path: Path) -> None:
    """Write a job for the process that does it.

    Only what the spec gave is written: some fields refuse to stand beside others, whatever their value, and a
    default that is spelt out would look like one that was given.
    """
    write_json(path, job.model_dump(mode="json", exclude_unset=True))


def read_job(path: Path) -> Job:
    """The job in a file that `write_job` wrote."""
    return Job.model_validate_json(path.read_text(encoding="utf-8"))
