"""Read one YAML 1.2 document into a strict model and name every problem by file, line, column and field.

Accepted is the part of YAML that means one thing only: no tags, anchors, merge keys or second documents, and
scalars by the core rules of YAML 1.2 (`1e-4` is a number, `no` is text, `010` is ten).
"""

import difflib
import functools
import json
import math
import os
import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, NoReturn, TypeGuard, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, RootModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML, events
from ruamel.yaml.error import MarkedYAMLError, StreamMark
from ruamel.yaml.reader import ReaderError
from typing_extensions import TypeAliasType

M = TypeVar("M", bound=BaseModel)
Location = tuple[str | int, ...]
Mark = tuple[int, int]

# With these the worst input that we know takes half a second in the pure Python parser.
MAX_BYTES = 256 * 1024
MAX_NODES = 5_000
MAX_DEPTH = 32
MAX_DIGITS = 100

_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_WORDS = dict.fromkeys(("", "~", "null", "Null", "NULL")) | {
    word: word.lower() == "true" for word in ("true", "True", "TRUE", "false", "False", "FALSE")
}
_NOT_TEXT = re.compile("[\0\ud800-\udfff]")
_EMPTY = "the file is empty: a spec is a mapping of keys to values"
_NO_DATA = "a spec names its data, it does not hold it"

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
    "string_pattern_mismatch": "text that matches {pattern}",
    "string_too_short": "text of {min_length} or more characters",
    "string_too_long": "text of {max_length} or fewer characters",
    "too_short": "{min_length} or more items",
    "too_long": "{max_length} or fewer items",
}
_BOUNDS = ("greater_than", "greater_than_equal", "less_than", "less_than_equal")


@dataclass(frozen=True, slots=True, order=True)
class Problem:
    """One thing that is wrong with a spec, and where; line and column count from 1."""

    path: str
    line: int
    column: int
    field: str
    message: str

    def __str__(self) -> str:
        """Return `path:line:column: field: message`, a form that editors can jump to."""
        name = f"{self.field}: " if self.field else ""
        return f"{self.path}:{self.line}:{self.column}: {name}{self.message}"


