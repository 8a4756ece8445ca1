"""The updates of several stages beside one another: did a later stage go on, or take back what an earlier one did?"""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.diagnostics.weights import Weights, blocks, of_checkpoint

if TYPE_CHECKING:
    import torch


def directions(names: Sequence[str], models: Sequence[Path]) -> dict[str, Any]:
    """How large each stage's update is, and the cosine between each two of them, all weights as one long vector.

    A weight that some of the models have not (a bias that BitFit added) is left out.

    Args:
        names: of the stages.
        models: the plain checkpoints: the base, then what each stage published.

    Returns:
        The part ``lineage`` of the document that `stages.diagnostics` describes; a cosine with an update of nothing
        is None.
    """
    import torch

    weights = [of_checkpoint(model) for model in models]
    count = len(names)
    products = torch.zeros(count, count, dtype=torch.float64)
    base_square = 0.0
    for values in _tensors(weights):
        base_square += float(values[0].square().sum())
        updates = torch.stack([after - before for before, after in pairwise(values)])
        products += (updates @ updates.T).cpu()
    norms = products.diagonal().sqrt()
    cosines = [
        [_cosine(float(products[i, j]), float(norms[i]), float(norms[j])) for j in range(count)] for i in range(count)
    ]
    from_base = math.sqrt(max(0.0, float(products.sum())))
    return {
        "names": list(names),
        "norms": norms.tolist(),
        "cosines": cosines,
        "from_base": from_base,
        "relative_from_base": from_base / math.sqrt(base_square) if base_square else 0.0,
    }


def _tensors(weights: Sequence[Weights]) -> "Iterator[tuple[torch.Tensor, ...]]":
    """Each weight that all models have, in every model: flat, in float64, a block at a time."""
    for key in set.intersection(*(set(one.matrices) for one in weights)):
        yield from blocks(*(one.matrix(key) for one in weights))
    for place in set.intersection(*(set(one.others) for one in weights)):
        values = [one.other(place) for one in weights]
        if len({value.shape for value in values}) == 1:
            yield from blocks(*values)


def _cosine(product: float, one: float, other: float) -> float | None:
    return max(-1.0, min(1.0, product / (one * other))) if one and other else None
