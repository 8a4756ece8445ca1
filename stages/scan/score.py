"""Both scores of a matrix, from its singular values.

``reference`` is that of the Spectrum authors' code (QuixiAI/spectrum; Hartford et al., arXiv 2406.06623), which differs
from the paper's text: noise scale = interquartile range / 1.349, edge without the factor sqrt(n), and the ratio is
divided by the largest singular value. For rectangular matrices that edge lies below the bulk of pure noise: the score
falls as signal grows, and changes when the matrix is scaled.

``marchenko_pastur`` takes the scale from the median of the noise law (Gavish and Donoho, "The optimal hard threshold
for singular values is 4/sqrt(3)", 2014) and the textbook edge of the bulk. It is near 0 on noise, grows with the
signal, and does not change under scaling or transposition.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

GAUSSIAN_IQR = 1.349
"""Interquartile range of a standard normal distribution, as the reference writes it."""
FLOOR = 1e-6
"""Smallest noise that a Marchenko-Pastur score divides by, as a share of the signal: no score is infinite."""

Kind = Literal["reference", "marchenko_pastur"]


@dataclass(frozen=True, slots=True)
class Scores:
    """What is kept of a spectrum."""

    snr: float
    """The reference score."""
    snr_mp: float
    """The Marchenko-Pastur score."""
    noise: int
    """Singular values at or below the reference's edge."""
    noise_mp: int
    """Singular values at or below the Marchenko-Pastur edge."""
    values: int
    """Singular values in all: the smaller side."""


def scores(values: NDArray[np.float64], shape: tuple[int, int]) -> Scores:
    """Both scores of a matrix of this shape from its singular values, largest first."""
    beta = min(shape) / max(shape)
    quartiles = np.quantile(values, [0.25, 0.75])
    edge = float(quartiles[1] - quartiles[0]) / GAUSSIAN_IQR * (1 + beta**0.5)
    edge_mp = float(np.median(values)) / noise_median(beta) * (1 + beta**0.5)
    signal, noise = _sums(values, edge)
    signal_mp, noise_mp = _sums(values, edge_mp)
    largest = float(values[0])
    return Scores(
        snr=signal / (noise or 1.0) / largest if largest > 0 else 0.0,
        snr_mp=signal_mp / max(noise_mp, FLOOR * signal_mp) if signal_mp > 0 else 0.0,
        noise=int((values <= edge).sum()),
        noise_mp=int((values <= edge_mp).sum()),
        values=len(values),
    )


@lru_cache(maxsize=256)
def noise_median(beta: float) -> float:
    """The median singular value of noise: an (n, beta n) matrix of independent entries of variance 1 / n.

    The Marchenko-Pastur law of the squares, x = 1 + beta - 2 sqrt(beta) cos t for t from 0 to pi, has the density
    2 sin(t)^2 / (pi x) in t, which is smooth; it is integrated on a grid.
    """
    t = np.linspace(0.0, np.pi, 20001)[1:]
    x = 1 + beta - 2 * beta**0.5 * np.cos(t)
    mass = np.cumsum(2 * np.sin(t) ** 2 / (np.pi * x))
    return float(np.interp(mass[-1] / 2, mass, x) ** 0.5)


def _sums(values: NDArray[np.float64], edge: float) -> tuple[float, float]:
    above = values > edge
    return float(values[above].sum()), float(values[~above].sum())
