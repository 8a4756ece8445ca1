"""Everything that can be known to be wrong before anything trains, without torch."""

import difflib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import TypeAdapter, ValidationError

from specs.data import DataSpec
from specs.load import Document, Problem, SpecError
from specs.load import read as read_document
from specs.metric import JudgeSpec, LmEvalSpec, MetricSpec
from specs.model import ModelSpec
from specs.pipeline import BASE, Location
from specs.train import Optimizer
from stages.arguments import extra_problems
from stages.artifact import read
from stages.count import Count
from stages.data import SAMPLE
from stages.documents import read_object
from stages.errors import InvalidInput
from stages.evaluate import measure_names
from stages.files import Found, check_method, check_metric, check_model, check_source, missing
from stages.layout import Layout, read_layout
from stages.methods import Method
from stages.metrics import preference
from stages.metrics.endpoint import missing_key
from stages.metrics.installed import is_offline, not_here
from stages.objective import ObjectiveSpec
from stages.pipeline import Pipeline, Stage
from stages.plan import Plan, Step
from stages.requirements import stage_problems

_GPU_DEVICES = ("/dev/nvidia0", "/dev/kfd")
_GPU_OPTIMIZERS = ("paged_adamw", "paged_adamw_8bit")
_OPTIMIZER_PACKAGE = "bitsandbytes"
_PACKAGE_OPTIMIZERS = tuple(name for name in get_args(Optimizer) if "8bit" in name or "paged" in name)


def read_spec(path: Path, *, to_run: bool = False) -> tuple[Pipeline, Document]:
    """Read a spec and look at every file that it names, as far as that is quick.

    Args:
        path: the spec's file.
        to_run: whether it is planned or run here, so that what this machine cannot reach is wrong, too.

    Raises:
        SpecError: all that is wrong at once, each at its place. Where the spec as a whole cannot be understood, the
            files of those parts that can are looked at all the same.
    """
    document = read_document(path)
    try:
        pipeline = document.validate(Pipeline)
    except SpecError as error:
        found = part_problems(document.data, document.path.parent.resolve())
        raise SpecError([*error.problems, *_at_their_places(document, found)]) from None
    check_spec(pipeline, document)
    if to_run and (beyond := _beyond_reach(pipeline)):
        raise SpecError(_at_their_places(document, beyond))
    return pipeline, document


def check_spec(pipeline: Pipeline, document: Document) -> None:
    """Hold the parts of a spec against one another, and look at every file that it names, as far as that is quick.

    Raises:
        SpecError: all that is wrong, each at its place in the spec.
    """
    found = [*pipeline.problems(), *spec_problems(pipeline, document.path.parent.resolve())]
    if found:
        raise SpecError(_at_their_places(document, found))


def _at_their_places(document: Document, found: Found) -> list[Problem]:
    return [document.problem(where, message) for where, message in found]


def spec_problems(pipeline: Pipeline, folder: Path, limit: int | None = SAMPLE) -> Found:
    """What is wrong with the files, packages and trainer arguments that the spec names."""
    found: Found = []
    layout = check_model(pipeline.model, folder, found)
    written = {number: _stage_problems(stage, folder, layout, limit) for number, stage in enumerate(pipeline.stages)}
    for place, stage in pipeline.placed_stages():
        known = written[int(place[1])]
        if stage is pipeline.stages[int(place[1])]:
            found += [((*place, *where), message) for where, message in known]
            continue
        sources = pipeline.stages[int(place[1])].data
        own = _stage_problems(stage, folder, layout, limit, looked_at=sources)
        found += [((*place, *where), message) for where, message in own if (where, message) not in known]
    for name, metric in pipeline.metrics.items():
        check_metric(metric, ("metrics", name), folder, limit, found)
    return [*found, *_unknown_measures(pipeline, folder)]


def _unknown_measures(pipeline: Pipeline, folder: Path) -> Found:
    """Gates over measures that their metric does not have, which would fail after all the training."""
    found: Found = []
    for place, gate in pipeline.placed_gates():
        if (metric := pipeline.metrics.get(gate.metric_name)) is None:
            continue
        if (problem := _measure_problem(metric, gate.metric_name, gate.measure, folder)) is not None:
            found.append(((*place, "metric"), problem))
        elif metric.kind == "preference" and pipeline.compared_with(place, gate) == BASE:
            measure = gate.measure or preference.DEFAULT
            if measure not in preference.ON_THE_BASE:
                known = ", ".join(f"{gate.metric_name}.{name}" for name in preference.ON_THE_BASE)
                said = (
                    f"the base has no {measure}: a reward refers to what a model was trained from; give a threshold "
                    f"(at_least, at_most), compare with a stage, or take one of {known}"
                )
                found.append(((*place, gate.rule), said))
    return found


