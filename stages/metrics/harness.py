"""Tasks of the LM evaluation harness, run in this process on the model at hand."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from specs.explain import shown
from specs.load import SpecError
from specs.load import read as read_document
from specs.metric import LmEvalSpec
from stages.bounds import bounded
from stages.errors import InvalidInput
from stages.measure import Measure
from stages.metrics import installed
from stages.metrics.results import measure_name, measures_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VERSION = 2
"""Of what is measured and kept."""
SEEDS = {"random_seed": 0, "numpy_random_seed": 1234, "torch_random_seed": 1234, "fewshot_random_seed": 1234}
"""The harness's own defaults."""

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


def scored_files(path: Path) -> list[str]:
    """The files whose rows a task YAML is scored on: those of its test split, or else of its validation split.

    Raises:
        InvalidInput: as `task_config`.
    """
    config = task_config(path)
    files: dict[str, list[str]] = config["dataset_kwargs"]["data_files"]
    split = config.get("test_split") or config.get("validation_split") or next(iter(files))
    return files.get(split, [])


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


def measure_names(spec: LmEvalSpec, folder: Path) -> tuple[str, ...] | None:
    """The measures of a task of the spec, or None where its file does not list them, or none of ours says.

    Raises:
        InvalidInput: as `task_config`.
    """
    if not is_task_file(spec.task):
        return None
    config = task_config(folder / spec.task)
    metrics = [str(metric["metric"]) for metric in config.get("metric_list") or []]
    filters = [str(one.get("name")) for one in config.get("filter_list") or [] if isinstance(one, dict)]
    found = [f"{metric},{one}" for metric in metrics for one in filters]
    return tuple(dict.fromkeys(map(measure_name, [*metrics, *found]))) or None


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
        InvalidInput: an unknown task, one whose rows cannot be read, or one without the metric that the spec names.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    sandbox_templates()
    name, loaded, manager = _load(spec, folder)
    harness_model = HFLM(
        pretrained=model,
        tokenizer=cast("Any", tokenizer),
        backend="causal",
        batch_size=spec.batch_size,
        max_length=spec.sequence_length,
    )
    results: Any = lm_eval.simple_evaluate(
        model=harness_model,
        tasks=[loaded.get("groups", {}).get(name) or loaded["tasks"][name]],
        num_fewshot=spec.few_shot,
        limit=spec.limit,
        apply_chat_template=chat_template,
        log_samples=True,
        bootstrap_iters=0,
        task_manager=manager,
        **cast("Any", SEEDS),
    )
    measures = measures_of(results, name, loaded["tasks"])
    if measure_name(spec.metric) not in measures:
        known = ", ".join(sorted(measures)) or "none"
        raise InvalidInput(f"task {name} has no metric {spec.metric!r}; it has: {known}")
    shown = {"task": name, "version": results["versions"].get(name), "few_shot": results["n-shot"].get(name)}
    return measures, shown


def _load(spec: LmEvalSpec, folder: Path) -> tuple[str, Any, Any]:
    """The name of a task or group, the tasks with their rows, and the manager that has loaded them."""
    from lm_eval.tasks import TaskManager

    place = folder / spec.task
    task: Any = spec.task
    if is_task_file(spec.task):
        task = task_config(place)
        _refuse_unknown_metrics(task, place)
    elif problem := installed.problem(spec.task):  # else the harness would look for a file of this name
        raise InvalidInput(problem)
    name = str(task["task"]) if isinstance(task, dict) else spec.task
    missing: KeyError | None = None
    try:
        for where in _where(None if isinstance(task, dict) else spec.task):
            manager = TaskManager(**where)
            try:
                return name, manager.load([task]), manager
            except KeyError as error:  # of a group, a member that lies elsewhere
                missing = error
    except (OSError, ValueError) as error:
        raise InvalidInput(
            f"task {name}: its rows cannot be read or fetched: {error}; check its data, or the network and the cache"
        ) from error
    raise InvalidInput(f"task {name}: the harness cannot load it: nothing is called {missing}") from missing


def _where(name: str | None) -> list[dict[str, Any]]:
    """Where the harness looks for tasks: parsing all that are installed takes half a minute, a folder of them none."""
    if name is None:
        return [{"include_defaults": False}]
    file = installed.installed()[name].file
    return [{"include_path": str(Path(str(file)).parent), "include_defaults": False}, {"include_defaults": True}]


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
