"""Singular vectors with fixed signs, and which entries of a matrix between them train."""

import zlib
from typing import NamedTuple

import torch

EXACT_SIDE = 1024
"""Up to this smaller side a weight is decomposed in float64: seconds, and the same bits wherever it is repeated."""


class Factors(NamedTuple):
    """W = U diag(S) Vh with k = min(out, in) or fewer singular values, the largest first; float32."""

    left: torch.Tensor
    """U, (out, k)."""
    values: torch.Tensor
    """S, (k,)."""
    right: torch.Tensor
    """Vh, (k, in)."""


def singular_factors(weight: torch.Tensor, rank: int | None = None) -> Factors:
    """The singular value decomposition of a weight.

    A decomposition is unique up to the signs of its pairs of vectors, and trained values between two different pairs
    mean another update when one of them flips: each left vector's largest component is made positive.

    Args:
        weight: (out, in); on the meta device only shapes come out.
        rank: keep the largest so many.
    """
    rows, columns = weight.shape
    kept = min(rows, columns) if rank is None else min(rank, rows, columns)
    if weight.is_meta:
        return Factors(*(weight.new_empty(shape, dtype=torch.float32) for shape in _shapes(rows, columns, kept)))
    wide = torch.float64 if min(rows, columns) <= EXACT_SIDE else torch.float32
    matrix = weight.detach().to(wide)
    # LAPACK is several times slower on wide matrices.
    if rows >= columns:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    else:
        right_t, values, left_t = torch.linalg.svd(matrix.T, full_matrices=False)
        left, right = left_t.T, right_t.T
    left, right = left[:, :kept], right[:kept]
    peaks = left.gather(0, left.abs().argmax(dim=0, keepdim=True))
    signs = torch.where(peaks < 0, -1.0, 1.0).to(wide)
    found = (left * signs, values[:kept], right * signs.T)
    return Factors(*(factor.to(torch.float32).contiguous() for factor in found))


def unread_factors(weight: torch.Tensor, rank: int | None = None) -> Factors:
    """Places for factors that a file holds: nan until they are read, so that forgetting to do so shows."""
    rows, columns = weight.shape
    kept = min(rows, columns) if rank is None else min(rank, rows, columns)
    return Factors(*(weight.new_full(shape, torch.nan, dtype=torch.float32) for shape in _shapes(rows, columns, kept)))


def _shapes(rows: int, columns: int, kept: int) -> tuple[tuple[int, ...], ...]:
    return (rows, kept), (kept,), (kept, columns)


def entries(side: int, width: int) -> int:
    """How many entries of a square matrix lie within ``width`` off-diagonals on each side of the diagonal."""
    width = min(width, side - 1)
    return side * (2 * width + 1) - width * (width + 1)


def trained_entries(pattern: str, width: int, factors: Factors, seed: int, name: str) -> torch.Tensor:
    """The entries that train of the matrix M between the singular vectors, ascending: row * k + column.

    Banded takes those near the diagonal. Random draws as many without replacement (the authors' code draws with
    replacement and trains some twice). Top-k takes as many with the largest overlap u_i . v_j by magnitude (the
    authors' code goes by the signed value, though signs are arbitrary); where out and in differ, the overlap is over
    the coordinates that both have.

    Args:
        pattern: banded, random or top_k.
        width: off-diagonals on each side of banded.
        factors: those of the weight.
        seed: of the adapter.
        name: of the layer; together with the seed it decides a random pattern.
    """
    side = factors.values.shape[0]
    count = entries(side, width)
    device = factors.left.device
    if device.type == "meta":
        return torch.empty(count, dtype=torch.int64, device=device)
    if pattern == "banded":
        distance = torch.arange(side)[:, None] - torch.arange(side)[None]
        found = (distance.abs() <= width).flatten().nonzero().squeeze(1)
    elif pattern == "random":
        generator = torch.Generator().manual_seed(seed ^ zlib.crc32(name.encode()))
        found = torch.randperm(side * side, generator=generator)[:count]
    else:
        shared = min(factors.left.shape[0], factors.right.shape[1])
        overlap = factors.left[:shared].T @ factors.right[:, :shared].T
        found = overlap.abs().flatten().topk(count).indices
    return found.sort().values.to(device)
