"""Rows from files, checked as they are read: every complaint names file and line."""

import codecs
import csv
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from specs.data import FORMATS, DataSpec
from specs.printable import printable_line
from stages.artifact import sha256
from stages.documents import LFS_POINTER
from stages.errors import InvalidInput
from stages.log import info
from stages.paths import irregular
from stages.rows import BadRow, BrokenFile, Row

Normaliser = Callable[[Row], Row]
SAMPLE = 200
"""Rows of each file that `validate` and `plan` look at; `run` reads them all."""
SHOWN = 5
"""Bad rows named in one message or record; the rest is counted."""


@dataclass(slots=True)
class Count:
    """What became of the rows of a source: good ones are used, bad ones are left out or refuse it."""

    source: str
    """What the spec calls it."""
    rows: int = 0
    """All that were read, good and bad."""
    bad: int = 0
    files: dict[str, int] = field(default_factory=dict)
    """Rows read of each file, by its path."""
    first: list[str] = field(default_factory=list)
    """The first `SHOWN` bad ones: ``file:line: reason``."""
    sampled: bool = False
    """Whether a limit kept rows from being read."""

    @property
    def used(self) -> int:
        """The rows that the source gives."""
        return self.rows - self.bad

    def as_record(self, folder: Path) -> dict[str, Any]:
        """For manifests; places are relative to ``folder``, the spec's."""
        first = [line.removeprefix(f"{folder}/") for line in self.first]
        return {"source": self.source, "rows": self.rows, "dropped": self.bad, "first_dropped": first}

    def __str__(self) -> str:
        """One line, with the rows of each file: ``data/a.jsonl: 40 rows, 2 of them cannot be used``."""
        each = (
            "" if len(self.files) < 2 else " (" + ", ".join(f"{Path(k).name} {n}" for k, n in self.files.items()) + ")"
        )
        bad = f", {self.bad} of them cannot be used" if self.bad else ""
        return f"{self.source}: {self.rows} rows{each}{bad}"


class Line(NamedTuple):
    """Where a row stands."""

    file: str
    """The path as it was opened."""
    line: str
    """Its line, or its number where a file has no lines; from 1."""


