"""What identifies a step: every input that could change its result, by content. Says, too, which of them changed."""

import re
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from specs.base import fingerprint, identity_fields
from specs.metric import JudgeSpec, LmEvalSpec, MetricSpec
from specs.model import ModelSpec
from specs.pipeline import BASE
from stages.artifact import model_files, sha256
from stages.conditions import MEMORY_ONLY
from stages.data import digests, files_of
from stages.documents import read_json, write_json
from stages.errors import InvalidInput, StageFailed
from stages.job import Job
from stages.metrics.harness import is_task_file, task_files
from stages.objective import ObjectiveSpec
from stages.paths import irregular
from stages.pickles import refuse_pickled_weights
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
MEASURING_LIBRARIES = ("torch", "transformers", "tokenizers", "lm_eval", "sacrebleu")
_DIGEST = re.compile(r"(^|:)[0-9a-f]{64}$")
_BASE_VERSION = 1


class Digests:
    """sha256 of files, remembered by size, inode and time of change, so that planning is quick."""

    def __init__(self, file: Path) -> None:
        """Read what is remembered in ``file``, if anything."""
        self._file = file
        self._changed = False
        try:
            kept = read_json(file)
        except InvalidInput:
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
        """Remember what was computed; where nothing can be written, it is computed again the next time."""
        if self._changed:
            with suppress(OSError):
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


def base_files(spec: ModelSpec, folder: Path) -> list[Path]:
    """The files that make up the base model, sorted by name.

    Raises:
        InvalidInput: the folder or file is missing, or is no model.
    """
    if spec.gguf is not None:
        file = folder / spec.gguf
        if problem := irregular(file):
            raise InvalidInput(f"model.gguf: {problem}")
        return [file]
    if spec.path is None:
        return []
    place = folder / spec.path
    if not place.is_dir():
        raise InvalidInput(f"model.path: {place}: no such folder")
    refuse_pickled_weights(place)
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
    return model_files(place)


def _refuse_quantised(place: Path) -> None:
    """Adapters merge into floating-point weights, and quantising twice is two errors."""
    try:
        settings = read_json(place / "config.json").get("quantization_config")
    except (InvalidInput, AttributeError):
        return  # what is no config at all is refused where the model is looked at
    if settings is not None:
        found = settings.get("quant_method") if isinstance(settings, dict) else None
        raise InvalidInput(
            f"model.path: {place}: the base is quantised already (quantization_config: {found or settings}); name the "
            "original weights: methods qlora, loftq, lq_lora and qa_lora quantise by themselves"
        )


def base_identity(pipeline: Pipeline, folder: Path, digest: Digests) -> dict[str, Any]:
    """What identifies the base: its files and what is laid over them, by content.

    Raises:
        InvalidInput: a file is missing, or the folder is no model.
    """
    files = base_files(pipeline.model, folder)
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


def model_digests(spec: ModelSpec, folder: Path, digest: Digests) -> dict[str, Any]:
    """What identifies a model beside the base, such as a judge: its files by content, and how it is put to use.

    Raises:
        InvalidInput: a file is missing, or the folder is no model.
    """
    template = spec.chat_template
    return {
        "files": [digest(file) for file in base_files(spec, folder)],
        "hub": None if spec.hub is None else f"{spec.hub}@{spec.revision}",
        "dtype": spec.dtype,
        "chat_template": None if template is None else digest(folder / template),
        "template_date": None if spec.template_date is None else spec.template_date.isoformat(),
    }


def stage_identity(
    pipeline: Pipeline, stage: ObjectiveSpec, parent: str, folder: Path, digest: Digests
) -> dict[str, Any]:
    """What identifies a stage: its fields, its data and its method's files by content, and the step before it.

    Raises:
        InvalidInput: a file is missing.
    """
    fields = identity_fields(stage)
    fields["method"] |= {field: digest(folder / name) for field, name in _method_files(stage).items()}
    return {
        "kind": "stage",
        "stage": fields,
        "parent": parent,
        "data": data_digests(stage, folder, digest),
        "seed": pipeline.seed_of(stage),
        "versions": versions(TRAINING_LIBRARIES),
        "code": {"objective": stage.version, "method": stage.method.version},
    }


