"""One matrix before and after training: how large the update is, how many directions it has, what is new in it."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

TOP, EPSILON = 10, 0.5
"""Of the tuned matrix, so many leading singular vectors are looked at; one is an intruder if its cosine with every
singular vector of the start is below epsilon (Shuttleworth et al. 2024, arXiv:2410.21228, algorithm 1)."""
EXACT = 1024
"""Up to this smaller side all singular values of an update are computed; above it the leading ones."""
LEADING = 48
"""How many of them."""
KEPT = 16
"""How many of them are kept for people."""
SETTLED = 1024
"""Smaller side up to which all singular vectors of the start are computed where the leading ones leave a doubt."""
_ROUNDING = 2.0**-24
"""Half a step of float32, relative: what the sum of start and update was rounded by."""
_DIGITS = 1e-7
"""What float32 can tell apart, relative."""
_PARTED = 0.05
"""Residual, as a share of the squared singular value, below which a vector counts as found."""


@dataclass(frozen=True, slots=True)
class Spectrum:
    """What the singular values of an update say."""

    values: tuple[float, ...]
    """The leading singular values, largest first."""
    stable_rank: float
    """Squared Frobenius norm over squared spectral norm."""
    effective_rank: float
    """exp of the entropy of the singular values as shares of their sum (Roy and Vetterli 2007)."""
    estimated: bool
    """Whether the tail was not computed, but taken as flat."""


def spectrum(update: "torch.Tensor", rounding: float) -> Spectrum:
    """The singular values of an update that is not zero.

    Args:
        update: of shape (rows, columns), float32.
        rounding: a singular value below this is what rounding left, and counts as zero.
    """
    import torch

    energy = float(torch.linalg.vector_norm(update, dtype=torch.float64)) ** 2
    side = min(update.shape)
    if side <= EXACT:
        found = _all_values(update)
        tail = 0
    else:
        found = _leading(update, LEADING)[1].double()
        tail = side - len(found)
    floor = max(rounding, _DIGITS * float(found[0]))
    kept = found[found > floor] if bool(found[0] > floor) else found[:1]
    values = [float(value) for value in kept]
    rest = max(0.0, energy - sum(value * value for value in values))
    flat = math.sqrt(rest / tail) if tail else 0.0
    # What was not computed can be no larger than the smallest that was, and below rounding it is noise.
    count = tail if flat > floor and len(kept) == len(found) else 0
    total = sum(values) + count * flat
    shares = [value / total for value in values]
    entropy = -sum(share * math.log(share) for share in shares)
    if count:
        entropy -= count * (flat / total) * math.log(flat / total)
    return Spectrum(tuple(values[:KEPT]), energy / values[0] ** 2, math.exp(entropy), estimated=bool(count))


def rounding_of(after: "torch.Tensor") -> float:
    """The largest singular value that rounding a matrix to float32 can be expected to leave.

    A random matrix with entries of standard deviation s has a spectral norm of s (sqrt(rows) + sqrt(columns)).
    """
    import torch

    rows, columns = after.shape
    size = float(torch.linalg.vector_norm(after, dtype=torch.float64)) / math.sqrt(rows * columns)
    return _ROUNDING * size * (math.sqrt(rows) + math.sqrt(columns))


def intruders(before: "torch.Tensor", after: "torch.Tensor") -> int | None:
    """How many of the leading left singular vectors of ``after`` are like none of ``before``.

    The leading vectors of the start answer for most: one that is like them is no intruder, and one that lies so far
    within their span that no room for another match is left is one. Only where a doubt stays are all vectors
    computed.

    Args:
        before: the start's matrix, of shape (rows, columns), rows being outputs.
        after: the tuned one, of the same shape.

    Returns:
        A number up to `TOP`; None where a doubt stays and the matrix is too large to settle it.
    """
    import torch

    top = min(TOP, *after.shape)
    tuned, near = _converged(after, top), _converged(before, 2 * top)
    if tuned is not None and near is not None:
        cosines = (near.T @ tuned).abs()
        unlike = cosines.max(dim=0).values < EPSILON
        room = 1 - cosines[:, unlike].square().sum(dim=0)  # Bessel: squared cosines with one vector add up to 1 at most
        if bool((room < EPSILON**2).all()):
            return int(unlike.sum())
        tuned = tuned[:, unlike]
    if min(before.shape) > SETTLED:
        return None
    if tuned is None:
        tuned = torch.linalg.svd(after, full_matrices=False)[0][:, :top]
    every = torch.linalg.svd(before, full_matrices=False)[0]
    return int(((every.T @ tuned).abs().max(dim=0).values < EPSILON).sum())


def _all_values(matrix: "torch.Tensor") -> "torch.Tensor":
    """All singular values in float64, largest first: from the Gram matrix, whose error is far below float32's."""
    import torch

    wide = matrix.double() if matrix.shape[0] <= matrix.shape[1] else matrix.double().T
    eigenvalues: torch.Tensor = torch.linalg.eigvalsh(wide @ wide.T)
    return eigenvalues.clamp(min=0).sqrt().flip(0)


def _converged(matrix: "torch.Tensor", count: int) -> "torch.Tensor | None":
    """The leading left singular vectors, or None where they lie too close together for the iteration to part them."""
    for passes in (4, 16):
        left, values = _leading(matrix, count, passes)
        again = matrix @ (matrix.T @ left)
        error = (again - left * values.square()).norm(dim=0) / values.square().clamp(min=1e-30)
        if bool((error < _PARTED).all()):
            return left
    return None


def _leading(matrix: "torch.Tensor", count: int, passes: int = 4) -> tuple["torch.Tensor", "torch.Tensor"]:
    """Left singular vectors, of shape (rows, count), and their values: Halko, Martinsson, Tropp 2011, algorithm 5.1.

    Drawn from a seed of its own: no draw of the training's is used up.
    """
    import torch

    drawn = count + 14
    if 2 * drawn >= min(matrix.shape):
        left, values, _ = torch.linalg.svd(matrix, full_matrices=False)
        return left[:, :count], values[:count]
    devices = [matrix.device] if matrix.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(0)
        left, values, _ = torch.svd_lowrank(matrix, q=drawn, niter=passes)
    return left[:, :count], values[:count]