def files_of(source: DataSpec, folder: Path) -> list[Path]:
    """The files of a source, sorted; a hub dataset's are fetched at its commit, or taken from the cache.

    Raises:
        InvalidInput: no such file, not a regular file, or the hub cannot be reached.
    """
    if source.path is not None:
        return _local_files(source.path, folder)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        snapshot = Path(
            snapshot_download(
                str(source.hub),
                repo_type="dataset",
                revision=source.revision,
                allow_patterns=source.files,
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise InvalidInput(
            f"{source.label}: cannot be fetched from the hub ({error}); "
            "check the id and the revision, or download the files and name them by path"
        ) from error
    return _matches(snapshot, str(source.files), source.label)


def _local_files(pattern: str, folder: Path) -> list[Path]:
    path = folder / pattern
    if any(sign in pattern for sign in "*?["):
        return _matches(folder, pattern, str(path))
    if problem := irregular(path):
        raise InvalidInput(problem)
    return [path]


def _matches(folder: Path, pattern: str, label: str) -> list[Path]:
    start, relative = folder, Path(pattern)
    if relative.is_absolute():
        start, relative = Path(relative.anchor), relative.relative_to(relative.anchor)
    try:
        found = sorted(path for path in start.glob(str(relative)) if path.is_file())
    except ValueError as error:
        raise InvalidInput(f"{label}: not a pattern of file names: {error}") from error
    if not found:
        raise InvalidInput(f"{label}: no file matches")
    return found


def digests(source: DataSpec, folder: Path, digest: Callable[[Path], str] = sha256) -> list[str]:
    """What identifies a source's content: ending and sha256 of each file, or the hub's own commit."""
    if source.path is None:
        return [f"{source.hub}@{source.revision}/{source.files}"]
    return [f"{path.suffix}:{digest(path)}" for path in files_of(source, folder)]


def read_source(
    source: DataSpec, folder: Path, normalise: Normaliser, limit: int | None = None, count: Count | None = None
) -> Iterator[Row]:
    """The rows of a source in order, normalised; see `read_lines`."""
    return (row for _, row in read_lines(source, folder, normalise, limit, count))


def read_lines(
    source: DataSpec, folder: Path, normalise: Normaliser, limit: int | None = None, count: Count | None = None
) -> Iterator[tuple[Line, Row]]:
    """The rows of a source in order, normalised, each with where it stands.

    Args:
        source: file or hub dataset.
        folder: what relative paths start from.
        normalise: one of the functions of `stages.rows`.
        limit: read this many rows of each file at most.
        count: is told what was read and what was left out; whoever uses the rows has to say so.

    Raises:
        InvalidInput: more bad rows than the source lets be left out (the first few by file and line, the rest
            counted), a file that breaks off, or no good row at all.
    """
    count = Count(source.label) if count is None else count
    broken = False
    for path in files_of(source, folder):
        count.files[str(path)] = 0
        for place, raw in _read_file(path, limit, count):
            count.rows += 1
            count.files[str(path)] += 1
            try:
                if isinstance(raw, BadRow):
                    raise raw
                row = normalise(_renamed(raw, source.columns))
            except BadRow as error:
                broken = broken or isinstance(error, BrokenFile)
                count.bad += 1
                if len(count.first) < SHOWN or isinstance(error, BrokenFile):
                    count.first.append(printable_line(f"{path}:{place}: {error}"))
                continue
            if source.on_bad_row == "drop" or not count.bad:
                yield Line(str(path), place), row
    if count.bad and (broken or count.bad > _allowed(source, count)):
        raise InvalidInput("\n".join([*count.first, _too_many(source, count, broken=broken)]))
    if not count.used:
        raise InvalidInput("\n".join([*count.first, f"{source.label}: no rows{_what_was_read(count)}"]))


def tell_what_was_left_out(count: Count) -> None:
    """A line in the log for every source of which rows were left out, with the first of them."""
    if count.bad:
        more = f"; and {count.bad - len(count.first)} more" if count.bad > len(count.first) else ""
        info(f"{count}; left out, as on_bad_row: drop allows: {'; '.join(count.first)}{more}")


def _allowed(source: DataSpec, count: Count) -> int:
    """How many bad rows are left out; of a sample, a share says nothing yet about the whole."""
    if source.on_bad_row == "drop" and count.sampled and isinstance(source.max_bad_rows, str):
        return count.rows
    return source.droppable(count.rows)


def _too_many(source: DataSpec, count: Count, *, broken: bool) -> str:
    of = f"of {'the first ' if count.sampled else ''}{count.rows} rows"
    shown = f" ({len(count.first)} of them shown)" if count.bad > len(count.first) else ""
    found = f"{source.label}: {count.bad} {of} cannot be used{shown}"
    if broken:
        return f"{found}, and what follows in a file that breaks off cannot be read: write that file anew"
    if source.on_bad_row == "drop":
        allowed = source.droppable(count.rows)
        return (
            f"{found}; max_bad_rows ({source.max_bad_rows}) lets {allowed} be left out: correct the rows, or raise it"
        )
    return f"{found}: correct them, or let them be left out (on_bad_row: drop)"


def _what_was_read(count: Count) -> str:
    if not count.rows:
        names = ", ".join(Path(name).name for name in count.files)
        return f"; {names} {'is' if len(count.files) == 1 else 'are'} empty: put rows in, or remove the source"
    return f" are left: all {count.rows} that were read cannot be used; correct them"


def _renamed(raw: Row, columns: dict[str, str]) -> Row:
    if not columns:
        return raw
    missing = [name for name in columns.values() if name not in raw]
    if missing:
        raise BadRow(f"no column {missing[0]!r} (named in columns); columns: {', '.join(raw)}")
    taken = set(columns.values())
    return {key: value for key, value in raw.items() if key not in taken} | {
        ours: raw[theirs] for ours, theirs in columns.items()
    }


def _read_file(path: Path, limit: int | None, count: Count) -> Iterator[tuple[str, Any]]:
    reader = _READERS.get(path.suffix)
    if reader is None:
        raise InvalidInput(f"{path}: cannot tell its format; allowed endings: {', '.join(FORMATS)}")
    for number, (place, row) in enumerate(reader(path)):
        if limit is not None and number >= limit:
            count.sampled = True
            return
        yield place, row


def _read_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield str(number), _json_row(line, "utf-8-sig" if number == 1 else "utf-8")


def _json_row(line: bytes, encoding: str) -> Row | BadRow:
    try:
        row = json.loads(line.decode(encoding))
    except UnicodeDecodeError as error:
        return BadRow(f"not UTF-8 (byte {error.start + 1} of the line){_other_format(line)}")
    except json.JSONDecodeError as error:
        return BadRow(f"not JSON: {error}{_other_format(line)}")
    except RecursionError:
        return BadRow("not JSON that can be read: nested too deeply")
    except ValueError:
        return BadRow(f"a number of more than {sys.get_int_max_str_digits()} digits")
    if isinstance(row, list):
        return BadRow("a list; expected an object: in JSON Lines each row is an object on a line of its own")
    return row if isinstance(row, dict) else BadRow(f"a {type(row).__name__}; expected an object")


def _other_format(line: bytes) -> str:
    """What a line that is no JSON seems to come from, and what to do about it."""
    if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return ": the file is UTF-16; save it as UTF-8"
    if line.startswith(b"\x1f\x8b"):
        return ": the file is compressed; unpack it with gunzip"
    if line.startswith(LFS_POINTER):
        return ": the file is a Git LFS pointer; fetch what it stands for with git lfs pull"
    if b"\0" in line:
        return ": it holds NUL bytes, as a file does whose writing broke off; write it anew"
    return ""


def _read_text(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        yield "1", {"text": path.read_text(encoding="utf-8-sig")}
    except UnicodeDecodeError as error:
        yield "1", BadRow(f"not UTF-8 (byte {error.start + 1} of the file)")


def _read_csv(path: Path) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(sys.maxsize)  # a document may be one cell
    with path.open("rb") as file:
        lines = _Decoded(file)
        reader = csv.DictReader(lines, strict=True)  # else a quote that is never closed swallows the rest
        try:
            for row in reader:
                extra = None in row or None in row.values()
                yield str(lines.number), BadRow(f"not {len(reader.fieldnames or ())} columns") if extra else row
        except UnicodeDecodeError as error:
            yield str(lines.number), BrokenFile(f"not UTF-8 (byte {error.start + 1} of the line)")
        except csv.Error as error:
            yield str(lines.number), BrokenFile(f"not CSV: {error}")


class _Decoded:
    """Lines of a binary file as text, counted, without the byte order mark that Excel writes."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.number = 0

    def __iter__(self) -> Iterator[str]:
        for line in self._file:
            self.number += 1
            yield line.decode("utf-8-sig" if self.number == 1 else "utf-8")


def _read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(1000):
                for row in batch.to_pylist():
                    number += 1
                    yield str(number), row
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        yield str(number + 1), BrokenFile(f"not a Parquet file: {error}")


_READERS = {".jsonl": _read_jsonl, ".txt": _read_text, ".csv": _read_csv, ".parquet": _read_parquet}
