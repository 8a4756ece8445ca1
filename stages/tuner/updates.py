"""The forms that the update dW of a frozen weight W (out, in) can take; every one is zero before it is trained."""

import math
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional

from stages.tuner.config import UpdateConfig
from stages.tuner.factors import Factors, singular_factors, trained_entries, unread_factors


class Update(nn.Module, ABC):
    """dW as a function of trained parameters, which are float32 whatever the weight is held in."""

    frozen: ClassVar[tuple[str, ...]] = ()
    """Names of the buffers that trained values belong to."""
    tied: ClassVar[tuple[str, ...]] = ()
    """Names of the parameters that layers of one type and shape share."""

    @abstractmethod
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Apply dW to the last dimension of ``inputs`` (..., in): (..., out)."""

    @abstractmethod
    def delta(self) -> torch.Tensor:
        """The update, (out, in)."""


class SpectralUpdate(Update):
    """dW = U C Vh, with the singular vectors of W and a trained C (k, k)."""

    frozen: ClassVar[tuple[str, ...]] = ("left", "values", "right")

    def __init__(self, factors: Factors) -> None:
        super().__init__()
        for name, factor in factors._asdict().items():
            self.register_buffer(name, factor)

    left: torch.Tensor
    values: torch.Tensor
    right: torch.Tensor

    @abstractmethod
    def core(self, hidden: torch.Tensor) -> torch.Tensor:
        """C applied to the last dimension of ``hidden`` (..., k)."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Apply dW to the last dimension of ``inputs`` (..., in), through its factors: (..., out)."""
        return functional.linear(self.core(functional.linear(inputs, self.right)), self.left)

    def delta(self) -> torch.Tensor:
        """The update, (out, in)."""
        return self.left @ self.core(self.right.T).T


class Svf(SpectralUpdate):
    """Singular value fine-tuning (Sun et al., arXiv 2206.06122, eq. 5; z as in Transformer², arXiv 2501.06252).

    W' = U diag(S z) Vh, written as W + U diag(S (z - 1)) Vh and trained as ``change`` = z - 1: recomposing W would
    move it by rounding, a z near 1 cannot hold a small step, and weight decay pulls towards the start.
    """

    def __init__(self, factors: Factors) -> None:
        super().__init__(factors)
        self.change = nn.Parameter(torch.zeros_like(factors.values))

    def core(self, hidden: torch.Tensor) -> torch.Tensor:
        """C = diag(S (z - 1)), applied to ``hidden`` (..., k)."""
        return hidden * (self.values * self.change)


class SvftPlain(SpectralUpdate):
    """SVFT with a diagonal M (Lingam et al., arXiv 2405.19597, section 3): W' = U (S + M) Vh, M = 0 at the start."""

    def __init__(self, factors: Factors) -> None:
        super().__init__(factors)
        self.entries = nn.Parameter(torch.zeros_like(factors.values))

    def core(self, hidden: torch.Tensor) -> torch.Tensor:
        """C = M, a diagonal, applied to ``hidden`` (..., k)."""
        return hidden * self.entries


class SvftSparse(SpectralUpdate):
    """SVFT with a sparse M: W' = U (S + M) Vh (Lingam et al., arXiv 2405.19597, section 3)."""

    frozen: ClassVar[tuple[str, ...]] = (*SpectralUpdate.frozen, "positions")
    positions: torch.Tensor

    def __init__(self, factors: Factors, positions: torch.Tensor) -> None:
        super().__init__(factors)
        self.register_buffer("positions", positions)
        self.entries = nn.Parameter(torch.zeros(len(positions), device=positions.device))

    def core(self, hidden: torch.Tensor) -> torch.Tensor:
        """C = M, sparse, applied to ``hidden`` (..., k)."""
        side = len(self.values)
        # Dense, k x k, and kept for the backward pass: its gradient needs no atomic additions.
        matrix = self.entries.new_zeros(side * side).index_put((self.positions,), self.entries)
        return functional.linear(hidden, matrix.view(side, side))


