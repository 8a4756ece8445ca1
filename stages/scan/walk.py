"""The scan of a checkpoint: every matrix scored, each result kept as soon as it is known."""

import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from stages.errors import InvalidInput
from stages.layout import Layout, Matrix
from stages.scan.score import Kind, Scores, scores
from stages.scan.singular import singular_values
from stages.scan.stream import Source, source

VERSION = 1
"""Part of every cache key: raise it when a score changes."""
CACHE = "spectrum.jsonl"
ILL_CONDITIONED = 0.01
"""A score whose noise is a smaller share of the singular values than this hangs on very few numbers."""

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True)
class Scored:
    """A matrix and its scores."""

    matrix: Matrix
    scores: Scores

    def value(self, by: Kind) -> float:
        """The score that matrices are ranked by."""
        return self.scores.snr if by == "reference" else self.scores.snr_mp

    def few(self, by: Kind) -> bool:
        """Whether the score hangs on less than 1 % of the singular values."""
        noise = self.scores.noise if by == "reference" else self.scores.noise_mp
        return noise < ILL_CONDITIONED * self.scores.values


def scan(layout: Layout, cache: Path | None = None, progress: Progress | None = None) -> tuple[Scored, ...]:
    """Score every matrix of a checkpoint.

    Args:
        layout: the checkpoint.
        cache: a folder that keeps every result by the hash of the stored bytes; a second scan, or one that was
            killed, goes on from there. None keeps nothing.
        progress: called after each matrix with how many are done, how many there are, and the module's name.

    Raises:
        InvalidInput: quantised weights, inf or nan in a matrix, or no matrix in numbered layers.
    """
    if layout.is_quantised:
        raise InvalidInput(f"{layout.folder}: quantised already; Spectrum scans and trains weights that are not")
    if not layout.matrices:
        raise InvalidInput(f"{layout.folder}: no weight matrices in numbered layers; use method full")
    known = _read_cache(cache)
    found = []
    for number, matrix in enumerate(layout.matrices, 1):
        found.append(Scored(matrix, _score(layout, matrix, cache, known)))
        if progress is not None:
            progress(number, len(layout.matrices), matrix.module)
    return tuple(found)


def warnings(scored: Sequence[Scored], by: Kind) -> list[str]:
    """What a reader of the ranking must know: module types whose scores hang on very few singular values."""
    lines = []
    for kind in dict.fromkeys(one.matrix.type for one in scored):
        own = [one for one in scored if one.matrix.type == kind]
        few = [one for one in own if one.few(by)]
        if few:
            lines.append(
                f"{kind}: in {len(few)} of {len(own)} matrices less than 1% of the singular values count as noise; "
                "their rank hangs on a handful of numbers"
            )
    return lines


def _score(layout: Layout, matrix: Matrix, cache: Path | None, known: dict[str, Scores]) -> Scores:
    tensor = layout.tensor[matrix.tensor]
    with source(tensor, matrix) as opened:
        key = "" if cache is None else _key(opened, matrix, tensor.dtype)
        if key in known:
            return known[key]
        values = singular_values(opened.blocks, opened.side)
    if values is None:
        raise InvalidInput(f"{tensor.file}: {tensor.name} holds inf or nan: the model is broken; train it again")
    result = scores(values, matrix.shape)
    if cache is not None:
        _keep(cache, key, result)
        known[key] = result
    return result


def _key(opened: Source, matrix: Matrix, dtype: str) -> str:
    what = json.dumps([VERSION, opened.sha256(), dtype, matrix.shape, None if matrix.whole else repr(matrix.part)])
    return hashlib.sha256(what.encode()).hexdigest()


def _read_cache(folder: Path | None) -> dict[str, Scores]:
    """What earlier scans left; lines that a crash tore, or that hold no finite scores, are passed over."""
    known: dict[str, Scores] = {}
    if folder is None or not (folder / CACHE).is_file():
        return known
    for line in (folder / CACHE).read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
            result = Scores(**entry["scores"])
        except (ValueError, TypeError, KeyError):
            continue
        if math.isfinite(result.snr) and math.isfinite(result.snr_mp):
            known[entry["key"]] = result
    return known


def _keep(folder: Path, key: str, result: Scores) -> None:
    """Append one line in one write; it begins a line of its own, also after a torn one."""
    folder.mkdir(parents=True, exist_ok=True)
    line = "\n" + json.dumps({"key": key, "scores": asdict(result)}) + "\n"
    descriptor = os.open(folder / CACHE, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)
