"""Rows from files, checked as they are read: every complaint names file and line."""

import csv
import json
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from specs.data import FORMATS, DataSpec
from stages.artifact import sha256
from stages.errors import InvalidInput
from stages.rows import BadRow, Row

Normaliser = Callable[[Row], Row]
SHOWN = 5
"""Bad rows named in one message; the rest is counted."""


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
    if not path.exists():
        raise InvalidInput(f"{path}: no such file")
    if not path.is_file():
        raise InvalidInput(f"{path}: not a regular file")
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


def read_source(source: DataSpec, folder: Path, normalise: Normaliser, limit: int | None = None) -> Iterator[Row]:
    """The rows of a source in order, normalised.

    Args:
        source: file or hub dataset.
        folder: what relative paths start from.
        normalise: one of the functions of `stages.rows`.
        limit: read this many rows of each file at most.

    Raises:
        InvalidInput: bad rows (the first few by file and line, the rest counted), or no rows at all.
    """
    bad: list[str] = []
    number_of_bad = 0
    good = 0
    for path in files_of(source, folder):
        for place, raw in _read_file(path, limit):
            try:
                if isinstance(raw, BadRow):
                    raise raw
                row = normalise(_renamed(raw, source.columns))
            except BadRow as error:
                number_of_bad += 1
                if len(bad) < SHOWN:
                    bad.append(f"{path}:{place}: {error}")
                continue
            good += 1
            if not bad:
                yield row
    if bad:
        more = f"\n... and {number_of_bad - len(bad)} more bad rows" if number_of_bad > len(bad) else ""
        raise InvalidInput("\n".join(bad) + more)
    if not good:
        raise InvalidInput(f"{source.label}: no rows")


def mixed(sources: Sequence[DataSpec], folder: Path, normalise: Normaliser, seed: int) -> list[Row]:
    """All rows of all sources by their weights, in one seeded order.

    A weight of 2.5 takes each row twice and a seeded half of them once more.
    """
    rows: list[Row] = []
    for number, source in enumerate(sources):
        own = list(read_source(source, folder, normalise))
        order = random.Random(f"{seed}/{number}")  # noqa: S311 - sampling, not secrets
        whole, part = divmod(source.weight, 1)
        rows += own * int(whole)
        rows += order.sample(own, round(part * len(own)))
    if not rows:
        names = ", ".join(source.label for source in sources)
        raise InvalidInput(f"{names}: no rows are left after weighting; raise the weights")
    random.Random(seed).shuffle(rows)  # noqa: S311
    return rows


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


def _read_file(path: Path, limit: int | None) -> Iterator[tuple[str, Any]]:
    reader = _READERS.get(path.suffix)
    if reader is None:
        raise InvalidInput(f"{path}: cannot tell its format; allowed endings: {', '.join(FORMATS)}")
    for number, (place, row) in enumerate(reader(path)):
        if limit is not None and number >= limit:
            return
        yield place, row


def _read_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield str(number), _json_row(line)


def _json_row(line: bytes) -> Row | BadRow:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return BadRow(f"not UTF-8 (byte {error.start + 1} of the line)")
    except (ValueError, RecursionError) as error:
        return BadRow(f"not JSON: {error}")
    return row if isinstance(row, dict) else BadRow(f"a {type(row).__name__}; expected an object")


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
            yield str(lines.number), BadRow(f"not UTF-8 (byte {error.start + 1} of the line)")
        except csv.Error as error:
            yield str(lines.number), BadRow(f"not CSV: {error}")


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

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(1000):
                for row in batch.to_pylist():
                    number += 1
                    yield str(number), row
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        yield "1", BadRow(f"not a Parquet file: {error}")


_READERS = {".jsonl": _read_jsonl, ".txt": _read_text, ".csv": _read_csv, ".parquet": _read_parquet}
