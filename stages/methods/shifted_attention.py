"""Shifted sparse attention (LongLoRA, arXiv 2309.12307, section 3.2) without the wrap around the sequence's end."""

from typing import Any

import torch
from torch.nn import functional

NAME = "trivium_shifted_sparse"
"""The name under which transformers finds this attention."""


def register(group_size: int) -> None:
    """Make the attention known to transformers, with groups of ``group_size`` tokens."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    def attention(
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **settings: Any,
    ) -> tuple[torch.Tensor, None]:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        if not module.training or query.shape[2] != key.shape[2]:
            found, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
            return found, None
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
        options = {"scale": settings.get("scaling"), "dropout_p": settings.get("dropout", 0.0)}
        half = query.shape[1] // 2
        parts = [
            _grouped(query[:, heads], key[:, heads], value[:, heads], attention_mask, group_size, shift, options)
            for heads, shift in ((slice(0, half), 0), (slice(half, None), group_size // 2))
        ]
        return torch.cat(parts, 1).transpose(1, 2).contiguous(), None

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def _grouped(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    size: int,
    shift: int,
    options: dict[str, Any],
) -> torch.Tensor:
    """Causal attention within consecutive groups; the first one has ``size - shift`` tokens.

    Args:
        query: (batch, heads, length, head size); key and value alike.
        key: see query.
        value: see query.
        mask: (batch, 1, length, length), true where a token may be seen; None for plain causal attention.
        size: tokens in a group.
        shift: tokens by which the groups are moved to the left.
        options: scale and dropout of torch's attention.
    """
    batch, heads, length, width = query.shape
    if length <= size - shift:  # one group holds all: padding it up would cost as much as a full group
        causal = mask is None
        return functional.scaled_dot_product_attention(query, key, value, mask, is_causal=causal, **options)
    left = shift
    right = -(left + length) % size
    count = (left + length + right) // size

    def split(tensor: torch.Tensor) -> torch.Tensor:
        padded = functional.pad(tensor, (0, 0, left, right))
        return padded.view(batch, heads, count, size, width).transpose(1, 2).reshape(-1, heads, size, width)

    allowed = _blocks(mask, batch, length, size, left, count, query.device)
    found = functional.scaled_dot_product_attention(split(query), split(key), split(value), allowed, **options)
    joined = found.view(batch, count, heads, size, width).transpose(1, 2).reshape(batch, heads, -1, width)
    return joined[:, :, left : left + length]


def _blocks(
    mask: torch.Tensor | None, batch: int, length: int, size: int, left: int, count: int, device: torch.device
) -> torch.Tensor:
    """Who sees whom in each group, padding included: (batch x groups, 1, size, size), true where seen.

    Never as large as the whole mask: of the ``count`` groups only the blocks on its diagonal are made.
    """
    blocks = torch.zeros(batch, count, size, size, dtype=torch.bool, device=device)
    for group in range(count):
        first = group * size - left
        low, high = max(first, 0), min(first + size, length)
        inside = slice(low - first, high - first)
        if mask is None:
            seen = torch.ones(high - low, high - low, dtype=torch.bool, device=device).tril()
        else:
            part = mask[:, 0, low:high, low:high]
            seen = part if part.dtype == torch.bool else part >= 0
        blocks[:, group, inside, inside] = seen
    # Padding sees itself: a row in which nothing is seen would be nan.
    blocks |= torch.eye(size, dtype=torch.bool, device=device)
    return blocks.reshape(-1, 1, size, size)