class SpecError(ValueError):
    """Every problem of a spec at once, in the order of the file."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        """Sort the problems by position and drop repetitions."""
        self.problems = tuple(sorted(set(problems)))
        super().__init__(self.problems)

    def __str__(self) -> str:
        """Return one line per problem."""
        return "\n".join(map(str, self.problems))


@dataclass(frozen=True, slots=True)
class Document:
    """One parsed YAML document: plain Python data, and where each key and value of it stands."""

    path: Path
    data: dict[str, Any]
    keys: dict[Location, Mark] = field(default_factory=dict, repr=False)
    values: dict[Location, Mark] = field(default_factory=dict, repr=False)
    infinite: dict[Location, str] = field(default_factory=dict, repr=False)
    """Numbers that are infinite or not a number, as written."""

    def position(self, location: Location) -> Mark:
        """Return line and column of the key at a location, or of the closest key around it."""
        return _nearest(self.keys, location)

    def problem(self, location: Location, message: str) -> Problem:
        """Return a problem at the key of a location, for checks that follow validation."""
        return Problem(str(self.path), *self.position(location), _dotted(location), message)

    def validate(self, model: type[M]) -> M:
        """Return the document as a model, validated strictly; lists are accepted for tuples.

        Raises:
            SpecError: With every error that pydantic finds.
        """
        problems = [
            self._at_value(location, f"expected a finite number, found {_cut(text)}")
            for location, text in self.infinite.items()
        ]
        try:
            # As JSON: strict Python input refuses a list for a tuple and text for a path.
            result = model.model_validate_json(json.dumps(self.data), strict=True)
        except ValidationError as error:
            problems += self._explain(model, error.errors(include_url=False))
        if problems:
            raise SpecError(problems)
        return result

    def _at_value(self, location: Location, message: str) -> Problem:
        return Problem(str(self.path), *_nearest(self.values, location), _dotted(location), message)

    def _explain(self, model: type[BaseModel], errors: list[ErrorDetails]) -> Iterator[Problem]:
        traces = [_trace(model, error["loc"], self.data) for error in errors]
        around = {trace.location[:size] for trace in traces for size in range(len(trace.location))}
        mismatches: dict[Location, list[tuple[str, ErrorDetails]]] = {}
        for trace, error in zip(traces, errors, strict=True):
            location, kind = trace.location, error["type"]
            if kind == "extra_forbidden":
                yield self.problem(location, "unknown key" + _allowed(location[-1], _names(trace.parent)))
            elif kind in {"union_tag_invalid", "union_tag_not_found"}:
                tag = (*location, error["ctx"]["discriminator"].strip("'"))
                yield self._at_value(tag, _bad_tag(trace, error, tag[-1]))
            elif kind == "missing":
                yield self._at_value(location, _missing(trace.parent, location[-1]))
            elif (expected := _expected(trace, error)) is None:
                yield self._at_value(location, _one_line(error["msg"].removeprefix("Value error, ")))
            elif error["loc"][-1:] == ("[key]",):
                yield self.problem(location, _mismatch([(expected, error)]))
            # pydantic counts the items that are sound, and so calls a list short whose items are wrong.
            elif kind == "too_short" and len(error["input"]) >= error["ctx"]["min_length"]:
                continue
            # Where one branch of a union got further into the value, its errors are the ones that help.
            elif location not in self.infinite and not (isinstance(trace.parent, _Choice) and location in around):
                mismatches.setdefault(location, []).append((expected, error))
        for location, branches in mismatches.items():
            yield self._at_value(location, _mismatch(branches))


def load(path: Path, model: type[M]) -> M:
    """Read a spec file into a model.

    Raises:
        SpecError: If the file cannot be read, is not sound YAML or does not fit the model.
    """
    return read(path).validate(model)


def read(path: Path) -> Document:
    """Read one YAML 1.2 document whose top level is a mapping.

    Raises:
        SpecError: If the file cannot be read or is not sound YAML.
    """
    text = _text(path)
    builder = _Builder(Document(path, {}))
    try:
        for event in YAML(typ="safe", pure=True).parse(text):
            builder.take(event)
    except SpecError:
        raise
    except ReaderError as error:
        message = f"the character U+{error.character:04X} is not allowed in YAML: remove it"
        builder.fail(message, _end(text[: error.position]))
    except MarkedYAMLError as error:
        builder.fail(_syntax(error), _mark(error.problem_mark or error.context_mark))
    except Exception as error:  # the parser is not ours and its input is arbitrary: no traceback may leave here
        builder.fail(f"not valid YAML after this point: {_one_line(str(error)) or type(error).__name__}")
    return builder.finish()


def _text(path: Path) -> str:
    def refuse(message: str, mark: Mark = (1, 1)) -> SpecError:
        return SpecError([Problem(str(path), *mark, "", message)])

    try:
        # Without O_NONBLOCK, opening a FIFO waits for its writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            status = os.fstat(descriptor)
            if stat.S_ISDIR(status.st_mode):
                raise refuse("is a directory: name the spec file in it")
            if not stat.S_ISREG(status.st_mode):
                raise refuse("is not a regular file: a spec is read from a file on disk")
            with os.fdopen(descriptor, "rb", closefd=False) as file:
                raw = file.read(MAX_BYTES + 1)
        finally:
            os.close(descriptor)
    except SpecError:
        raise
    except (OSError, ValueError) as error:
        raise refuse(f"cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if len(raw) > MAX_BYTES:
        raise refuse(f"is larger than {MAX_BYTES // 1024} KiB: {_NO_DATA}")
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        message = f"not UTF-8: the byte 0x{raw[error.start]:02X} is no character; save the file as UTF-8"
        raise refuse(message, _end(raw[: error.start].decode())) from None


class _Builder:
    """Fills a document from parser events: no recursion, and a limit stops the parser where it is crossed."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.problems: list[Problem] = []
        self.containers: list[dict[str, Any] | list[Any]] = []
        self.path: list[str | int] = []  # for each open container, the place in it
        self.awaits_key = False
        self.mark: Mark = (1, 1)
        self.count = 0

    def note(self, message: str) -> None:
        location = tuple(self.path[:-1] if self.awaits_key else self.path)
        self.problems.append(Problem(str(self.document.path), *self.mark, _dotted(location), message))

    def fail(self, message: str, mark: Mark | None = None) -> NoReturn:
        problem = Problem(str(self.document.path), *(mark or self.mark), "", message)
        raise SpecError([*self.problems, problem]) from None

    def finish(self) -> Document:
        if not self.count:
            self.fail(_EMPTY, (1, 1))
        if self.problems:
            raise SpecError(self.problems)
        return self.document

    def take(self, event: events.Event) -> None:
        if isinstance(event, events.CollectionEndEvent):
            self.containers.pop()
            self.path.pop()
            self._advance()
            return
        self.mark = _mark(event.start_mark)
        if isinstance(event, events.DocumentStartEvent):
            if self.count:
                self.fail("a second document begins: a spec is one document")
            if event.version not in {None, (1, 2)}:
                self.fail("only YAML 1.2 is supported: remove the %YAML line")
        elif isinstance(event, events.NodeEvent):
            self.count += 1
            if self.count > MAX_NODES:
                self.fail(f"more than {MAX_NODES:,} keys and values: {_NO_DATA}")
            self._refuse_extras(event)
            self._node(event)

    def _refuse_extras(self, event: events.NodeEvent) -> None:
        if isinstance(event, events.AliasEvent):
            self.note("aliases are not supported: write the value out")
        elif event.anchor is not None:
            self.note("anchors are not supported: write the value out where it is used")
        if isinstance(event, events.ScalarEvent | events.CollectionStartEvent) and event.ctag is not None:
            tag = str(event.ctag).replace("tag:yaml.org,2002:", "!!")
            self.note(f"tags are not supported: remove {_cut(tag)}")

    def _node(self, event: events.NodeEvent) -> None:
        if self.awaits_key:
            self._key(event)
        elif isinstance(event, events.MappingStartEvent):
            self._open({} if self.path else self.document.data, "")
        elif isinstance(event, events.SequenceStartEvent):
            self._open([], 0)
        else:
            self._put(self._scalar(event))
            self._advance()

    def _key(self, event: events.NodeEvent) -> None:
        if isinstance(event, events.CollectionStartEvent):
            self.fail("a key must be text, found a list or a mapping")
        key = str(event.value if isinstance(event, events.ScalarEvent) else event.anchor)
        self.awaits_key = False
        self.path[-1] = key
        location = tuple(self.path)
        if key == "<<" and isinstance(event, events.ScalarEvent) and event.style is None:
            self.note("merge keys are not supported: write the values out")
        elif not isinstance(self._scalar(event), str):
            self.note(f"a key must be text, found {_cut(key) or 'nothing'}: put it in quotes")
        elif key in self.containers[-1]:
            self.note(f"the key is already on line {self.document.keys[location][0]}: keep one of the two")
        self.document.keys[location] = self.mark

    def _open(self, container: dict[str, Any] | list[Any], first: str | int) -> None:
        if len(self.path) >= MAX_DEPTH:
            self.fail(f"nested deeper than {MAX_DEPTH} levels")
        self._put(container)
        self.containers.append(container)
        self.path.append(first)
        self.awaits_key = isinstance(container, dict)

    def _put(self, value: object) -> None:
        location = tuple(self.path)
        self.document.values[location] = self.mark
        if not self.containers:
            if value is None:
                self.fail(_EMPTY)
            if not isinstance(value, dict):
                found = "a list" if isinstance(value, list) else _shown(value)
                self.fail(f"the top level must be a mapping of keys to values, found {found}")
        elif isinstance(self.containers[-1], dict):
            self.containers[-1][str(location[-1])] = value
        else:
            self.containers[-1].append(value)
            self.document.keys[location] = self.mark

    def _advance(self) -> None:
        if self.path:
            last = self.path[-1]
            self.awaits_key = isinstance(last, str)
            self.path[-1] = last if isinstance(last, str) else last + 1

    def _scalar(self, event: events.NodeEvent) -> bool | int | float | str | None:
        if not isinstance(event, events.ScalarEvent):
            return str(event.anchor)
        text = str(event.value)
        if _NOT_TEXT.search(text):
            self.note("text cannot hold a NUL or half of a surrogate pair: remove the escape")
        if event.style is not None:
            return text
        if text in _WORDS:
            return _WORDS[text]
        if _INT.fullmatch(text):
            if len(text) <= MAX_DIGITS:
                base = {"o": 8, "x": 16}.get(text[1:2], 10)
                return int(text if base == 10 else text[2:], base)
            self.note(f"a number of {len(text):,} digits is too long: {MAX_DIGITS} are the most")
        elif _FLOAT.fullmatch(text):
            number = float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
            if not math.isfinite(number):
                self.document.infinite[tuple(self.path)] = text
            return number
        return text


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
    if expected is not None:
        return expected.format(**error.get("ctx", {}))
    if rest == error["msg"]:
        return None
    return f"a number {rest}" if error["type"] in _BOUNDS else rest


