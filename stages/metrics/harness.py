"""Tasks of the LM evaluation harness, run in this process on the model at hand."""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from specs.explain import shown
from specs.load import SpecError
from specs.load import read as read_document
from specs.metric import LmEvalSpec
from stages.bounds import bounded
from stages.errors import InvalidInput
from stages.measure import Measure, ratio

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SEEDS = (0, 1234, 1234, 1234)
"""The harness's own default seeds: random, numpy, torch, few-shot."""


_INSTEAD = "say it with Jinja in doc_to_text, with the harness's own filters and metrics, or change the rows"
_NO_TAGS = f"a tag such as `!function` would run code, and a task of a spec may not: {_INSTEAD}"
_KEYS = (
    "task",
    "task_alias",
    "tag",
    "dataset_path",
    "dataset_name",
    "dataset_kwargs",
    "training_split",
    "validation_split",
    "test_split",
    "fewshot_split",
    "fewshot_config",
    "num_fewshot",
    "doc_to_text",
    "doc_to_target",
    "doc_to_choice",
    "description",
    "target_delimiter",
    "fewshot_delimiter",
    "gen_prefix",
    "output_type",
    "generation_kwargs",
    "repeats",
    "filter_list",
    "metric_list",
    "metadata",
)
"""What a task of a spec may say."""
_RUNS_CODE = {
    "include": "reads another task file, which may run code",
    "class": "names a Python class",
    "custom_dataset": "names a Python function",
    "process_docs": "names a Python function",
    "process_results": "names a Python function",
    "unsafe_code": "runs what the model writes",
    "use_prompt": "reads prompts from elsewhere",
    "group": "names other tasks",
    "task_list": "names other tasks",
}
_BUILDERS = ("json", "csv", "parquet", "text")
"""Readers of the datasets library that read local files and nothing else."""
_READING = ("data_files", "field", "delimiter", "sep", "column_names", "encoding", "quotechar", "keep_in_memory")
"""Settings of these readers that reach no other file."""


def is_task_file(task: str) -> bool:
    """Whether a task is named by a YAML file rather than by an installed name."""
    return task.endswith((".yaml", ".yml"))


def task_config(path: Path) -> dict[str, Any]:
    """A task YAML with its data files made absolute: the harness would look in the current directory.

    Raises:
        InvalidInput: it cannot be read, or it would run code or read what it does not name as data; all that is wrong.
    """
    try:
        document = read_document(path)
    except SpecError as error:
        tagged = "tag" in str(error)
        raise InvalidInput(f"{error}{f'; {_NO_TAGS}' if tagged else ''}") from error
    config = document.data
    problems = [*document.refused, *(document.problem((key,), reason) for key, reason in _unfit(config))]
    if problems:
        raise InvalidInput("\n".join(map(str, problems)))
    kwargs = config["dataset_kwargs"]
    kwargs["data_files"] = {
        split: [str((path.parent / file).resolve()) for file in names]
        for split, names in _by_split(kwargs["data_files"], path).items()
    }
    return config


