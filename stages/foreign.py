"""What a model brings beside its numbers, code and chat templates: looked at by `validate`, before anything loads."""

from collections.abc import Callable
from pathlib import Path

from specs.model import ModelSpec
from specs.pipeline import Location
from stages.errors import InvalidInput
from stages.remote_code import FIELD, allowing, trusted
from stages.template import check_template, folder_templates, read_template


def model_problems(spec: ModelSpec, folder: Path) -> list[tuple[Location, str]]:
    """What is wrong with the code and the chat templates of a base, each at its place in the spec.

    Args:
        spec: the base model; of a GGUF file or a hub model only the template is here to be looked at.
        folder: what relative paths start from.
    """
    found: list[tuple[Location, str]] = []
    template = None if spec.chat_template is None else folder / spec.chat_template
    if template is not None and template.is_file():
        _try(found, "chat_template", lambda: check_template(template, read_template(template), spec.template_date))
    place = None if spec.path is None else folder / spec.path
    if place is None or not place.is_dir():
        return found
    _try(found, "path" if spec.allow_remote_code is None else "allow_remote_code", lambda: _check_code(spec, place))
    if template is None:
        _try(found, "path", lambda: _check_templates(spec, place))
    return found


def _check_code(spec: ModelSpec, place: Path) -> None:
    with allowing(spec.allow_remote_code):
        if not trusted(place) and spec.allow_remote_code is not None:
            raise InvalidInput(f"{place}: names no code in its config (auto_map), so none would run; remove {FIELD}")


def _check_templates(spec: ModelSpec, place: Path) -> None:
    for file, text in folder_templates(place):
        check_template(file, text, spec.template_date)


def _try(found: list[tuple[Location, str]], field: str, check: Callable[[], object]) -> None:
    try:
        check()
    except InvalidInput as error:
        found.append((("model", field), str(error)))
