"""Sources of rows as a spec names them, read and refused; texts to fill them with."""

import random
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from specs.data import DataSpec
from stages.data import read_source
from stages.errors import InvalidInput
from stages.rows import text_row


def source(path: str, **fields) -> DataSpec:
    return DataSpec.model_validate({"path": path} | fields)


def words(seed: int, count: int = 40) -> str:
    """Words that no other seed has in this order."""
    pick = random.Random(seed)
    return " ".join(f"w{pick.randrange(5000)}" for _ in range(count))


def texts(found) -> list[str]:
    return [row["text"] for row in found]


def read(folder: Path, path: str, normalise=text_row, **fields):
    return list(read_source(source(path, **fields), folder, normalise))


def refusal(folder: Path, path: str, normalise=text_row, **fields) -> str:
    with pytest.raises(InvalidInput) as caught:
        read(folder, path, normalise, **fields)
    return str(caught.value)


def complaints(folder: Path, path: str, normalise=text_row, **fields) -> list[str]:
    """What is said of single rows; the last line, which counts and says what to do, left out."""
    *lines, last = refusal(folder, path, normalise, **fields).split("\n")
    assert last.startswith(f"{path}: ")
    return lines


def complaint(folder: Path, path: str, normalise=text_row, **fields) -> str:
    (only,) = complaints(folder, path, normalise, **fields)
    return only


def write_parquet(file: Path, columns: dict) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), file)
    return file
