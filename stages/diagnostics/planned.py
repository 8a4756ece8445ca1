"""Which weights a method was to train, from the names of the parameters that trained."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from stages.diagnostics.weights import Weights, spot
from stages.layout import Key, identify

_ADAPTED = "base_model.model."
"""What PEFT puts before the names of a model that it adapts."""


@dataclass(frozen=True)
class Planned:
    """What was to train in a checkpoint: matrices inside the layers, and others as `Weights` names them."""

    matrices: frozenset[Key]
    others: frozenset[str]
    selected: bool
    """Whether the method chose them by a score, and did not just take all that its settings name."""


def planned_of(trainable: Iterable[str], method_record: Mapping[str, Any], weights: Weights) -> Planned:
    """What was to train of a published checkpoint.

    Args:
        trainable: names of the trained parameters: a model's own, an adapter's, or those of parts of a weight.
        method_record: what the method kept of its preparation; Spectrum's tells parts of fused weights apart.
        weights: the checkpoint that came of it.
    """
    tensors = {spot(matrix.tensor) for matrix in weights.matrices.values()}
    known = tensors | weights.others.keys()
    touched: set[str] = set()
    banks: set[int] = set()
    for name in trainable:
        plain = name.removeprefix(_ADAPTED)
        modules = [plain.rsplit(".", deep)[0] for deep in range(1, plain.count(".") + 1)]
        ways = (spot(one) for one in (plain, *(f"{module}.weight" for module in modules)))
        touched |= {next((one for one in ways if one in known), plain)}
        key = identify(plain)
        if key is not None and "experts" in key[1].split("."):  # all of a layer in memory, one by one in older files
            banks.add(key[0])
    selected = selected_in(method_record)
    chosen = selected
    if chosen is None:
        chosen = frozenset(
            key
            for key, matrix in weights.matrices.items()
            if spot(matrix.tensor) in touched or (matrix.expert is not None and matrix.layer in banks)
        )
    return Planned(chosen, frozenset(weights.others.keys() & touched), selected is not None)


def selected_in(method_record: Mapping[str, Any]) -> frozenset[Key] | None:
    """The matrices that Spectrum chose, from the record that it keeps; None for another method."""
    table: Iterable[Mapping[str, Any]] | None = method_record.get("spectrum")
    if table is None:
        return None
    return frozenset((row["layer"], row["type"], row.get("expert")) for row in table if row["selected"])
