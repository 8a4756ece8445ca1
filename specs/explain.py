"""Say what a pydantic error means to who wrote the spec: where in the document, and what to write instead."""

import difflib
import functools
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, NamedTuple, TypeGuard, Union, get_args, get_origin

from pydantic import BaseModel, RootModel
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails
from typing_extensions import TypeAliasType

from specs.paths import IN_WORDS
from specs.secrets import redact

Location = tuple[str | int, ...]
"""A place in a document: keys and list positions from the top."""

# What a value should have been, by pydantic's error type, where pydantic's own words are not for people.
_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "none_required": "nothing",
    **dict.fromkeys(("tuple_type", "list_type", "set_type", "frozen_set_type"), "a list"),
    **dict.fromkeys(("dict_type", "model_type", "model_attributes_type", "dataclass_type"), "a mapping"),
    "string_too_short": "text of {min_length} or more characters",
    "string_too_long": "text of {max_length} or fewer characters",
    "too_short": "{min_length} or more items",
    "too_long": "{max_length} or fewer items",
}
_NUMBER = re.compile(r"-?[0-9]{1,20}(\.[0-9]{1,20})?([eE][-+]?[0-9]{1,3})?")
_BOUNDS = ("greater_than", "greater_than_equal", "less_than", "less_than_equal")


class Explanation(NamedTuple):
    """One error in words."""

    location: Location
    at_key: bool
    """Whether the key itself is at fault; otherwise its value is."""
    message: str


def explain(model: type[BaseModel], errors: Iterable[ErrorDetails], data: object) -> Iterator[Explanation]:
    """Put the errors of one validation into words, one explanation per place where branches of a union agree.

    Args:
        model: What was validated against; its fields give the allowed and the nearest names.
        errors: As pydantic's `ValidationError.errors` gives them.
        data: What was validated. Infinite numbers in it are not explained: who read them has refused them, as they
            were written.
    """
    errors = list(errors)
    traces = [_trace(model, error["loc"], data) for error in errors]
    around = {trace.location[:size] for trace in traces for size in range(len(trace.location))}
    mismatches: dict[Location, list[tuple[str, ErrorDetails]]] = {}
    for trace, error in zip(traces, errors, strict=True):
        location, kind = trace.location, error["type"]
        if kind == "extra_forbidden":
            yield Explanation(location, True, "unknown key" + _allowed(location[-1], _names(trace.parent)))
        elif kind in {"union_tag_invalid", "union_tag_not_found"}:
            tag = (*location, error["ctx"]["discriminator"].strip("'"))
            yield Explanation(tag, False, _bad_tag(trace, error, tag[-1]))
        elif kind == "missing":
            yield Explanation(location, False, _missing(trace.parent, location[-1]))
        elif (expected := _expected(trace, error)) is None:
            yield Explanation(location, False, one_line(error["msg"].removeprefix("Value error, ")))
        elif error["loc"][-1:] == ("[key]",):
            yield Explanation(location, True, _mismatch([(expected, error)]))
        # pydantic counts the items that are sound, and so calls a list short whose items are wrong.
        elif kind == "too_short" and len(error["input"]) >= error["ctx"]["min_length"]:
            continue
        # Where one branch of a union got further into the value, its errors are the ones that help.
        elif not _infinite(error["input"]) and not (isinstance(trace.parent, _Choice) and location in around):
            mismatches.setdefault(location, []).append((expected, error))
    for location, branches in mismatches.items():
        yield Explanation(location, False, _mismatch(branches))


