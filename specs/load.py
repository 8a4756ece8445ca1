"""Read one YAML 1.2 document into a strict model and name every problem by file, line, column and field.

Accepted is the part of YAML that means one thing only: no tags, anchors, merge keys or second documents, and
scalars by the core rules of YAML 1.2 (`1e-4` is a number, `no` is text, `010` is ten).
"""

import json
import math
import os
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML, events
from ruamel.yaml.error import MarkedYAMLError, StreamMark
from ruamel.yaml.reader import ReaderError

from specs.explain import Location, cut, explain, one_line, shown
from specs.printable import printable_line
from specs.secrets import looks_like_secret, redact

M = TypeVar("M", bound=BaseModel)
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
_CONFIDENTIAL = (
    "looks like {noun}: a spec is copied into manifests and logs, so it holds no secrets; remove it, export it as an "
    "environment variable (the hub reads HF_TOKEN), and revoke it if anybody else has seen this file"
)
_NO_DATA = "a spec names its data, it does not hold it"


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
        return printable_line(f"{self.path}:{self.line}:{self.column}: {name}{self.message}")


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
    refused: list[Problem] = field(default_factory=list, repr=False)
    """Values that are sound YAML and yet never allowed; `validate` reports them with the rest."""

    def position(self, location: Location) -> Mark:
        """Return line and column of the key at a location, or of the closest key around it."""
        return _nearest(self.keys, location)

    def problem(self, location: Location, message: str) -> Problem:
        """Return a problem at the key of a location, for checks that follow validation."""
        return _problem(self.path, self.position(location), location, message)

    def validate(self, model: type[M]) -> M:
        """Return the document as a model, validated strictly; lists are accepted for tuples.

        Raises:
            SpecError: With every error that pydantic finds.
        """
        problems = [*self.refused]
        try:
            # As JSON: strict Python input refuses a list for a tuple and text for a path.
            result = model.model_validate_json(json.dumps(self.data), strict=True)
        except ValidationError as error:
            for location, at_key, message in explain(model, error.errors(include_url=False), self.data):
                problems.append(self.problem(location, message) if at_key else self._at_value(location, message))
        if problems:
            raise SpecError(problems)
        return result

    def _at_value(self, location: Location, message: str) -> Problem:
        return _problem(self.path, _nearest(self.values, location), location, message)


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
        builder.fail(f"not valid YAML after this point: {one_line(str(error)) or type(error).__name__}")
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
        self.problems.append(self._here(message))

    def refuse(self, message: str) -> None:
        self.document.refused.append(self._here(message))

    def fail(self, message: str, mark: Mark | None = None) -> NoReturn:
        problem = _problem(self.document.path, mark or self.mark, (), message)
        raise SpecError([*self.problems, problem]) from None

    def _here(self, message: str) -> Problem:
        location = tuple(self.path[:-1] if self.awaits_key else self.path)
        return _problem(self.document.path, self.mark, location, message)

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
            self.note(f"tags are not supported: remove {cut(tag)}")

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
            self.note(f"a key must be text, found {cut(key) or 'nothing'}: put it in quotes")
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
        key = self.document.keys.get(location, self.mark)
        # What is not there stands, for the parser, where the next thing begins: lines below its key, perhaps.
        self.document.values[location] = key if value is None and key[0] < self.mark[0] else self.mark
        if not self.containers:
            if value is None:
                self.fail(_EMPTY)
            if not isinstance(value, dict):
                found = "a list" if isinstance(value, list) else shown(value)
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
        if noun := looks_like_secret(text):
            self.refuse(_CONFIDENTIAL.format(noun=noun))
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
                self.refuse(f"expected a finite number, found {cut(text)}")
            return number
        return text


def _problem(path: Path, mark: Mark, location: Location, message: str) -> Problem:
    """A problem as it may be shown: whatever it quotes of the file, a secret is not in it."""
    return Problem(str(path), *mark, redact(_dotted(location), {}), redact(message, {}))


def _syntax(error: MarkedYAMLError) -> str:
    problem = one_line(error.problem or error.context or "")
    if "'\\t'" in problem:
        return "tabs cannot indent YAML: use spaces"
    if problem == "mapping values are not allowed here":
        problem += ": text that holds ': ' needs quotes"
    begin = f" ({one_line(error.context)}, line {error.context_mark.line + 1})" if error.context_mark else ""
    return f"not valid YAML: {problem}{begin}"


def _dotted(location: Location) -> str:
    text = ""
    for part in location:
        plain = isinstance(part, str) and re.fullmatch(r"[\w-]{1,60}", part)
        text += f".{part}" if plain else f"[{shown(part)}]"
    return text.removeprefix(".")


def _nearest(marks: dict[Location, Mark], location: Location) -> Mark:
    while location and location not in marks:
        location = location[:-1]
    return marks.get(location, (1, 1))


def _mark(mark: StreamMark) -> Mark:
    return (mark.line + 1, mark.column + 1)


def _end(text: str) -> Mark:
    return (text.count("\n") + 1, len(text) - text.rfind("\n"))
