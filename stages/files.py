"""What is wrong with the files that one part of a spec names, as far as that is quick to know and without torch."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

from specs.data import DataSpec
from specs.metric import JudgeSpec, LmEvalSpec, MetricSpec
from specs.model import ModelSpec
from specs.pipeline import Location
from stages.data import Normaliser, files_of, read_source
from stages.depth import depth_problem
from stages.errors import InvalidInput
from stages.formats import gguf_problem, tokenizer_problem
from stages.identity import base_files
from stages.layout import Layout, read_layout
from stages.methods.base import MethodSpec
from stages.metrics import installed
from stages.metrics.harness import is_task_file, measure_names, task_files
from stages.metrics.held_out import row_schema
from stages.metrics.results import measure_name
from stages.paths import astray, irregular
from stages.remote_code import FIELD, allowing, trusted
from stages.template import check_template, folder_templates, read_template

Found = list[tuple[Location, str]]
"""Problems: each with its place in the spec and a message."""


def check_model(model: ModelSpec, folder: Path, found: Found) -> Layout | None:
    """Look at the base model and its template; what is wrong is added to ``found``.

    Args:
        model: the part of the spec.
        folder: the spec's.
        found: is added to.

    Returns:
        The base's config and headers, where it is a sound folder.
    """
    before = len(found)
    field = "gguf" if model.path is None else "path"
    if (name := getattr(model, field)) is not None:
        files: list[Path] = []
        stray = astray(name, [folder / name], folder)
        if stray is None:
            _try(found, ("model",), lambda: files.extend(base_files(model, folder)))
        found += [(("model", field), problem) for problem in [stray, *_unreadable(name, files, folder)] if problem]
    layouts: list[Layout] = []
    if model.path is not None and len(found) == before:
        place = folder / model.path
        _try(found, ("model", "path"), lambda: layouts.append(read_layout(place)))
        _refuse(found, ("model", "path"), lambda: tokenizer_problem(place))
        _refuse(found, ("model", "path"), lambda: depth_problem(layouts[0]) if layouts else None)
    if model.gguf is not None and len(found) == before:
        file = folder / model.gguf
        _refuse(found, ("model", "gguf"), lambda: gguf_problem(file))
    if (template := model.chat_template) is not None:
        problem = irregular(folder / template) or astray(template, [folder / template], folder)
        if problem:
            found.append((("model", "chat_template"), problem))
    if len(found) == before:  # what lies elsewhere, or is no file, is not opened
        _check_programs(model, folder, found)
    return layouts[0] if layouts else None


def check_method(method: MethodSpec, place: Location, folder: Path, layout: Layout | None, found: Found) -> None:
    """Look at the packages that a method needs and at the files that it reads.

    Args:
        method: the part of the spec.
        place: the stage's.
        folder: the spec's.
        layout: the base's config and headers, if it is known; files are held against it.
        found: is added to.
    """
    for package in method.requires:
        if problem := missing(package):
            found.append(((*place, "method"), f"method {method.kind} {problem}"))
    strays = {name: stray for name in method.files() if (stray := astray(name, [folder / name], folder))}
    for field in type(method).model_fields:
        if isinstance(name := getattr(method, field), str) and name in strays:
            found.append(((*place, "method", field), strays[name]))
    if not strays:
        served = layout is not None and method.unsupported(layout.config) is None
        problems = method.file_problems(folder, layout if served else None)
        found += [((*place, "method", field), message) for field, message in problems]


def check_source(
    source: DataSpec, place: Location, folder: Path, schema: Normaliser | None, limit: int | None, found: Found
) -> None:
    """Look at the files of a source and at their rows.

    Args:
        source: the part of the spec.
        place: where it stands.
        folder: the spec's.
        schema: what a row must look like; None where that is not known and only the files are looked at.
        limit: rows of each file to look at, at most.
        found: is added to.
    """
    if source.path is None:
        return
    files: list[Path] = []
    if stray := astray(source.path, [folder / source.path], folder):  # before a pattern searches elsewhere
        found.append(((*place, "path"), stray))
        return
    _try(found, place, lambda: files.extend(files_of(source, folder)))
    bad = _unreadable(source.path, files, folder)
    found += [((*place, "path"), problem) for problem in bad]
    if files and not bad and schema is not None:
        _try(found, place, lambda: [None for _ in read_source(source, folder, schema, limit)])


def check_metric(metric: MetricSpec, place: Location, folder: Path, limit: int | None, found: Found) -> None:
    """Look at the held-out rows of a metric, or at the files of its task; see `check_source`."""
    if isinstance(metric, JudgeSpec):
        if metric.model is not None:
            own: Found = []
            check_model(metric.model, folder, own)
            found += [((*place, *where), message) for where, message in own]
    elif not isinstance(metric, LmEvalSpec):
        check_source(metric.data, (*place, "data"), folder, row_schema(metric), limit, found)
    elif is_task_file(metric.task):
        file = folder / metric.task
        problem = irregular(file) or astray(metric.task, [file], folder)
        files: list[Path] = []
        if problem is None:
            _try(found, (*place, "task"), lambda: files.extend(task_files(file)))
            problem = astray(metric.task, files, folder)
        if problem is not None:
            found.append(((*place, "task"), problem))
        elif files and (names := measure_names(metric, folder)) and measure_name(metric.metric) not in names:
            listed = ", ".join(names)
            found.append(((*place, "metric"), f"task {metric.task} has no metric {metric.metric!r}; it has: {listed}"))
    else:
        _refuse(found, (*place, "task"), lambda: installed.problem(metric.task))


def missing(package: str) -> str | None:
    """That a package is needed, and how to get it, where it is not installed."""
    there = importlib.util.find_spec(package) is not None
    return None if there else f"needs the package {package}: pip install {package}"


def _check_programs(model: ModelSpec, folder: Path, found: Found) -> None:
    """What a base brings beside its numbers: code and chat templates. Of a GGUF file or a hub model none is here."""
    template = None if model.chat_template is None else folder / model.chat_template
    if template is not None:
        own, place = template, ("model", "chat_template")
        _try(found, place, lambda: check_template(own, read_template(own), model.template_date))
    if model.path is None:
        return
    base = folder / model.path
    field = "path" if model.allow_remote_code is None else "allow_remote_code"
    _try(found, ("model", field), lambda: _check_code(model, base))
    if template is None:
        _try(found, ("model", "path"), lambda: _check_templates(model, base))


def _check_code(model: ModelSpec, base: Path) -> None:
    with allowing(model.allow_remote_code):
        if not trusted(base) and model.allow_remote_code is not None:
            raise InvalidInput(f"{base}: names no code in its config (auto_map), so none would run; remove {FIELD}")


def _check_templates(model: ModelSpec, base: Path) -> None:
    for file, text in folder_templates(base):
        check_template(file, text, model.template_date)


def _unreadable(name: str, files: list[Path], folder: Path) -> list[str]:
    """Why the files that a path led to cannot or may not be read."""
    return [problem for problem in (*map(irregular, files), astray(name, files, folder)) if problem is not None]


def _refuse(found: Found, place: Location, look: Callable[[], str | None]) -> None:
    problems: list[str | None] = []
    _try(found, place, lambda: problems.append(look()))
    found += [(place, problem) for problem in problems if problem is not None]


def _try(found: Found, place: Location, check: Callable[[], object]) -> None:
    try:
        check()
    except InvalidInput as error:
        found.extend((place, line) for line in str(error).splitlines())
    except OSError as error:
        name = str(error.filename)[:200]
        found.append((place, f"{name}: cannot be read: {error.strerror}"))