def _infinite(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


@dataclass(frozen=True, slots=True)
class _Choice:
    """A union of types, told apart by a key of its members if there is a discriminator."""

    members: tuple[Any, ...]
    discriminator: str | None = None

    def tags(self, member: object) -> list[str]:
        """Return what pydantic may call a member in the location of an error."""
        kind = _bare(member)
        if not _is_model(kind):
            return []
        return [str(tag) for tag in get_args(_bare(_fields(kind).get(self.discriminator, object)))]

    def member(self, label: str) -> object:
        """Return the member that pydantic labels so in the location of an error."""
        for member in self.members:
            kind = _bare(member)
            name = getattr(get_origin(kind) or kind, "__name__", "")
            if isinstance(kind, _Choice):
                name = "tagged-union" if kind.discriminator else "union"
            if label in self.tags(member) or label.partition("[")[0] == name.partition("[")[0]:
                return kind
        return object


@dataclass(frozen=True, slots=True)
class _Trace:
    location: Location  # in the document
    parent: object  # the type that the last step of pydantic's location started from
    kind: object  # the type that it led to


def _trace(model: type[BaseModel], loc: Location, data: object) -> _Trace:
    """Follow pydantic's location, which also names the branches of unions, through the types and the data."""
    location: Location = ()
    parent, kind = None, _bare(model)
    value: Any = data
    for part in loc:
        parent = kind
        in_list = isinstance(value, list) and isinstance(part, int) and part < len(value)
        present = in_list or (isinstance(value, dict) and part in value)
        kind, is_place = _step(kind, part, present)
        if is_place:
            location = (*location, part)
            value = value[part] if present else None
    return _Trace(location, parent, kind)


def _step(kind: object, part: str | int, present: bool) -> tuple[object, bool]:
    """Return the type that one part of a location leads to, and whether the part is a place in the data."""
    arguments = get_args(kind)
    if isinstance(kind, _Choice):
        return kind.member(str(part)), False
    if _is_model(kind):
        return _bare(_fields(kind).get(part, object)), True
    if part == "[key]":
        return object, False
    if isinstance(part, int) and arguments:
        return _bare(arguments[0 if arguments[-1] is ... else min(part, len(arguments) - 1)]), True
    if len(arguments) == 2:
        return _bare(arguments[1]), True
    return object, present


def _bare(kind: object) -> object:
    """Return a type without its wrappers: aliases, annotations, `None` as an alternative, root models."""
    if isinstance(kind, TypeAliasType):
        return _bare(kind.__value__)
    if get_origin(kind) is Annotated:
        inner, *extras = get_args(kind)
        keys = [each.discriminator for each in extras if isinstance(each, FieldInfo) and each.discriminator]
        bare = _bare(inner)
        return _Choice(bare.members, str(keys[-1])) if isinstance(bare, _Choice) and keys else bare
    if get_origin(kind) in {Union, UnionType}:
        members = tuple(member for member in get_args(kind) if member is not type(None))
        return _bare(members[0]) if len(members) == 1 else _Choice(members)
    if _is_model(kind) and issubclass(kind, RootModel):
        return _bare(kind.model_fields["root"].annotation)
    return kind


def _is_model(kind: object) -> TypeGuard[type[BaseModel]]:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


@functools.cache
def _fields(model: type[BaseModel]) -> dict[Any, Any]:
    return {
        info.alias or name: Annotated[info.annotation, info] if info.discriminator else info.annotation
        for name, info in model.model_fields.items()
    }


def _names(kind: object) -> list[str]:
    return list(_fields(kind)) if _is_model(kind) else []


def _expected(trace: _Trace, error: ErrorDetails) -> str | None:
    rest = error["msg"].removeprefix("Input should be ")
    expected = _EXPECTED.get(error["type"])
    if expected == "a mapping" and isinstance(trace.kind, _Choice) and trace.kind.discriminator:
        return f"a mapping with the key '{trace.kind.discriminator}'"
    if error["type"] == "string_pattern_mismatch":
        pattern = error["ctx"]["pattern"]
        return IN_WORDS.get(pattern, f"text that matches {pattern}")
    if expected is not None:
        return expected.format(**error.get("ctx", {}))
    if rest == error["msg"]:
        return None
    return f"a number {rest}" if error["type"] in _BOUNDS else rest


def _mismatch(branches: list[tuple[str, ErrorDetails]]) -> str:
    wanted = " or ".join(dict.fromkeys(expected for expected, _ in branches))
    error = branches[0][1]
    counted = error["type"] in {"too_short", "too_long"}
    found = len(error["input"]) if counted else shown(error["input"])
    choices = [
        choice
        for _, each in branches
        if each["type"] in {"literal_error", "enum"}
        for choice in re.findall("'([^']*)'", each["ctx"]["expected"])
    ]
    near = _near(error["input"], choices)
    if "number" in wanted and isinstance(error["input"], str) and _NUMBER.fullmatch(error["input"]):
        near = "remove the quotes"
    return f"expected {wanted}, found {found}" + (f"; {near}" if near else "")


def _bad_tag(trace: _Trace, error: ErrorDetails, name: str) -> str:
    choice = trace.kind
    tags = [tag for member in choice.members for tag in choice.tags(member)] if isinstance(choice, _Choice) else []
    if error["type"] == "union_tag_not_found":
        return f"missing; allowed: {', '.join(tags)}"
    noun = trace.location[-1] if _is_model(trace.parent) else name
    found = error["input"][name]
    if isinstance(found, str) and len(found) <= 60:
        close = difflib.get_close_matches(found.lower(), tags, 3)
        tags = [*close, *(tag for tag in tags if tag not in close)]  # among thirty names the near ones stand first
    return f"unknown {noun} {shown(found)}{_allowed(found, tags)}"


def _missing(parent: object, name: str | int) -> str:
    for key, info in parent.model_fields.items() if _is_model(parent) else ():
        if name == (info.alias or key) and info.description:
            sentence = re.split(r"(?<=[.!?])\s", one_line(info.description), maxsplit=1)[0]
            return f"missing; {sentence.removesuffix('.')}"
    return "missing"


def _allowed(found: object, names: list[str]) -> str:
    near = _near(found, names)
    return (f"; {near}" if near else ";") + f" allowed: {', '.join(names)}" if names else ""


def _near(found: object, names: list[str]) -> str:
    if not isinstance(found, str) or len(found) > 60:
        return ""
    matches = difflib.get_close_matches(found.lower(), names, 1)
    return f"did you mean '{matches[0]}'?" if matches else ""


def shown(value: object) -> str:
    """Return a value as it is shown in a message."""
    if value is None:
        return "nothing"
    return cut(str(value).lower() if isinstance(value, bool) else repr(value))


def cut(text: str) -> str:
    """Return text that fits into a message, without a secret that would no longer be known as one."""
    text = redact(text, {})
    return text if len(text) <= 60 else text[:59] + "…"


def one_line(text: str) -> str:
    """Return text with every run of white space as one blank."""
    return " ".join(text.split())
