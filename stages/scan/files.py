"""Scans as files: ours, and the three of the Spectrum reference (QuixiAI/spectrum), byte for byte.

- ``scan.json``: ours; both scores and the counts behind them.
- ``snr_results_<slug>.json``: module -> {snr, type}.
- ``snr_results_<slug>_sorted.json``: type -> {module: snr}, best first.
- ``snr_results_<slug>_unfrozenparameters_<P>percent.yaml``: patterns, as Axolotl takes them.
"""

import json
import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from stages.documents import read_object, write_json
from stages.errors import InvalidInput
from stages.layout import Layout
from stages.scan.select import by_type, share

if TYPE_CHECKING:  # numpy and scipy come with these, and `validate` reads files only
    from stages.scan.score import Kind
    from stages.scan.walk import Scored

FORMAT = 1


class Known(NamedTuple):
    """The scores of a module, as far as a file holds them."""

    snr: float | None
    snr_mp: float | None


def slug(name: str) -> str:
    """A model's name as the reference writes it into file names."""
    return name.replace("/", "-").replace("_", "-")


def write(
    scored: "Sequence[Scored]", folder: Path, name: str, percent: float, by: "Kind", always: Iterable[str] = ()
) -> list[Path]:
    """Write a scan in all four formats.

    Args:
        scored: the scan.
        folder: where to.
        name: of the model, for the file names.
        percent: share of each module type in the YAML.
        by: the score that ``snr`` stands for in the reference's formats; files by `marchenko_pastur` say so in their
            names.
        always: names of tensors that the YAML lists first: the reference's list always opens with head and embedding.

    Returns:
        The files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ours = folder / "scan.json"
    write_json(ours, {"format": FORMAT, "model": name, "matrices": [as_row(one) for one in scored]})
    stem = f"snr_results_{slug(name)}" + ("" if by == "reference" else "-marchenko-pastur")
    types = by_type(scored, lambda one: one.matrix)
    ranked = {kind: sorted(own, key=lambda one: one.value(by), reverse=True) for kind, own in types.items()}
    flat = {one.matrix.module: {"snr": one.value(by), "type": kind} for kind, own in types.items() for one in own}
    best_first = {kind: {one.matrix.module: one.value(by) for one in own} for kind, own in ranked.items()}
    lines = ["unfrozen_parameters:", *(f"- ^{tensor}$" for tensor in always)]
    for kind, own in ranked.items():
        lines.append(f"# {kind} layers")
        lines += [f"- {one.matrix.module}" for one in own[: share(len(own), percent)]]
    texts = {
        f"{stem}.json": _indented(flat),
        f"{stem}_sorted.json": _indented(best_first),
        f"{stem}_unfrozenparameters_{percent:g}percent.yaml": "\n".join(lines) + "\n",
    }
    for file, text in texts.items():
        (folder / file).write_text(text, encoding="utf-8")
    return [ours, *(folder / file for file in texts)]


def as_row(one: "Scored") -> dict[str, Any]:
    """A scored matrix as a flat record."""
    matrix = one.matrix
    return {"module": matrix.module, "type": matrix.type, "layer": matrix.layer, **asdict(one.scores)}


def always_listed(layout: Layout) -> list[str]:
    """Head and embedding, in the reference's order; a tied model's one tensor once."""
    return [name for name in (layout.head, layout.embedding) if name is not None]


def read_scores(file: Path) -> dict[str, Known]:
    """Scores by module from any of the JSON formats.

    Infinity, which older files of the reference hold where a matrix had no noise at all, counts as the largest number;
    equal scores rank in the file's order, as they do in the reference.

    Raises:
        InvalidInput: not such a file, or nan in it.
    """
    document = read_object(file)
    if isinstance(document.get("matrices"), list):
        found = dict(_own(file, number, row) for number, row in enumerate(document["matrices"], 1))
    else:
        found = {module: Known(snr, None) for module, snr in _flat(document)}
    for module, known in found.items():
        for value in known:
            if value is not None and not _is_number(value):
                raise InvalidInput(
                    f"{file}: the score of {module} is {repr(value)[:60]}, not a number; scan the model again"
                )
    if not found:
        raise InvalidInput(f"{file}: no scores in it; it should map modules to snr and type, or types to modules")
    return {module: Known(_finite(known.snr), _finite(known.snr_mp)) for module, known in found.items()}


def read_patterns(file: Path) -> list[str]:
    """The regular expressions under ``unfrozen_parameters`` of a YAML file.

    Raises:
        InvalidInput: not YAML, no such list, or an entry is not a regular expression.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        document = YAML(typ="safe").load(file.read_text(encoding="utf-8"))
    except (OSError, YAMLError, ValueError, TypeError, RecursionError) as error:
        raise InvalidInput(f"{file}: cannot be read as YAML: {' '.join(str(error).split())}") from error
    patterns = document.get("unfrozen_parameters") if isinstance(document, dict) else None
    if not isinstance(patterns, list):
        raise InvalidInput(f"{file}: has no list `unfrozen_parameters` of names or regular expressions")
    if not patterns:
        raise InvalidInput(f"{file}: `unfrozen_parameters` is empty: nothing would train")
    for number, pattern in enumerate(patterns, 1):
        _check_pattern(file, number, pattern)
    return patterns


