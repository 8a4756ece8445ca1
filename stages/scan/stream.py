"""One stored matrix in blocks of float32, so that memory stays near one block.

The file is mapped, and pages that were read are let go after every block: they stay in the system's cache, not in
this process.
"""

import hashlib
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stages.errors import InvalidInput
from stages.layout import Matrix, Part, Tensor

BLOCK = 8 * 1024 * 1024
"""Numbers in a block: 32 MB of float32."""
_STORED: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
}

Raw = NDArray[Any]


class Source:
    """A matrix of a file: its bytes' hash, and its values block by block. Open one with `source`."""

    def __init__(self, raw: Raw, mapped: mmap.mmap, *, bfloat16: bool, part: Part | None) -> None:
        self._raw, self._mapped, self._bfloat16 = raw, mapped, bfloat16
        self._view = _part(raw, part)
        self._widened: NDArray[np.uint32] = np.empty(0, dtype=np.uint32)

    @property
    def side(self) -> int:
        """The smaller side."""
        groups, rows, columns = self._view.shape
        return int(min(groups * rows, columns))

    def sha256(self) -> str:
        """Hash of the stored bytes; of all of a fused tensor, whichever part this is."""
        digest = hashlib.sha256(self._raw.data)
        self._let_go()
        return digest.hexdigest()

    def blocks(self) -> Iterator[NDArray[np.float32]]:
        """The matrix, or its transpose where that is the taller one: blocks of shape (any, side).

        A block may lie where the one before lay.
        """
        groups, rows, columns = view = self._view.shape
        if groups * rows < columns:
            step = max(1, BLOCK // (groups * rows))
            for start in range(0, columns, step):
                yield self._floats(self._view[:, :, start : start + step].reshape(groups * rows, -1)).T
                self._let_go()
            return
        step = max(1, BLOCK // columns)
        for group in range(0, groups, max(1, step // view[1])):
            for row in range(0, rows, step):
                some = self._view[group : group + max(1, step // view[1]), row : row + step]
                yield self._floats(some.reshape(-1, columns))
                self._let_go()

    def _floats(self, raw: Raw) -> NDArray[np.float32]:
        if self._bfloat16:  # the upper half of a float32
            if self._widened.size < raw.size:
                self._widened = np.empty(raw.size, dtype=np.uint32)
            # One place for all blocks: fresh memory costs more than the shift.
            wide = self._widened[: raw.size].reshape(raw.shape)
            return np.left_shift(raw, 16, out=wide, dtype=np.uint32).view(np.float32)
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes inf, and inf is refused
            return raw.astype(np.float32, copy=False)

    def _let_go(self) -> None:
        if hasattr(self._mapped, "madvise"):  # not on Windows
            self._mapped.madvise(mmap.MADV_DONTNEED)


@contextmanager
def source(tensor: Tensor, matrix: Matrix) -> Iterator[Source]:
    """Open the matrix for reading.

    Raises:
        InvalidInput: stored in a type that is not a plain float, or in more bytes than its shape explains.
    """
    kind = _STORED.get(tensor.dtype)
    if kind is None:
        raise InvalidInput(
            f"{tensor.file}: {tensor.name} is stored as {tensor.dtype}; Spectrum scans {', '.join(_STORED)}: "
            "start from weights that are not quantised"
        )
    shape = tensor.shape[-2:]
    size = prod(shape) * kind.itemsize
    start = tensor.start + (matrix.index or 0) * size
    if tensor.start + prod(tensor.shape) * kind.itemsize != tensor.stop:
        raise InvalidInput(f"{tensor.file}: {tensor.name} has another size than its shape {tensor.shape} says")
    before = start % mmap.ALLOCATIONGRANULARITY
    with tensor.file.open("rb") as stream:
        mapped = mmap.mmap(stream.fileno(), size + before, access=mmap.ACCESS_READ, offset=start - before)
    raw = np.frombuffer(mapped, kind, count=prod(shape), offset=before).reshape(shape)
    # Not closed here: views may live on for a moment, and the last one closes it.
    yield Source(raw, mapped, bfloat16=tensor.dtype == "BF16", part=matrix.part)


def _part(raw: Raw, part: Part | None) -> Raw:
    """A view of shape (groups, rows, columns); of the transpose for a part of the columns, which has the same spectrum.

    Splitting an axis never copies.
    """
    if part is None:
        return raw[None]
    along = raw if part.axis == 0 else raw.T
    return along.reshape(part.groups, -1, along.shape[1])[:, part.start : part.stop]
