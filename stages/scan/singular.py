"""All singular values of a matrix that is seen block by block, through the Gram matrix of its smaller side.

The Gram matrix costs half the flops of a product (``ssyrk``), its eigenvalues a fraction of an SVD, and a wide matrix
no more than a tall one. What makes float32 enough: the diagonal is summed in float64, because ``ssyrk`` is biased
there; and the tridiagonal stage runs in float64, because in float32 it alone would cost 2e-5 of the largest eigenvalue.
Large Gram matrices are reduced to a band first: that is all matrix products, where LAPACK's ``ssytrd`` spends half
its time waiting for memory (Bischof, Lang, Sun, "A framework for symmetric band reduction", 2000).
"""

import ctypes
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import blas, cython_blas, lapack

DENSE = 2048
"""Gram matrices up to this size are made tridiagonal at once."""
BAND = 48
"""Width of the band that larger ones are reduced to."""
_SAFE = (1e-20, 1e30)
"""Between these, as the largest squared norm of a column, float32 neither overflows nor loses digits."""

Matrix = NDArray[np.float32]
Vector = NDArray[np.float64]


def singular_values(blocks: Callable[[], Iterable[Matrix]], side: int) -> Vector | None:
    """The singular values of a matrix, largest first.

    Args:
        blocks: gives the matrix anew on each call, as blocks of rows of shape (any, side); the rows may come in any
            order, and a wide matrix comes as its transpose. Memory of a block is not kept.
        side: the smaller side of the matrix.

    Returns:
        ``side`` values, or None where the matrix holds inf or nan.
    """
    scale = 1.0
    gram, diagonal = _gram(blocks(), side, scale)
    if not (np.isfinite(diagonal).all() and _SAFE[0] < diagonal.max() < _SAFE[1]):
        largest = float(np.max([np.abs(block).max() for block in blocks()]))  # nan stays nan
        if not np.isfinite(largest):
            return None
        if largest == 0.0:
            return np.zeros(side)
        scale = 2.0 ** -np.floor(np.log2(largest))  # a power of two: no digit changes
        gram, diagonal = _gram(blocks(), side, scale)
    np.fill_diagonal(gram, diagonal)
    eigenvalues = _dense(gram) if side <= DENSE else _banded(gram)
    return np.asarray(np.sqrt(np.maximum(eigenvalues, 0.0))[::-1] / scale)


def _gram(blocks: Iterable[Matrix], side: int, scale: float) -> tuple[Matrix, Vector]:
    """The lower triangle of the Gram matrix in float32, and its diagonal in float64."""
    gram = np.zeros((side, side), dtype=np.float32, order="F")
    diagonal = np.zeros(side)
    for block in blocks:
        rows = block if scale == 1.0 else (block * scale).astype(np.float32)
        for start in range(0, len(rows), 256):  # few rows at a time: their squares stay in the processor's cache
            with np.errstate(over="ignore", under="ignore", invalid="ignore"):  # seen by the caller
                diagonal += np.square(rows[start : start + 256]).sum(axis=0, dtype=np.float64)
        # Whichever way the block lies in memory, BLAS takes it as it is.
        across = rows.flags.c_contiguous
        gram = blas.ssyrk(1.0, rows.T if across else rows, 1.0, gram, trans=not across, lower=1, overwrite_c=1)
    return gram, diagonal


def _dense(gram: Matrix) -> Vector:
    """Eigenvalues in ascending order, for small matrices: tridiagonal in float32, the rest in float64."""
    if len(gram) == 1:
        return np.asarray(gram[0], dtype=np.float64)
    work = int(lapack.ssytrd_lwork(len(gram), lower=1)[0])
    _, diagonal, beside, _, info = lapack.ssytrd(gram, lower=1, lwork=work, overwrite_a=1)
    values, failed = lapack.dsterf(diagonal.astype(np.float64), beside.astype(np.float64))
    return _checked(values, info or failed)


def _banded(gram: Matrix) -> Vector:
    """Eigenvalues in ascending order, for large matrices: a band in float32, the rest in float64."""
    size = len(gram)
    for start in range(0, size - BAND - 1, BAND):
        _clear_below_band(gram, start)
    band = np.zeros((BAND + 1, size), order="F")
    for below in range(min(BAND + 1, size)):
        band[below, : size - below] = np.diagonal(gram, -below)
    values, _, info = lapack.dsbevd(band, compute_v=0, lower=1, overwrite_ab=1)
    return _checked(values, info)


