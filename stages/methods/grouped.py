"""A linear layer in 4 bits with one scale and one zero-point per group of inputs, and QA-LoRA's adapter on it.

Imports torch: only functions that run with a model import this module.
"""

from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional

LEVELS = 15
"""The largest 4-bit number."""


class GroupedLinear(nn.Module):
    """y = W x + b + scale B A pool(x), with W = s (q - z) by groups of inputs and pool the sum over each group.

    Pooled inputs make the update constant over a group, so that it is a shift of the zero-points (QA-LoRA,
    arXiv 2309.14717, section 3.3): `merged` takes it up and stays on a 4-bit grid.
    """

    codes: torch.Tensor
    """q, two to a byte: (out, padded inputs / 2), uint8."""
    scales: torch.Tensor
    """s: (out, groups)."""
    zeros: torch.Tensor
    """z: (out, groups). Floating point: rounded to integers it could not hold a small update."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, group_size: int) -> None:
        """Quantise a layer.

        Args:
            weight: (out, in) in float32.
            bias: (out,), kept as it is and frozen.
            group_size: inputs that share a scale and a zero-point; the last group may be smaller.
        """
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.group_size = group_size
        codes, scales, zeros = quantise(weight, group_size)
        self.register_buffer("codes", pack(codes))
        self.register_buffer("scales", scales)
        self.register_buffer("zeros", zeros)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        self.lora_A: nn.Parameter | None = None
        self.lora_B: nn.Parameter | None = None
        self.scaling = 0.0
        self.dropout = nn.Dropout(0.0)

    def add_adapter(self, rank: int, scaling: float, dropout: float) -> None:
        """Add A (rank, groups), drawn as LoRA draws it, and B (out, rank), zero."""
        out, groups = self.scales.shape
        device = self.scales.device
        self.lora_A = nn.Parameter(torch.empty(rank, groups, device=device))
        self.lora_B = nn.Parameter(torch.zeros(out, rank, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=5**0.5)
        self.scaling = scaling
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The layer's output for inputs of shape (..., in)."""
        found = cast("torch.Tensor", _Multiply.apply(x, self))  # type: ignore[no-untyped-call]
        if self.bias is not None:
            found = found + self.bias.to(found.dtype)
        if self.lora_A is None or self.lora_B is None:
            return found
        pooled = functional.linear(functional.linear(self.dropout(self.pool(x)), self.lora_A), self.lora_B)
        return found + self.scaling * pooled.to(found.dtype)

    def pool(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of each group's inputs, shape (..., groups), in the adapter's precision."""
        missing = -self.in_features % self.group_size
        wide = functional.pad(x, (0, missing)) if missing else x
        return by_group(wide, self.group_size).to(self.scales.dtype).sum(-1)

    def weight_with(self, zeros: torch.Tensor) -> torch.Tensor:
        """The weight s (q - z) with these zero-points, shape (out, in)."""
        codes = by_group(unpack(self.codes), self.group_size).to(self.scales.dtype)
        weight: torch.Tensor = self.scales[..., None] * (codes - zeros[..., None])
        return weight.flatten(1)[:, : self.in_features]

    def merged(self) -> torch.Tensor:
        """The weight with the adapter taken up by the zero-points: z - scale (B A) / s; shape (out, in)."""
        zeros = self.zeros
        if self.lora_A is not None and self.lora_B is not None:
            zeros = zeros - self.scaling * (self.lora_B @ self.lora_A) / self.scales
        return self.weight_with(zeros)


class _Multiply(torch.autograd.Function):
    """x W^T that keeps the packed weight for the backward pass, not the dequantised one."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: GroupedLinear) -> torch.Tensor:
        device = x.device.type
        kept = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        ctx.layer, ctx.kept, ctx.dtype = layer, kept, x.dtype
        return functional.linear(x.to(kept), layer.weight_with(layer.zeros).to(kept))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        weight = ctx.layer.weight_with(ctx.layer.zeros).to(ctx.kept)
        return (gradients[0].to(ctx.kept) @ weight).to(ctx.dtype), None


def quantise(weight: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """4-bit numbers (out, padded inputs), scales and zero-points (out, groups): least to largest of each group.

    The least of a group becomes exactly 0 and the largest exactly 15, so that a weight which is on such a grid
    already is found again.
    """
    missing = -weight.shape[1] % group_size
    # Repeated, the last input leaves its group's least and largest alone.
    wide = torch.cat([weight, weight[:, -1:].expand(-1, missing)], dim=1) if missing else weight
    groups = by_group(wide, group_size)
    least, largest = groups.amin(-1), groups.amax(-1)
    scales = (largest - least) / LEVELS
    scales = torch.where(scales > 0, scales, torch.ones_like(scales))
    codes = ((groups - least[..., None]) / scales[..., None]).round().clamp(0, LEVELS).to(torch.uint8)
    return codes.flatten(1), scales, -least / scales


def by_group(tensor: torch.Tensor, group_size: int) -> torch.Tensor:
    """The last dimension split into groups: (..., n) -> (..., n / group_size, group_size)."""
    return tensor.reshape(*tensor.shape[:-1], -1, group_size)


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Two 4-bit numbers to a byte: (out, n) -> (out, n / 2)."""
    return codes[:, ::2] | (codes[:, 1::2] << 4)


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """What `pack` packed: (out, n / 2) -> (out, n)."""
    return torch.stack([packed & LEVELS, packed >> 4], dim=2).flatten(1)