class LoraXs(SpectralUpdate):
    """LoRA-XS (Bałazy et al., arXiv 2405.17604, eq. 2): dW = U_r S_r R Vh_r, R (r, r) zero at the start.

    The authors draw R from a normal of 1e-5, which moves the start.
    """

    def __init__(self, factors: Factors) -> None:
        super().__init__(factors)
        rank = len(factors.values)
        self.middle = nn.Parameter(factors.values.new_zeros(rank, rank))

    def core(self, hidden: torch.Tensor) -> torch.Tensor:
        """C = S_r R, applied to ``hidden`` (..., k)."""
        return functional.linear(hidden, self.middle) * self.values


class TiedLora(Update):
    """Tied-LoRA (Renduchintala et al., arXiv 2311.09578): dW_l = diag(v_l) B diag(u_l) A, with A and B shared.

    B is zero at the start as in LoRA, A drawn, u and v one. With grouped queries the query, key and value matrices
    have no common shape, so layers share by type and shape.
    """

    tied: ClassVar[tuple[str, ...]] = ("down", "up")

    def __init__(self, weight: torch.Tensor, rank: int) -> None:
        super().__init__()
        rows, columns = weight.shape
        self.down = _drawn(weight, (rank, columns))
        self.up = nn.Parameter(weight.new_zeros((rows, rank), dtype=torch.float32))
        self.inner = nn.Parameter(weight.new_ones(rank, dtype=torch.float32))
        self.outer = nn.Parameter(weight.new_ones(rows, dtype=torch.float32))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Apply dW to the last dimension of ``inputs`` (..., in): (..., out)."""
        return functional.linear(functional.linear(inputs, self.down) * self.inner, self.up) * self.outer

    def delta(self) -> torch.Tensor:
        """The update, (out, in)."""
        return self.outer[:, None] * (self.up * self.inner) @ self.down


class MultiLora(Update):
    """MultiLoRA (Wang et al., arXiv 2311.11501): dW = sum_i diag(s_i) B_i A_i, A and B drawn, s zero at the start.

    Whether the paper's scales are vectors or numbers is not certain; vectors of the outputs are trained.
    """

    def __init__(self, weight: torch.Tensor, rank: int, adapters: int) -> None:
        super().__init__()
        rows, columns = weight.shape
        self.down = _drawn(weight, (adapters, rank, columns))
        self.up = _drawn(weight, (adapters, rows, rank))
        self.scales = nn.Parameter(weight.new_zeros((adapters, rows), dtype=torch.float32))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Apply dW to the last dimension of ``inputs`` (..., in): (..., out)."""
        # The pairs side by side are one pair of adapters * rank, the scales part of its B.
        return functional.linear(functional.linear(inputs, self.down.flatten(0, 1)), self._wide())

    def delta(self) -> torch.Tensor:
        """The update, (out, in)."""
        return self._wide() @ self.down.flatten(0, 1)

    def _wide(self) -> torch.Tensor:
        return (self.scales[:, :, None] * self.up).transpose(0, 1).flatten(1)


def _drawn(weight: torch.Tensor, shape: tuple[int, ...]) -> nn.Parameter:
    """Kaiming-uniform values for matrices in the last two dimensions, as LoRA draws its A; on the CPU's generator."""
    bound = 1 / math.sqrt(shape[-1])
    if weight.is_meta:
        return nn.Parameter(weight.new_empty(shape, dtype=torch.float32))
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound).to(weight.device))


def build(config: UpdateConfig, weight: torch.Tensor, name: str) -> Update:
    """The untrained update of one weight.

    Args:
        config: its form and size.
        weight: (out, in), on any device; it is not kept.
        name: of the layer, for patterns that are drawn.
    """
    if config.form == "tied_lora":
        return TiedLora(weight, config.rank)
    if config.form == "multi_lora":
        return MultiLora(weight, config.rank, config.adapters)
    rank = config.rank if config.form == "lora_xs" else None
    factors = unread_factors(weight, rank) if config.factors_from_file else singular_factors(weight, rank)
    if config.form == "svf":
        return Svf(factors)
    if config.form == "lora_xs":
        return LoraXs(factors)
    if config.pattern == "plain":
        return SvftPlain(factors)
    pattern = "banded" if config.factors_from_file else config.pattern
    return SvftSparse(factors, trained_entries(pattern, config.width, factors, config.seed, name))