def _clear_below_band(a: Matrix, start: int) -> None:
    """One step: reflect the columns ``start`` to ``start + BAND`` onto the band, and the rest of the matrix along.

    With the panel's QR factorisation Q = I - V T V', the rest becomes Q' A Q = A - V W' - W V'.
    """
    size, below = len(a), start + BAND
    panel, tau, _, info = lapack.sgeqrf(a[below:, start:below])
    _checked(tau, info)
    width = len(tau)
    a[below : below + width, start:below] = np.triu(panel[:width])
    v = np.asfortranarray(np.tril(panel[:, :width], -1))
    np.fill_diagonal(v, 1.0)
    t = _triangular_factor(v, tau)
    product = _symmetric_times(a, below, v)
    w = product @ t
    w -= v @ (0.5 * (t.T @ (v.T @ w)))
    _subtract_both(a, below, v, np.asfortranarray(w))
    a[below + width : size, start:below] = 0


def _triangular_factor(v: Matrix, tau: Matrix) -> Matrix:
    """T of the compact form I - V T V' of a product of reflections (LAPACK's ``slarft``)."""
    inner = v.T @ v
    t = np.zeros((len(tau), len(tau)), dtype=np.float32)
    for column, factor in enumerate(tau):
        t[:column, column] = -factor * (t[:column, :column] @ inner[:column, column])
        t[column, column] = factor
    return t


def _symmetric_times(a: Matrix, start: int, v: Matrix) -> Matrix:
    """``a[start:, start:] @ v`` for a symmetric matrix of which the lower triangle is kept."""
    rows, columns = v.shape
    out = np.empty((rows, columns), dtype=np.float32, order="F")
    _call(
        "ssymm", b"L", b"L", rows, columns, 1.0, _corner(a, start), len(a), v.ctypes.data, rows, 0.0,
        out.ctypes.data, rows,
    )  # fmt: skip
    return out


def _subtract_both(a: Matrix, start: int, v: Matrix, w: Matrix) -> None:
    """``a[start:, start:] -= v @ w.T + w @ v.T``, in the lower triangle."""
    rows, columns = v.shape
    _call(
        "ssyr2k", b"L", b"N", rows, columns, -1.0, v.ctypes.data, rows, w.ctypes.data, rows, 1.0,
        _corner(a, start), len(a),
    )  # fmt: skip


def _corner(a: Matrix, start: int) -> int:
    """Address of ``a[start, start]``: numpy's own wrappers of BLAS would copy a submatrix in and out."""
    return int(a[start:, start:].ctypes.data)


def _call(name: str, *arguments: bytes | int | float) -> None:
    """Call BLAS in Fortran's way, everything by reference; an int is a size or an address by its place."""
    kept: list[Any] = []
    for place, value in enumerate(arguments):
        if isinstance(value, bytes):
            kept.append(ctypes.c_char_p(value))
        elif isinstance(value, float):
            kept.append(ctypes.byref(ctypes.c_float(value)))
        elif place in _ADDRESSES:
            kept.append(ctypes.c_void_p(value))
        else:
            kept.append(ctypes.byref(ctypes.c_int(value)))
    _routine(name)(*kept)


_ADDRESSES = (5, 7, 10)
"""Where ssymm and ssyr2k alike take matrices."""


@cache
def _routine(name: str) -> Callable[..., None]:
    """One of the BLAS routines that scipy offers to Cython code, made callable from here."""
    capsule = cython_blas.__pyx_capi__[name]
    get_name, get_pointer = ctypes.pythonapi.PyCapsule_GetName, ctypes.pythonapi.PyCapsule_GetPointer
    get_name.restype, get_name.argtypes = ctypes.c_char_p, [ctypes.py_object]
    get_pointer.restype, get_pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    return ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 12)(get_pointer(capsule, get_name(capsule)))


def _checked(values: NDArray[Any], info: int) -> NDArray[Any]:
    if info != 0:
        raise ArithmeticError(f"LAPACK gave up on the eigenvalues of a Gram matrix of size {len(values)} ({info})")
    return values