def _measure_problem(metric: MetricSpec, name: str, measure: str | None, folder: Path) -> str | None:
    try:
        known = measure_names(metric, folder)
    except (InvalidInput, OSError):
        return None  # told where the metric stands
    if known is None or measure in known:
        return None
    if measure is None:
        names = ", ".join(f"{name}.{one}" for one in known)
        return f"metric {name} has many measures; name one: {names}" if metric.kind == "generation" else None
    near = difflib.get_close_matches(measure, known, 1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    if measure.endswith("_perplexity") and metric.kind == "perplexity":
        hint = f"gates compare 'bits_per_{measure.removesuffix('_perplexity')}', to whose power of 2 it is the same; "
    return f"metric {name} has no measure {measure!r}; {hint}allowed: {', '.join(known)}"


def _beyond_reach(pipeline: Pipeline) -> Found:
    """Judges whose key is not here, and tasks whose rows would have to be fetched where the environment forbids it."""
    found: Found = []
    for name, metric in pipeline.metrics.items():
        if isinstance(metric, JudgeSpec) and metric.endpoint is not None:
            problem = missing_key(metric.endpoint, os.environ)
            found += [] if problem is None else [(("metrics", name, "endpoint", "key"), problem)]
    if not is_offline():
        return found
    for name, metric in pipeline.metrics.items():
        if isinstance(metric, LmEvalSpec) and (datasets := not_here(metric.task)):
            found.append(
                (
                    ("metrics", name, "task"),
                    f"task {metric.task} needs the network for {', '.join(datasets)}, which is not in the datasets "
                    "cache, and the environment forbids it (HF_HUB_OFFLINE): fetch it once with the network, or write "
                    "a task YAML over local files",
                )
            )
    return found


def _stage_problems(
    stage: ObjectiveSpec,
    folder: Path,
    layout: Layout | None,
    limit: int | None,
    looked_at: Sequence[DataSpec] = (),
) -> Found:
    """What is wrong with a stage, each at its place within it; files of sources that were looked at are left out."""
    found: Found = []
    check_method(stage.method, (), folder, layout, found)
    found += stage_problems(stage, layout)
    found += [(("train", "extra", key), message) for key, message in extra_problems(stage)]
    optimizer = stage.train.optimizer
    if optimizer in _PACKAGE_OPTIMIZERS and (problem := missing(_OPTIMIZER_PACKAGE)):
        found.append((("train", "optimizer"), f"optimizer {optimizer} {problem}"))
    for number, source in enumerate(stage.data):
        if source.label not in [one.label for one in looked_at]:
            check_source(source, ("data", number), folder, stage.normalise, limit, found)
    return found


def part_problems(data: dict[str, Any], folder: Path) -> Found:
    """What is wrong with the files that the sound parts of an unsound spec name.

    A part counts as sound when it validates by itself: the model, a metric, a stage, or else a stage's method and
    each source of its rows.

    Args:
        data: the spec as it was read.
        folder: the spec's.
    """
    found: Found = []
    model = _sound(ModelSpec, data.get("model"))
    layout = None if model is None else check_model(model, folder, found)
    stages, metrics = data.get("stages"), data.get("metrics")
    for number, part in enumerate(stages if isinstance(stages, list) else ()):
        place: Location = ("stages", number)
        if (stage := _sound(Stage, part)) is not None:
            own = _stage_problems(stage, folder, layout, SAMPLE)
            found += [((*place, *where), message) for where, message in own]
        elif isinstance(part, dict):
            _check_parts_of_stage(part, place, folder, layout, found)
    for name, part in metrics.items() if isinstance(metrics, dict) else ():
        if (metric := _sound(MetricSpec, part)) is not None:
            check_metric(metric, ("metrics", name), folder, SAMPLE, found)
    return found


def _check_parts_of_stage(
    part: dict[str, Any], place: Location, folder: Path, layout: Layout | None, found: Found
) -> None:
    if (method := _sound(Method, part.get("method"))) is not None:
        check_method(method, place, folder, layout, found)
    objectives = get_args(get_args(Stage)[0])
    schemas = [one.normalise for one in objectives if part.get("kind") in get_args(one.model_fields["kind"].annotation)]
    sources = part.get("data")
    for number, item in enumerate(sources if isinstance(sources, list) else ()):
        if (source := _sound(DataSpec, item)) is not None:
            schema = schemas[0] if schemas else None
            check_source(source, (*place, "data", number), folder, schema, SAMPLE, found)


def _sound(kind: Any, part: object) -> Any:
    """A part of a spec as what it should be, or None: what is wrong with it is said where the whole is validated."""
    try:
        return TypeAdapter(kind).validate_json(json.dumps(part), strict=True)
    except ValidationError:
        return None


def check_inputs(pipeline: Pipeline, folder: Path) -> None:
    """Read every row of every source, and refuse what this machine cannot do, before anything trains.

    Raises:
        InvalidInput: all that is wrong.
    """
    found = spec_problems(pipeline, folder, limit=None)
    for place, stage in pipeline.placed_stages():
        if stage.train.optimizer in _GPU_OPTIMIZERS and not has_gpu():
            message = f"{stage.train.optimizer} pages GPU memory, and there is no GPU here; use adamw_8bit or adamw"
            found.append(((*place, "train", "optimizer"), message))
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
    for _, stage in pipeline.placed_stages():
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
    return settings.is_file() and bool(read_object(settings).get("chat_template"))
