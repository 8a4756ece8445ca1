"""What one stage changed: its start against what it published."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from stages.diagnostics import matrix as one_matrix
from stages.diagnostics.planned import Planned
from stages.diagnostics.weights import Weights, blocks, of_checkpoint
from stages.errors import InvalidInput
from stages.layout import Key

if TYPE_CHECKING:
    import torch

FILE = "diagnostics.json"
FORMAT = 1
Depth = Literal["spectra", "norms"]


@dataclass
class _Sums:
    """Squared norms, added up."""

    update: float = 0.0
    start: float = 0.0
    layers: dict[str, float] = field(default_factory=dict)
    types: dict[str, float] = field(default_factory=dict)
    outside: float = 0.0
    unplanned: float = 0.0

    def record(self) -> dict[str, float]:
        norm = math.sqrt(self.update)
        return {"norm": norm, "relative_norm": norm / math.sqrt(self.start) if self.start else 0.0}


def diagnose(before: Weights, after: Path, depth: Depth, planned: Planned | None = None) -> dict[str, Any]:
    """Compare what was trained from with what was published.

    Args:
        before: the weights that training began with.
        after: the plain checkpoint that came of it.
        depth: `norms` leaves out ranks, singular values and intruders, which need decompositions.
        planned: what was to train; None where that is not known.

    Returns:
        The document that `stages.diagnostics` describes, without ``rounding`` and ``lineage``.

    Raises:
        InvalidInput: the two do not hold the same matrices.
    """
    tuned = of_checkpoint(after)
    if strangers := before.matrices.keys() ^ tuned.matrices.keys():
        layer, kind, _ = min(strangers, key=str)
        raise InvalidInput(f"{kind} of layer {layer} is in one of start and {after} only")
    sums, rows, unchanged = _Sums(), [], 0
    for key in tuned.matrices:
        row = _matrix_row(before, tuned, key, depth, sums)
        if row is None:
            unchanged += 1
            continue
        square = row["norm"] ** 2
        layer, kind, _ = key
        sums.layers[str(layer)] = sums.layers.get(str(layer), 0.0) + square
        sums.types[kind] = sums.types.get(kind, 0.0) + square
        if planned is not None:
            row["planned"] = key in planned.matrices if planned.selected else None
            sums.unplanned += 0.0 if key in planned.matrices else square
        rows.append(row)
    others = []
    for place in tuned.others:
        row = _other_row(before, tuned, place, sums)
        if row is not None:
            others.append(row)
            if planned is not None and place not in planned.others:
                sums.unplanned += row["norm"] ** 2
    return {
        "format": FORMAT,
        "depth": depth,
        "reason": None,
        "against": "start",
        "intruders": {"k": one_matrix.TOP, "epsilon": one_matrix.EPSILON},
        "matrices": rows,
        "others": others,
        "unchanged": unchanged,
        "layers": _shares(sums.layers, sums.update),
        "types": _shares(sums.types, sums.update),
        "outside": sums.outside / sums.update if sums.update else 0.0,
        "unplanned": None if planned is None else sums.unplanned / sums.update if sums.update else 0.0,
        **sums.record(),
        "rounding": None,
    }


def nothing(reason: str, depth: Depth) -> dict[str, Any]:
    """The document of a stage that leaves no weights of its own to compare."""
    return {"format": FORMAT, "depth": depth, "reason": reason, "against": "start", "matrices": [], "others": []}


def distance(before: Weights, after: Weights) -> dict[str, float]:
    """Frobenius norm of the difference of two models, and its share of the first one's."""
    sums = _Sums()
    for key in before.matrices.keys() & after.matrices.keys():
        start = before.matrix(key)
        sums.update += _square(after.matrix(key) - start)
        sums.start += _square(start)
    for name in set(before.others) & set(after.others):
        _other_row(before, after, name, sums)
    return sums.record()


def _matrix_row(before: Weights, tuned: Weights, key: Key, depth: Depth, sums: _Sums) -> dict[str, Any] | None:
    start, end = before.matrix(key), tuned.matrix(key)
    own = _square(start)
    sums.start += own
    update = end - start
    square = _square(update)
    if square == 0.0:
        return None
    sums.update += square
    matrix = tuned.matrices[key]
    row = {
        "name": matrix.module,
        "layer": matrix.layer,
        "type": matrix.type,
        "expert": matrix.expert,
        "shape": list(end.shape),
        "planned": None,
        "norm": math.sqrt(square),
        "relative_norm": math.sqrt(square / own) if own else None,
        "stable_rank": None,
        "effective_rank": None,
        "rank_estimated": False,
        "singular_values": [],
        "intruders": None,
    }
    if depth == "spectra" and math.isfinite(square):
        found = one_matrix.spectrum(update, one_matrix.rounding_of(end))
        row |= {
            "stable_rank": found.stable_rank,
            "effective_rank": found.effective_rank,
            "rank_estimated": found.estimated,
            "singular_values": list(found.values),
            "intruders": one_matrix.intruders(start, end),
        }
    return row


def _other_row(before: Weights, tuned: Weights, place: str, sums: _Sums) -> dict[str, Any] | None:
    """What training did to a vector or an embedding; a vector that is new is all update (BitFit's biases)."""
    import torch

    end = tuned.other(place)
    start = before.other(place) if place in before.others else torch.zeros_like(end)
    if start.shape != end.shape or (place not in before.others and end.ndim > 1):
        return None  # an embedding that was resized is another table
    own = square = 0.0
    for one, other in blocks(start, end):
        own += _square(one)
        square += _square(other - one)
    sums.start += own
    if square == 0.0:
        return None
    sums.update += square
    sums.outside += square
    name = tuned.others[place]
    return {"name": name, "norm": math.sqrt(square), "relative_norm": math.sqrt(square / own) if own else None}


def _square(tensor: "torch.Tensor") -> float:
    import torch

    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2


def _shares(squares: Mapping[str, float], whole: float) -> dict[str, float]:
    return {name: square / whole for name, square in squares.items()}


def told(found: Mapping[str, Any], column: str) -> list[Any]:
    """The values of a column of a document's matrices, as far as they are told, the smallest first."""
    return sorted(row[column] for row in found["matrices"] if row[column] is not None)


def in_words(found: Mapping[str, Any]) -> str:
    """One line for people: how much moved, in how many directions, and what is new."""
    if found["reason"] is not None:
        return str(found["reason"])
    parts = [f"{100 * found['relative_norm']:.2g}% of the weights' norm in {len(found['matrices'])} matrices"]
    if ranks := told(found, "effective_rank"):
        parts.append(f"effective rank {ranks[len(ranks) // 2]:.3g} (median)")
    if intruders := told(found, "intruders"):
        looked = found["intruders"]["k"] * len(intruders)
        parts.append(f"{sum(intruders)} intruders among {looked} leading directions")
    return ", ".join(parts)
