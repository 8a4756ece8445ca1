"""Log-likelihood of given tokens, the ground of perplexity and preference."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from stages.conversation import Encoded
from stages.log import event

if TYPE_CHECKING:
    import torch


def log_likelihoods(model: Any, sequences: Sequence[Encoded], batch_size: int, label: str) -> list[float]:
    """The summed log-probability (nats) of each sequence's marked tokens, given what precedes them.

    Args:
        model: a causal language model in eval mode.
        sequences: token ids, and which tokens count; the first token of a sequence never does.
        batch_size: sequences per forward pass; they are sorted by length, so little is padding.
        label: what progress is reported as.
    """
    import torch

    order = sorted(range(len(sequences)), key=lambda index: -len(sequences[index].ids))
    found = [0.0] * len(sequences)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        with torch.inference_mode():
            for index, value in zip(chosen, _batch(model, [sequences[i] for i in chosen]), strict=True):
                found[index] = value
        event("measuring", metric=label, done=min(start + batch_size, len(order)), total=len(order))
    return found


def _batch(model: Any, sequences: list[Encoded]) -> list[float]:
    import torch

    device = next(model.parameters()).device
    length = max(len(sequence.ids) for sequence in sequences)
    ids = torch.zeros((len(sequences), length), dtype=torch.long)
    attention = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence.ids)] = torch.tensor(sequence.ids)
        attention[row, : len(sequence.ids)] = 1
    logits = model(input_ids=ids.to(device), attention_mask=attention.to(device), use_cache=False).logits
    return [_row(logits[row], sequence) for row, sequence in enumerate(sequences)]


def _row(logits: "torch.Tensor", sequence: Encoded) -> float:
    """One row at a time, and only its marked positions: float32 logits of a batch would not fit."""
    import torch

    positions = [number for number, marked in enumerate(sequence.mask) if marked and number > 0]
    targets = torch.tensor([sequence.ids[number] for number in positions], device=logits.device)
    scores = logits[[number - 1 for number in positions]].float()
    losses = torch.nn.functional.cross_entropy(scores, targets, reduction="none")
    return -float(losses.double().sum())