def _unfit(config: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The keys of a task that would run code or read elsewhere, and why each is refused."""
    if not isinstance(config.get("task"), str):
        yield "task", "a task YAML names its task (`task: NAME`)"
    for key in config:
        if key in _RUNS_CODE:
            yield key, f"{_RUNS_CODE[key]}, and a task of a spec may not; {_INSTEAD}"
        elif key not in _KEYS:
            yield key, f"no key of a task that a spec may name; allowed are {', '.join(_KEYS)}"
    yield from _unfit_rows(config.get("dataset_path"), config.get("dataset_kwargs"))
    metrics = config.get("metric_list") or []
    if not isinstance(metrics, list):
        yield "metric_list", f"found {shown(metrics)}; it is a list, an entry for each metric: `- metric: acc`"
        return
    for metric in metrics:
        if not isinstance(metric, dict) or not re.fullmatch(r"\w+", str(metric.get("metric"))):
            yield "metric_list", "each metric is named by a word: `- metric: acc`"
        elif metric.get("hf_evaluate"):
            yield "metric_list", f"hf_evaluate runs a script that is fetched; {_INSTEAD}"


def _unfit_rows(builder: Any, kwargs: Any) -> Iterator[tuple[str, str]]:
    if builder not in _BUILDERS:
        yield "dataset_path", f"found {shown(builder)}; a task of a spec reads local files by {', '.join(_BUILDERS)}"
    if not isinstance(kwargs, dict) or not kwargs.get("data_files"):
        yield "dataset_kwargs", "names no files; set dataset_kwargs: {data_files: {test: FILE}}"
    elif strange := sorted(set(kwargs) - set(_READING)):
        yield "dataset_kwargs", f"{strange[0]} is not allowed; allowed are {', '.join(_READING)}"


def _by_split(files: Any, path: Path) -> dict[str, list[str]]:
    """`data_files` in each of the forms that the datasets library takes, as split -> names."""
    splits = files if isinstance(files, dict) else {"train": files}
    found = {split: [names] if isinstance(names, str) else names for split, names in splits.items()}
    if not all(isinstance(names, list) and all(isinstance(one, str) for one in names) for names in found.values()):
        raise InvalidInput(f"{path}: data_files is a file name, a list of them, or one of these per split")
    return found


def task_files(path: Path) -> list[Path]:
    """The task YAML and the local data files that it names.

    Raises:
        InvalidInput: one of them does not exist.
    """
    kwargs = task_config(path).get("dataset_kwargs") or {}
    files = [Path(file) for names in (kwargs.get("data_files") or {}).values() for file in names]
    for file in files:
        if not file.is_file():
            raise InvalidInput(f"{path}: its data file {file} does not exist: no such file")
    return [path, *files]


def measure(
    spec: LmEvalSpec,
    folder: Path,
    model: Any,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    chat_template: bool,
) -> tuple[dict[str, Measure], dict[str, Any]]:
    """Run the task and keep every per-example result.

    Raises:
        InvalidInput: an unknown task, or one without the metric that the spec names.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    local = is_task_file(spec.task)
    task: Any = task_config(folder / spec.task) if local else spec.task
    name = str(task["task"]) if local else spec.task
    sandbox_templates()
    # Indexing the installed tasks takes half a minute, and a local one needs none of them.
    installed = TaskManager(include_defaults=not local)
    if local:
        _refuse_unknown_metrics(task, folder / spec.task)
    elif name not in installed.task_index:  # the harness would look for a file of this name
        raise InvalidInput(f"no task {name!r} is installed in the harness; `lm_eval --tasks list` shows them")
    harness_model = HFLM(
        pretrained=model,
        tokenizer=cast("Any", tokenizer),
        backend="causal",
        batch_size=spec.batch_size,
        max_length=spec.sequence_length,
    )
    seeds = dict(
        zip(
            ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"),
            SEEDS,
            strict=True,
        )
    )
    try:
        results: Any = lm_eval.simple_evaluate(
            model=harness_model,
            tasks=[task],
            num_fewshot=spec.few_shot,
            limit=spec.limit,
            apply_chat_template=chat_template,
            log_samples=True,
            bootstrap_iters=0,
            task_manager=installed,
            **cast("Any", seeds),
        )
    except KeyError as error:
        raise InvalidInput(
            f"no task {name!r} is installed in the harness ({error}); `lm_eval --tasks list` shows them"
        ) from error
    return _measures(results, name, spec), {"task": name, "version": results["versions"].get(name)}


def sandbox_templates() -> None:
    """Let the harness render what a task says in a sandbox and in bounds; its own Jinja runs any Python."""
    from jinja2 import BaseLoader, StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from lm_eval import utils

    if isinstance(utils.env, ImmutableSandboxedEnvironment):
        return
    sandbox = ImmutableSandboxedEnvironment(loader=BaseLoader(), undefined=StrictUndefined, keep_trailing_newline=True)
    sandbox.filters.update(utils.env.filters)
    plain = utils.apply_template

    def apply_template(template: str, doc: dict[str, Any]) -> str:
        with bounded("a template of the task", _INSTEAD):
            return str(plain(template, doc))

    utils.env, utils.apply_template = sandbox, apply_template


def _refuse_unknown_metrics(task: dict[str, Any], path: Path) -> None:
    """For a metric that it does not know the harness runs a script of that name, from here or from the hub."""
    from lm_eval.api import metrics, registry

    _ = metrics  # importing it fills the registry
    for metric in task.get("metric_list") or []:
        if metric["metric"] not in registry.METRIC_REGISTRY:
            known = ", ".join(sorted(registry.METRIC_REGISTRY))
            raise InvalidInput(f"{path}: metric_list: the harness has no metric {metric['metric']!r}; it has: {known}")


def _measures(results: Any, name: str, spec: LmEvalSpec) -> dict[str, Measure]:
    found = results["results"].get(name, {})
    better = results["higher_is_better"].get(name, {})
    samples = results["samples"].get(name, [])
    measures = {}
    for key, value in found.items():
        metric, _, chosen_filter = key.partition(",")
        if not chosen_filter or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        own = [sample for sample in samples if sample.get("filter", chosen_filter) == chosen_filter]
        direction: Literal["higher", "lower"] = "higher" if better.get(metric, True) else "lower"
        measures[metric] = _measure(metric, float(value), direction, own)
    if spec.metric not in measures:
        raise InvalidInput(
            f"task {name} has no metric {spec.metric!r}; it has: {', '.join(sorted(measures)) or 'none'}"
        )
    return measures


def _measure(metric: str, value: float, better: Literal["higher", "lower"], samples: list[dict[str, Any]]) -> Measure:
    values = [sample.get(metric) for sample in samples]
    if values and all(isinstance(item, (int, float)) for item in values):
        numbers = [float(cast("float", item)) for item in values]
        if math.isclose(math.fsum(numbers) / len(numbers), value, rel_tol=1e-6, abs_tol=1e-9):
            return ratio(numbers, [1.0] * len(numbers), better)
    pairs = [item for item in values if isinstance(item, (tuple, list)) and len(item) == 2]
    if metric == "bits_per_byte" and pairs and len(pairs) == len(values):
        return ratio([-ll / math.log(2) for ll, _ in pairs], [float(size) for _, size in pairs], "lower")
    return Measure(value, None, len(samples), better)