def matching(patterns: Sequence[str], names: Mapping[str, frozenset[str]], file: Path) -> set[str]:
    """What a list of patterns means.

    A pattern must match a whole name: ``mlp.gate`` never means ``mlp.gate_proj``.

    Args:
        patterns: regular expressions.
        names: every name that a pattern may match -> what it means.
        file: where they came from, for the message.

    Raises:
        InvalidInput: a pattern matches nothing.
    """
    from difflib import get_close_matches

    chosen: set[str] = set()
    for pattern in patterns:
        matched = [meant for name, meant in names.items() if re.fullmatch(pattern, name)]
        if not matched:
            near = get_close_matches(pattern.strip("^$"), names, n=1, cutoff=0.3)
            raise InvalidInput(
                f"{file}: {pattern!r} matches no parameter of this model as a whole"
                + (f"; the nearest is {near[0]}" if near else "")
            )
        chosen |= frozenset().union(*matched)
    return chosen


def _check_pattern(file: Path, number: int, pattern: object) -> None:
    if not isinstance(pattern, str):
        raise InvalidInput(
            f"{file}: entry {number} of `unfrozen_parameters` is {repr(pattern)[:60]}, not text: entries are names or "
            "regular expressions"
        )
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise InvalidInput(f"{file}: {pattern!r} is not a regular expression: {error}") from error


def _own(file: Path, number: int, row: object) -> tuple[str, Known]:
    """One entry of our own format."""
    if not isinstance(row, dict) or not isinstance(row.get("module"), str) or not {"snr", "snr_mp"} <= row.keys():
        raise InvalidInput(
            f"{file}: entry {number} of `matrices` does not hold module, snr and snr_mp; scan the model again"
        )
    return row["module"], Known(row["snr"], row["snr_mp"])


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return isinstance(value, int) or not math.isnan(value)


def _flat(document: dict[str, Any]) -> list[tuple[str, Any]]:
    """Both of the reference's schemas as (module, snr)."""
    found: list[tuple[str, Any]] = []
    for key, value in document.items():
        if isinstance(value, dict) and "snr" in value:
            found.append((key, value["snr"]))
        elif isinstance(value, dict):
            found += list(value.items())
    return found


def _finite(value: float | None) -> float | None:
    if value is None or abs(value) <= sys.float_info.max:
        return value
    return math.copysign(sys.float_info.max, 1 if value > 0 else -1)


def _indented(document: dict[str, Any]) -> str:
    return json.dumps(document, indent=4, allow_nan=False)
