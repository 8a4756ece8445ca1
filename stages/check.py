"""Everything that can be known to be wrong before anything trains, without torch."""

import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from specs.gate import LmEvalSpec, PreferenceSpec
from specs.load import Document, Problem, SpecError
from specs.pipeline import Location
from stages.arguments import extra_problems
from stages.artifact import read
from stages.count import Count
from stages.data import SAMPLE, Normaliser, read_source
from stages.errors import InvalidInput
from stages.identity import base_files
from stages.layout import Layout, read_layout
from stages.methods.base import MethodSpec
from stages.metrics.harness import is_task_file, task_files
from stages.pipeline import Pipeline
from stages.plan import Plan, Step
from stages.requirements import stage_problems
from stages.rows import any_scored_row, preference_row

_GPU_DEVICES = ("/dev/nvidia0", "/dev/kfd")
_GPU_OPTIMIZERS = ("paged_adamw", "paged_adamw_8bit")

if TYPE_CHECKING:
    from specs.data import DataSpec

Found = list[tuple[Location, str]]


def check_spec(pipeline: Pipeline, document: Document) -> None:
    """Look at every file that the spec names, as far as that is quick.

    Raises:
        SpecError: all that is wrong, each at its place in the spec.
    """
    found = spec_problems(pipeline, document.path.parent.resolve())
    if found:
        problems: list[Problem] = [document.problem(where, message) for where, message in found]
        raise SpecError(problems)


def spec_problems(pipeline: Pipeline, folder: Path, limit: int | None = SAMPLE) -> Found:
    """What is wrong with the files, packages and trainer arguments that the spec names."""
    found: Found = []
    layout = _base_layout(pipeline, folder, found)
    template = pipeline.model.chat_template
    if template is not None and not (folder / template).is_file():
        found.append((("model", "chat_template"), f"{folder / template}: no such file"))
    for number, stage in enumerate(pipeline.stages):
        place: Location = ("stages", number)
        found += [((*place, "method"), message) for message in _missing(stage.method)]
        found += _file_problems(stage.method, place, folder, layout)
        found += [((*place, *where), message) for where, message in stage_problems(stage, layout)]
        found += [((*place, "train", "extra", key), message) for key, message in extra_problems(stage)]
        for source_number, source in enumerate(stage.data):
            _read(found, (*place, "data", source_number), source, folder, stage.normalise, limit)
    for name, metric in pipeline.metrics.items():
        if isinstance(metric, LmEvalSpec):
            if is_task_file(metric.task):
                _try(found, ("metrics", name, "task"), lambda task=metric.task: task_files(folder / task))  # type: ignore[misc]
        else:
            schema = preference_row if isinstance(metric, PreferenceSpec) else any_scored_row
            _read(found, ("metrics", name, "data"), metric.data, folder, schema, limit)
    return found


def _missing(method: MethodSpec) -> Iterator[str]:
    """Packages that a method needs and that are not there."""
    for package in method.requires:
        if importlib.util.find_spec(package) is None:
            yield f"method {method.kind} needs the package {package}: pip install {package}"


def _file_problems(method: MethodSpec, place: Location, folder: Path, layout: Layout | None) -> Found:
    """The files that a method reads, held against the model unless that one is refused as a whole."""
    served = layout is not None and method.unsupported(layout.config) is None
    found = method.file_problems(folder, layout if served else None)
    return [((*place, "method", field), message) for field, message in found]


def check_inputs(pipeline: Pipeline, folder: Path) -> None:
    """Read every row of every source, and refuse what this machine cannot do, before anything trains.

    Raises:
        InvalidInput: all that is wrong.
    """
    found = spec_problems(pipeline, folder, limit=None)
    for number, stage in enumerate(pipeline.stages):
        if stage.train.optimizer in _GPU_OPTIMIZERS and not has_gpu():
            message = f"{stage.train.optimizer} pages GPU memory, and there is no GPU here; use adamw_8bit or adamw"
            found.append((("stages", number, "train", "optimizer"), message))
    if found:
        raise InvalidInput("\n".join(message for _, message in found))


def has_gpu() -> bool:
    """Whether a GPU's device file is there; asking the driver would mean importing torch."""
    return any(Path(device).exists() for device in _GPU_DEVICES)


def check_base(pipeline: Pipeline, step: Step) -> None:
    """Hold the stages against the prepared base: what their methods require of it, chat template.

    Raises:
        InvalidInput: a stage cannot run on this model.
    """
    artifact = step.artifact or read(step.target)
    if artifact is None:
        return
    layout = read_layout(artifact.model)
    template = has_chat_template(artifact.model)
    for stage in pipeline.stages:
        for where, message in stage_problems(stage, layout):
            raise InvalidInput(f"stage {stage.name}: {where[1]}: {message}")
        if stage.needs_chat_template and not template:
            raise InvalidInput(
                f"stage {stage.name} ({stage.kind}) needs a chat template, and the base's tokenizer has none; "
                "name one in the spec (model.chat_template: a Jinja file)"
            )


def check_counts(plan: Plan, counts: dict[str, Count], document: Document) -> None:
    """Refuse what the model itself, built without weights, was found not to take.

    Raises:
        SpecError: a method cannot serve this model, at its place in the spec.
    """
    names = [stage.name for stage in plan.pipeline.stages]
    found = [
        document.problem(("stages", names.index(name), "method", "kind"), count.reason)
        for name, count in counts.items()
        if count.refused
    ]
    if found:
        raise SpecError(found)


def has_chat_template(model: Path) -> bool:
    """Whether a checkpoint carries a chat template, beside its tokenizer or inside its settings."""
    if list(model.glob("*.jinja")):
        return True
    settings = model / "tokenizer_config.json"
    return settings.is_file() and bool(json.loads(settings.read_text(encoding="utf-8")).get("chat_template"))


def _base_layout(pipeline: Pipeline, folder: Path, found: Found) -> Layout | None:
    """The base's config and headers, if it is a sound folder; what is wrong with it goes to ``found``."""
    before = len(found)
    _try(found, ("model",), lambda: base_files(pipeline, folder))
    layouts: list[Layout] = []
    if pipeline.model.path is not None and len(found) == before:
        place = folder / pipeline.model.path
        _try(found, ("model", "path"), lambda: layouts.append(read_layout(place)))
    return layouts[0] if layouts else None


def _read(
    found: Found, place: Location, source: "DataSpec", folder: Path, schema: Normaliser, limit: int | None
) -> None:
    if source.path is not None:
        _try(found, place, lambda: [None for _ in read_source(source, folder, schema, limit)])


def _try(found: Found, place: Location, check: Callable[[], object]) -> None:
    try:
        check()
    except InvalidInput as error:
        found.extend((place, line) for line in str(error).splitlines())