def _mismatch(branches: list[tuple[str, ErrorDetails]]) -> str:
    wanted = " or ".join(dict.fromkeys(expected for expected, _ in branches))
    error = branches[0][1]
    counted = error["type"] in {"too_short", "too_long"}
    found = len(error["input"]) if counted else _shown(error["input"])
    choices = [
        choice
        for _, each in branches
        if each["type"] in {"literal_error", "enum"}
        for choice in re.findall("'([^']*)'", each["ctx"]["expected"])
    ]
    near = _near(error["input"], choices)
    return f"expected {wanted}, found {found}" + (f"; {near}" if near else "")


def _bad_tag(trace: _Trace, error: ErrorDetails, name: str) -> str:
    choice = trace.kind
    tags = [tag for member in choice.members for tag in choice.tags(member)] if isinstance(choice, _Choice) else []
    if error["type"] == "union_tag_not_found":
        return f"missing; allowed: {', '.join(tags)}"
    noun = trace.location[-1] if _is_model(trace.parent) else name
    found = error["input"][name]
    return f"unknown {noun} {_shown(found)}{_allowed(found, tags)}"


def _missing(parent: object, name: str | int) -> str:
    for key, info in parent.model_fields.items() if _is_model(parent) else ():
        if name == (info.alias or key) and info.description:
            sentence = re.split(r"(?<=[.!?])\s", _one_line(info.description), maxsplit=1)[0]
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


