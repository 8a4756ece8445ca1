"""What the files that take the place of Spectrum's scan mean for a model, be it loaded or known by its headers only.

`validate` and the stage itself ask the same two questions here, so that a file which does not fit the model is
refused before anything trains.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from stages.bounds import bounded
from stages.errors import InvalidInput
from stages.layout import HEADS, Key, Layout, Matrix, identify, spellings
from stages.scan.files import matching, read_patterns, read_scores

Table = dict[Key, dict[str, Any]]
"""What is known of each matrix: module, type, layer, snr, snr_mp and, after a scan, counts of noise values."""
_PREFIXES = ("model", "transformer", "gpt_neox", "backbone")
"""What a causal language model in memory may call its backbone; older files name the backbone's weights without it."""


class Weights(NamedTuple):
    """What a file is held against."""

    matrices: tuple[Matrix, ...]
    """The matrices inside the numbered layers."""
    parameters: tuple[str, ...]
    """Names of all parameters."""
    ends: tuple[str, ...]
    """Those of the input embedding and the output head; one where they are tied."""
    heads: tuple[str, ...]
    """Module names by which a list may mean the output head; a tied one has no parameter of its own."""


def stored_weights(layout: Layout) -> Weights:
    """The weights of a checkpoint, by its headers."""
    ends = tuple(name for name in (layout.embedding, layout.head) if name is not None)
    return Weights(layout.matrices, tuple(layout.tensor), ends, tuple(sorted(HEADS)))


def scores_of(file: Path, weights: Weights, score: str) -> Table:
    """The scores in a JSON file for the matrices of a model.

    A score of a fused projection stands for all its parts. Types that the file leaves out do not train.

    Args:
        file: of `trivium scan`, or published with Spectrum.
        weights: the model's.
        score: ``reference`` or ``marchenko_pastur``; the one that will rank must be there.

    Raises:
        InvalidInput: not such a file, or one of another model.
    """
    found = {identify(module): (module, known) for module, known in read_scores(file).items()}
    found.pop(None, None)  # embeddings and the last norm are not ranked
    own = weights.matrices
    keys = {identify(name.removesuffix(".weight")) for name in weights.parameters}
    keys |= {matrix.key for matrix in own}
    stranger = next((module for key, (module, _) in found.items() if key not in keys), None)
    if stranger is not None:
        raise InvalidInput(f"{file}: scores {stranger}, which this model does not have; scan this model itself")
    table: Table = {}
    order = {key: number for number, key in enumerate(found)}
    for matrix in sorted(own, key=lambda one: order.get(_in(found, one), 0)):
        if (key := _in(found, matrix)) in found:
            _, known = found[key]
            row = {"module": matrix.module, "type": matrix.type, "layer": matrix.layer, **known._asdict()}
            if row["snr" if score == "reference" else "snr_mp"] is None:
                raise InvalidInput(f"{file}: holds no {score} scores; `trivium scan` writes both into scan.json")
            table[matrix.key] = row
    _check_complete(file, own, table)
    return table


def listed_in(file: Path, weights: Weights) -> tuple[list[Matrix], list[str]]:
    """The matrices that a YAML file names, and the other parameters that it names.

    Raises:
        InvalidInput: not such a file, a pattern that matches nothing of the model, or patterns that match all of it.
    """
    names = _names(weights)
    targets: set[str] = set()
    for pattern in read_patterns(file):
        with bounded(f"{file}: the pattern {pattern[:60]!r}", "write the names out, or nest no repetitions"):
            targets |= matching([pattern], names, file)
    chosen = [matrix for matrix in weights.matrices if matrix.module in targets]
    if len(chosen) == len(weights.matrices):
        raise InvalidInput(f"{file}: names every weight matrix of this model; use method full, or name fewer")
    return chosen, sorted(targets - set(modules(weights.matrices)))


def modules(found: Sequence[Matrix]) -> list[str]:
    """The names of matrices."""
    return [matrix.module for matrix in found]


def _names(weights: Weights) -> dict[str, frozenset[str]]:
    """What a pattern may match -> what it then means: modules of matrices, names of other parameters."""
    inside: dict[str, list[str]] = {}
    for matrix in weights.matrices:
        inside.setdefault(matrix.tensor, []).append(matrix.module)
    names: dict[str, frozenset[str]] = {}
    for parameter in weights.parameters:
        meant = frozenset(inside.get(parameter, [parameter]))
        names[parameter] = names[parameter.removesuffix(".weight")] = meant
    for matrix in weights.matrices:
        for spelling in spellings(matrix):
            names[spelling] = names[f"{spelling}.weight"] = frozenset([matrix.module])
    names = _banks(weights.matrices) | names
    short = [name for name in names if name.partition(".")[0] not in (*_PREFIXES, *HEADS)]
    for name in short:
        names |= {f"{prefix}.{name}": names[name] for prefix in _PREFIXES}
    for head in weights.heads:
        if f"{head}.weight" not in names:
            names[head] = names[f"{head}.weight"] = frozenset(weights.ends)
    return names


def _banks(own: Sequence[Matrix]) -> dict[str, frozenset[str]]:
    """The parameters in which a loaded model holds all experts of a layer, where files hold one by one."""
    found: dict[str, list[str]] = {}
    for matrix in own:
        stem = re.match(r"(.*\.)(?:mlp|block_sparse_moe)\.experts\.", matrix.module)
        if stem is not None and matrix.expert is not None:
            last = "down_proj" if matrix.type.endswith("down") else "gate_up_proj"
            found.setdefault(f"{stem[1]}mlp.experts.{last}", []).append(matrix.module)
    return {bank: frozenset(held) for bank, held in found.items()}


def _in(found: dict[Any, Any], matrix: Matrix) -> Key:
    """The key under which a file scores a matrix: its own, or that of the fused projection it is a part of."""
    layer, kind, expert = matrix.key
    return matrix.key if matrix.key in found or matrix.part is None else (layer, kind.rsplit(".", 1)[0], expert)


def _check_complete(file: Path, own: tuple[Matrix, ...], table: Table) -> None:
    if not table:
        raise InvalidInput(f"{file}: scores none of this model's weight matrices; scan this model itself")
    kinds = {kind for _, kind, _ in table}
    missing = next((matrix for matrix in own if matrix.type in kinds and matrix.key not in table), None)
    if missing is not None:
        raise InvalidInput(f"{file}: has no score for {missing.module}; scan this model itself")
