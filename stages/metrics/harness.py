"""Tasks of the LM evaluation harness, run in this process on the model at hand."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from specs.gate import LmEvalSpec
from stages.errors import InvalidInput
from stages.measure import Measure, ratio

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SEEDS = (0, 1234, 1234, 1234)
"""The harness's own default seeds: random, numpy, torch, few-shot."""


def is_task_file(task: str) -> bool:
    """Whether a task is named by a YAML file rather than by an installed name."""
    return task.endswith((".yaml", ".yml"))


def task_config(path: Path) -> dict[str, Any]:
    """A task YAML with its data files made absolute: the harness would look in the current directory.

    Raises:
        InvalidInput: it cannot be read, or it names code to run (`!function`).
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        config = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidInput(f"{path}: cannot be read: {error.strerror}") from error
    except (YAMLError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{path}: not a task YAML that can be used (tags are not allowed): {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("task"), str):
        raise InvalidInput(f"{path}: a task YAML names its task (`task: NAME`)")
    kwargs = config.get("dataset_kwargs")
    if isinstance(kwargs, dict) and kwargs.get("data_files"):
        kwargs["data_files"] = {
            split: [str((path.parent / file).resolve()) for file in names]
            for split, names in _by_split(kwargs["data_files"], path).items()
        }
    return config


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
            # Indexing the installed tasks takes half a minute, and a local one needs none of them.
            task_manager=TaskManager(include_defaults=not local),
            **cast("Any", seeds),
        )
    except KeyError as error:
        raise InvalidInput(
            f"no task {name!r} is installed in the harness ({error}); `lm_eval --tasks list` shows them"
        ) from error
    return _measures(results, name, spec), {"task": name, "version": results["versions"].get(name)}


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