def _syntax(error: MarkedYAMLError) -> str:
    problem = _one_line(error.problem or error.context or "")
    if "'\\t'" in problem:
        return "tabs cannot indent YAML: use spaces"
    if problem == "mapping values are not allowed here":
        problem += ": text that holds ': ' needs quotes"
    begin = f" ({_one_line(error.context)}, line {error.context_mark.line + 1})" if error.context_mark else ""
    return f"not valid YAML: {problem}{begin}"


def _shown(value: object) -> str:
    if value is None:
        return "nothing"
    return _cut(str(value).lower() if isinstance(value, bool) else repr(value))


def _cut(text: str) -> str:
    return text if len(text) <= 60 else text[:59] + "…"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _dotted(location: Location) -> str:
    text = ""
    for part in location:
        plain = isinstance(part, str) and re.fullmatch(r"[\w-]{1,60}", part)
        text += f".{part}" if plain else f"[{_shown(part)}]"
    return text.removeprefix(".")


def _nearest(marks: dict[Location, Mark], location: Location) -> Mark:
    while location and location not in marks:
        location = location[:-1]
    return marks.get(location, (1, 1))


def _mark(mark: StreamMark) -> Mark:
    return (mark.line + 1, mark.column + 1)


def _end(text: str) -> Mark:
    return (text.count("\n") + 1, len(text) - text.rfind("\n"))
