"""Which steps are published, which are stale and why, which are missing. Pure: reads, never writes a step."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from specs.base import fingerprint, identity_fields
from specs.gate import LmEvalSpec, MetricSpec, PreferenceSpec
from specs.pipeline import BASE, PREVIOUS
from stages import checkpoint, evaluate
from stages.artifact import (
    EVALUATION,
    MODEL_FILES,
    Artifact,
    damage,
    find,
    newest_of_stage,
    sha256,
    short,
    write_json,
)
from stages.conditions import MEMORY_ONLY
from stages.data import digests
from stages.errors import InvalidInput
from stages.evaluate import Evaluation
from stages.job import Job, Measurement
from stages.metrics.harness import is_task_file, task_files
from stages.objective import ObjectiveSpec
from stages.pipeline import Pipeline

TRAINING_LIBRARIES = (
    "torch",
    "transformers",
    "tokenizers",
    "trl",
    "peft",
    "accelerate",
    "datasets",
    "bitsandbytes",
)
MEASURING_LIBRARIES = ("torch", "transformers", "tokenizers", "lm_eval")
RELEASE = "release"
_DIGEST = re.compile(r"(^|:)[0-9a-f]{64}$")
_BASE_VERSION = 1
_MEASURE_VERSION = 1


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


class Digests:
    """sha256 of files, remembered by size, inode and time of change, so that planning is quick."""

    def __init__(self, file: Path) -> None:
        """Read what is remembered in ``file``, if anything."""
        self._file = file
        self._changed = False
        try:
            kept = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            kept = None
        self._known: dict[str, Any] = kept if isinstance(kept, dict) else {}

    def __call__(self, path: Path) -> str:
        """The sha256 (hex) of a file."""
        status = path.stat()
        stamp = [status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns]
        key = str(path.resolve())
        known = self._known.get(key)
        if isinstance(known, list) and known[:-1] == stamp:
            return str(known[-1])
        digest = sha256(path)
        self._known[key] = [*stamp, digest]
        self._changed = True
        return digest

    def save(self) -> None:
        """Remember what was computed."""
        if self._changed:
            write_json(self._file, self._known)


@cache
def versions(libraries: tuple[str, ...]) -> dict[str, str]:
    """Installed versions, without importing anything."""
    found = {}
    for library in libraries:
        try:
            found[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            found[library] = "absent"
    return found


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
    planner.add(BASE, None, _base_identity(pipeline, folder, digest))
    for stage in pipeline.stages:
        planner.add(stage.name, stage, _stage_identity(pipeline, stage, planner.parent, folder, digest))
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
        if artifact is not None and (found := damage(artifact, self.digest)):
            damaged, artifact, reason = artifact.path, None, f"damaged since it was published: {found[0]}"
        elif artifact is not None and self._moved(artifact):
            damaged, artifact, reason = artifact.path, None, "the base folder is elsewhere now"
        elif self.forced and artifact is not None:
            damaged, artifact, reason = artifact.path, None, f"forced by --from {self.forced_from}"
        elif artifact is not None:
            reason = "published"
        elif target.exists():
            damaged, reason = target, "damaged since it was published: its manifest is missing or was changed"
        else:
            reason = self._why(name, identity)
        place = target if artifact is None else artifact.path
        work = self.store / ".work" / _work_key(identity)
        if artifact is None and (step := checkpoint.newest_step(work / "checkpoints")):
            reason += f"; resumes at step {step}"
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
        changes = _changes(old.manifest["inputs"], identity)
        return "changed: " + "; ".join(changes[:3]) + (f"; and {len(changes) - 3} more" if len(changes) > 3 else "")

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
                "data": _metric_digests(spec, self.folder, self.digest),
                "dtype": self.pipeline.model.dtype,
                "chat_template": applied,
                "reference": self.parent if reference else None,
                "versions": versions(MEASURING_LIBRARIES),
                "code": _MEASURE_VERSION,
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


def base_files(pipeline: Pipeline, folder: Path) -> list[Path]:
    """The files that make up the base model, sorted by name.

    Raises:
        InvalidInput: the folder or file is missing, or is no model.
    """
    spec = pipeline.model
    if spec.gguf is not None:
        file = folder / spec.gguf
        if not file.is_file():
            raise InvalidInput(f"model.gguf: {file}: no such file")
        return [file]
    if spec.path is None:
        return []
    place = folder / spec.path
    if not place.is_dir():
        raise InvalidInput(f"model.path: {place}: no such folder")
    adapter = (place / "adapter_config.json").is_file()
    if not (place / "config.json").is_file() or not list(place.glob("*.safetensors")):
        only = " It holds an adapter only: merge it into its base first." if adapter else ""
        raise InvalidInput(f"model.path: {place}: not a model: a checkpoint has config.json and *.safetensors.{only}")
    if adapter:
        raise InvalidInput(
            f"model.path: {place}: holds whole weights and an adapter (adapter_config.json), and transformers would "
            "put the second on the first; merge it into its base first, or move the adapter's files elsewhere"
        )
    _refuse_quantised(place)
    return sorted({file for pattern in MODEL_FILES for file in place.glob(pattern)})


def _refuse_quantised(place: Path) -> None:
    """Adapters merge into floating-point weights, and quantising twice is two errors."""
    try:
        settings = json.loads((place / "config.json").read_text(encoding="utf-8")).get("quantization_config")
    except (ValueError, AttributeError):
        return  # what is no config at all is refused where the model is looked at
    if settings is not None:
        found = settings.get("quant_method") if isinstance(settings, dict) else None
        raise InvalidInput(
            f"model.path: {place}: the base is quantised already (quantization_config: {found or settings}); name the "
            "original weights: methods qlora, loftq, lq_lora and qa_lora quantise by themselves"
        )


def _base_identity(pipeline: Pipeline, folder: Path, digest: Digests) -> dict[str, Any]:
    files = base_files(pipeline, folder)
    template = pipeline.model.chat_template
    chosen = identity_fields(pipeline.model)
    if template is not None and not (folder / template).is_file():
        raise InvalidInput(f"model.chat_template: {folder / template}: no such file")
    return {
        "kind": BASE,
        "files": {file.name: digest(file) for file in files},
        "hub": None if pipeline.model.hub is None else f"{pipeline.model.hub}@{pipeline.model.revision}",
        "chat_template": None if template is None else digest(folder / template),
        **{name: value for name in ("template_date", "allow_remote_code") if (value := chosen.get(name)) is not None},
        "code": _BASE_VERSION,
    }


def _stage_identity(
    pipeline: Pipeline, stage: ObjectiveSpec, parent: str, folder: Path, digest: Digests
) -> dict[str, Any]:
    read = {name: digest(folder / name) for name in stage.method.files()}
    return {
        "kind": "stage",
        "stage": identity_fields(stage),
        **({"files": read} if read else {}),
        "parent": parent,
        "data": data_digests(stage, folder, digest),
        "seed": pipeline.seed_of(stage),
        "versions": versions(TRAINING_LIBRARIES),
        "code": {"objective": stage.version, "method": stage.method.version},
    }


def _work_key(identity: dict[str, Any]) -> str:
    """The name of the folder that a step is made in: a stage that was renamed, or ran out of memory, goes on there."""
    stage = identity.get("stage", {})
    train = {name: value for name, value in stage.get("train", {}).items() if name not in MEMORY_ONLY}
    return fingerprint(identity | {"stage": stage | {"train": train}})[:16]


def data_digests(stage: ObjectiveSpec, folder: Path, digest: Callable[[Path], str] = sha256) -> list[list[str]]:
    """The content of a stage's sources, in order."""
    return [digests(source, folder, digest) for source in stage.data]


def _metric_digests(spec: MetricSpec, folder: Path, digest: Digests) -> list[str]:
    if not isinstance(spec, LmEvalSpec):
        return digests(spec.data, folder, digest)
    if not is_task_file(spec.task):
        return []
    return [digest(file) for file in task_files(folder / spec.task)]


def _changes(old: Any, new: Any, path: str = "") -> list[str]:
    """What differs between two identity documents, by field: `train.learning_rate: 2e-05 -> 1e-05`."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in dict.fromkeys([*old, *new]):
            inner = f"{path}.{key}" if path and path != "stage" else key
            found += _changes(old.get(key), new.get(key), inner)
        return found
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [text for n, pair in enumerate(zip(old, new, strict=True)) for text in _changes(*pair, f"{path}.{n}")]
    if old == new:
        return []
    if path == "parent":
        return ["the step before it"]
    if any(isinstance(side, str) and _DIGEST.search(side) for side in (old, new)):
        return [f"content of {path}"]
    return [f"{path}: {old!r:.60} -> {new!r:.60}"]
