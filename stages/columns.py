"""Token ids and labels as a dataset, eight bytes a number: as lists of Python they take five times as much."""

from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset

CHUNK = 1000
"""Rows that are turned into columns at once."""


class TokenColumns:
    """The columns `input_ids` and `labels`, row by row."""

    def __init__(self) -> None:
        self._ids: list[Sequence[int]] = []
        self._labels: list[Sequence[int]] = []
        self._chunks: list[tuple[pyarrow.Array, pyarrow.Array]] = []

    def add(self, ids: Sequence[int], labels: Sequence[int]) -> None:
        """Add a row; where every token is learned, ``labels`` is ``ids`` itself and takes no memory of its own."""
        self._ids.append(ids)
        self._labels.append(labels)
        if len(self._ids) == CHUNK:
            self._close()

    def dataset(self) -> "Dataset":
        """All rows that were added, in order."""
        import pyarrow
        from datasets import Dataset

        self._close()
        lists = pyarrow.list_(pyarrow.int64())
        columns = [pyarrow.chunked_array([chunk[n] for chunk in self._chunks], lists) for n in (0, 1)]
        return Dataset(pyarrow.table(columns, names=["input_ids", "labels"]))

    def _close(self) -> None:
        ids = _column(self._ids)
        same = all(one is other for one, other in zip(self._ids, self._labels, strict=True))
        self._chunks.append((ids, ids if same else _column(self._labels)))
        self._ids, self._labels = [], []


def _column(rows: Sequence[Sequence[int]]) -> "pyarrow.Array":
    import numpy
    import pyarrow

    numbers = numpy.fromiter(chain.from_iterable(rows), numpy.int64)
    ends = numpy.cumsum([0, *map(len, rows)], dtype=numpy.int32)
    return pyarrow.ListArray.from_arrays(pyarrow.array(ends), pyarrow.array(numbers))