def _method_files(stage: ObjectiveSpec) -> dict[str, str]:
    """The fields of a method that name files, of which the content counts and not the name."""
    names = stage.method.files()
    fields = {field: getattr(stage.method, field) for field in type(stage.method).model_fields if field != "kind"}
    return {field: value for field, value in fields.items() if isinstance(value, str) and value in names}


def work_key(identity: dict[str, Any]) -> str:
    """The name of the folder that a step is made in: a stage that was renamed, or ran out of memory, goes on there."""
    stage = identity.get("stage", {})
    train = {name: value for name, value in stage.get("train", {}).items() if name not in MEMORY_ONLY}
    return fingerprint(identity | {"stage": stage | {"train": train}})[:16]


def data_digests(stage: ObjectiveSpec, folder: Path, digest: Callable[[Path], str] = sha256) -> list[list[str]]:
    """The content of a stage's sources, in order."""
    return [digests(source, folder, digest) for source in stage.data]


def require_same_inputs(job: Job) -> None:
    """Hash for real what a step reads: what changed meanwhile must not be recorded as what the step was made from.

    Raises:
        StageFailed: files are others than those that the step was planned with; the message names them.
    """
    try:
        changed = _changed_in_base(job) if job.kind == BASE else _changed_in_stage(job)
    except InvalidInput as error:  # one that went, or can no longer be read
        changed = [str(error)]
    if changed:
        raise StageFailed(
            f"{job.name}: changed since this run was planned: {', '.join(changed)}. Nothing is published; "
            "put back what was there, or run again: the step is then made from what is there now"
        )


def _changed_in_base(job: Job) -> list[str]:
    folder, spec = Path(job.folder), job.pipeline.model
    known = dict(job.identity["files"])
    changed = [str(file) for file in base_files(spec, folder) if known.pop(file.name, None) != sha256(file)]
    if spec.path is not None:
        changed += [f"{folder / spec.path / name} (it went)" for name in known]
    if spec.chat_template is not None:
        changed += _other_content(folder / spec.chat_template, job.identity["chat_template"])
    return changed


def _changed_in_stage(job: Job) -> list[str]:
    folder = Path(job.folder)
    stage = job.stage
    changed = []
    for source, known in zip(stage.data, job.identity["data"], strict=True):
        if (found := digests(source, folder)) != known:
            files = zip(files_of(source, folder), found, strict=False)
            new = [str(file) for file, digest in files if digest not in known]
            how = "a file went" if len(found) < len(known) else "its files changed places"
            changed += new or [f"{folder / str(source.path)} ({how})"]
    for field, name in _method_files(stage).items():
        changed += _other_content(folder / name, job.identity["stage"]["method"][field])
    return changed


def _other_content(file: Path, known: str) -> list[str]:
    """A file, as a message names it, that is not what it was."""
    try:
        return [] if sha256(file) == known else [str(file)]
    except OSError as error:
        return [f"{file} ({error.strerror})"]


def metric_digests(spec: MetricSpec, folder: Path, digest: Callable[[Path], str]) -> list[str]:
    """The content of what a metric measures on.

    Raises:
        InvalidInput: a file is missing.
    """
    if isinstance(spec, JudgeSpec):
        return []  # the answers that it reads are named by their evaluations
    if not isinstance(spec, LmEvalSpec):
        return digests(spec.data, folder, digest)
    if not is_task_file(spec.task):
        return []
    return [digest(file) for file in task_files(folder / spec.task)]


def changes(old: Any, new: Any, path: str = "") -> list[str]:
    """What differs between two identity documents, by field: `train.learning_rate: 2e-05 -> 1e-05`."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in dict.fromkeys([*old, *new]):
            inner = f"{path}.{key}" if path and path != "stage" else key
            found += changes(old.get(key), new.get(key), inner)
        return found
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [text for n, pair in enumerate(zip(old, new, strict=True)) for text in changes(*pair, f"{path}.{n}")]
    if old == new:
        return []
    if path == "parent":
        return ["the step before it"]
    if any(isinstance(side, str) and _DIGEST.search(side) for side in (old, new)):
        return [f"content of {path}"]
    return [f"{path}: {old!r:.60} -> {new!r:.60}"]
