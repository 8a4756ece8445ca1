"""The data report of a stage: what it is about to train on, made before it trains and kept as `data.json`.

`data.json` holds (counts are of different lines of files unless a pass is named; a *place* is ``file:line``; texts are
the data's own: whoever shows them escapes them):

    version       1
    stage, kind   its name and objective when the report was made
    sequence_length   in tokens
    total         as a source, over all of them, without `source`, `available`, `left_out`, `weight`, `wanted_share`
    sources       a list, in the spec's order:
        source          what the spec calls it
        available       rows that could be used
        left_out        {rows, shown}: rows that could not; shown are places with reasons
        weight          or null where the source has a share
        wanted_share    or null
        rows            different ones that are trained on, once or more often
        rows_per_pass   every use counted
        tokens_per_pass     that the trainer sees
        trained_tokens_per_pass, trained_share
        share_of_rows, share_of_tokens      of the stage's, per pass
        lengths         {min, p5, p25, median, p75, p95, max, mean}, tokens of whole rows
        truncated, dropped      {rows, shown}: longer than the sequence; nothing left to learn. shown are places
        duplicates      {exact_within, exact_across, near_within, near_across}: by where the earlier row stands
    turn_end      {token, rows, trained}: of how many rows (those not dropped) the token that ends each turn, or the
                  document, is learned; token is null where the chat template ends a turn with none
    duplicates    {rows, share, searched, threshold, words, shown}; shown: a list of {at, of, sources,
                  similarity, exact}; sources are their places in `sources`, from 0
    overlap       {words, sets}; sets: a list of {metric, not_looked_at, examples, judged, too_short, beyond,
                  overlapping, share, contained, shown}; not_looked_at is null or the reason; contained: at
                  least half of the example's runs of words occur; shown: a list of {at, with, words, part}
    samples       up to three rows as the model gets them: {at, tokens, cut, segments}; segments: a list of
                  {text, trained}
    warnings      a list of lines, from `stages.data_limits`
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specs.base import fingerprint, identity_fields
from specs.metric import MetricSpec
from stages.artifact import sha256
from stages.conversation import turn_terminator
from stages.data_limits import Report, warnings
from stages.documents import read_sealed, write_sealed
from stages.duplicates import RUN, THRESHOLD, Duplicates, duplicates
from stages.errors import InvalidInput
from stages.finite import IGNORED
from stages.identity import metric_digests
from stages.mixing import Mixture, Origin
from stages.objective import MaskReport, ObjectiveSpec, RowMask
from stages.overlap import LONG, overlaps

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

DATA_REPORT = "data.json"
"""The report's file in an artifact, and, sealed, in the folder that a stage is made in."""
VERSION = 1
"""Of what is found and how; another one makes reports anew that are kept for a resume."""
SHOWN = 10
"""Places that are listed of what is counted."""
SAMPLES = 3
SAMPLE_TOKENS = 400
"""Tokens of a sample that are shown."""

_QUANTILES = {"min": 0.0, "p5": 0.05, "p25": 0.25, "median": 0.5, "p75": 0.75, "p95": 0.95, "max": 1.0}


@dataclass(frozen=True, slots=True)
class Material:
    """What a report is made from."""

    stage: ObjectiveSpec
    metrics: dict[str, MetricSpec]
    folder: Path
    """The spec's."""
    mixture: Mixture
    dataset: "Dataset"
    """Of the mixture's rows, but for dropped ones."""
    masks: MaskReport
    tokenizer: "PreTrainedTokenizerBase"


def kept_or_made(material: Material, file: Path, inputs: dict[str, Any]) -> Report:
    """The report that an interrupted run left in ``file`` for the same inputs, or a new one, which is kept there.

    Args:
        material: what it is made from.
        file: where it is kept, sealed.
        inputs: the identity of the stage that it is made from.
    """
    evaluated = {name: _content(metric, material.folder) for name, metric in material.metrics.items()}
    key = fingerprint({"version": VERSION, "inputs": inputs, "metrics": evaluated, "stage": material.stage.name})
    try:
        kept = read_sealed(file)
        if kept["key"] == key:
            return dict(kept["report"])
    except (InvalidInput, KeyError, TypeError):
        pass  # none yet, or one that was damaged
    report = make_report(material)
    write_sealed(file, {"key": key, "report": report})
    return report


def _content(metric: MetricSpec, folder: Path) -> list[Any]:
    """What the overlap with a metric's rows depends on."""
    try:
        return [identity_fields(metric), metric_digests(metric, folder, sha256)]
    except (InvalidInput, OSError) as error:
        return [str(error)]  # told where the rows are read


def make_report(material: Material) -> Report:
    """Look at all rows of a stage; nothing random is drawn, and the same rows give the same report."""
    stage, mixture, masks, folder = material.stage, material.mixture, material.masks, material.folder
    uses = Counter(mixture.origins)
    at = {origin: number for number, origin in reversed(list(enumerate(mixture.origins)))}
    lines = sorted(uses)
    rows = [mixture.rows[at[origin]] for origin in lines]
    doubles = duplicates(rows)
    used = [_Line(origin, masks.each[at[origin]], uses[origin]) for origin in lines]
    per_pass = sum(line.uses for line in used), sum(line.uses * line.mask.seen for line in used)
    sources = []
    for number, (spec, count) in enumerate(zip(stage.data, mixture.counts, strict=True)):
        own = [line for line in used if line.origin.source == number]
        record = count.as_record(folder)
        sources.append(
            {
                "source": record["source"],
                "available": count.used,
                "left_out": {"rows": record["dropped"], "shown": record["first_dropped"]},
                "weight": spec.weight if spec.share is None else None,
                "wanted_share": spec.share,
                **_figures(own, per_pass, folder),
                "duplicates": _by_place(doubles, lines, number),
            }
        )
    report: Report = {
        "version": VERSION,
        "stage": stage.name,
        "kind": stage.kind,
        "sequence_length": stage.train.sequence_length,
        "total": {**_figures(used, per_pass, folder), "duplicates": _by_place(doubles, lines, None)},
        "sources": sources,
        "turn_end": _turn_end(material, used),
        "duplicates": {
            "rows": len(doubles.found),
            "share": _share(len(doubles.found), len(lines)),
            "searched": doubles.searched,
            "threshold": THRESHOLD,
            "words": RUN,
            "shown": _pairs(doubles, lines, folder),
        },
        "overlap": {"words": LONG, "sets": overlaps(material.metrics, folder, rows)},
        "samples": _samples(material),
    }
    for one in report["overlap"]["sets"]:
        for example in one["shown"]:
            example["with"] = lines[example["with"]].place(folder)
    report["warnings"] = warnings(report)
    return report


@dataclass(frozen=True, slots=True)
class _Line:
    """A line of a file that is trained on."""

    origin: Origin
    mask: RowMask
    uses: int
    """In a pass."""


def _figures(lines: Sequence[_Line], per_pass: tuple[int, int], folder: Path) -> Report:
    rows = sum(line.uses for line in lines)
    seen = sum(line.uses * line.mask.seen for line in lines)
    trained = sum(line.uses * line.mask.trained for line in lines)
    return {
        "rows": len(lines),
        "rows_per_pass": rows,
        "tokens_per_pass": seen,
        "trained_tokens_per_pass": trained,
        "trained_share": _share(trained, seen),
        "share_of_rows": _share(rows, per_pass[0]),
        "share_of_tokens": _share(seen, per_pass[1]),
        "lengths": _lengths([line.mask.length for line in lines]),
        "truncated": _counted(lines, lambda mask: mask.truncated, folder),
        "dropped": _counted(lines, lambda mask: not mask.trained, folder),
    }


def _share(part: int, whole: int) -> float:
    return round(part / whole, 4) if whole else 0.0


def _lengths(lengths: Iterable[int]) -> dict[str, float]:
    ordered = sorted(lengths)
    if not ordered:
        return dict.fromkeys([*_QUANTILES, "mean"], 0)
    found: dict[str, float] = {name: ordered[round(q * (len(ordered) - 1))] for name, q in _QUANTILES.items()}
    return found | {"mean": round(sum(ordered) / len(ordered), 1)}


def _counted(lines: Sequence[_Line], is_one: Callable[[RowMask], bool], folder: Path) -> Report:
    found = [line.origin for line in lines if is_one(line.mask)]
    return {"rows": len(found), "shown": [origin.place(folder) for origin in found[:SHOWN]]}


def _by_place(doubles: Duplicates, lines: Sequence[Origin], source: int | None) -> dict[str, int]:
    """Duplicates of one source, or of all, by kind and by whether the earlier row is in the same source."""
    kinds = dict.fromkeys(("exact_within", "exact_across", "near_within", "near_across"), 0)
    for one in doubles.found:
        here, there = lines[one.row].source, lines[one.of].source
        if source in {None, here}:
            kinds[f"{'exact' if one.exact else 'near'}_{'within' if here == there else 'across'}"] += 1
    return kinds


def _pairs(doubles: Duplicates, lines: Sequence[Origin], folder: Path) -> list[Report]:
    """The first pairs of each kind, so that many of one do not hide the others."""
    kinds: Counter[tuple[int, int, bool]] = Counter()
    shown: list[Report] = []
    for one in doubles.found:
        at, of = lines[one.row], lines[one.of]
        kind = (at.source, of.source, one.exact)
        kinds[kind] += 1
        if kinds[kind] <= SHOWN // 2 and len(shown) < 2 * SHOWN:
            places = {"at": at.place(folder), "of": of.place(folder), "sources": [at.source, of.source]}
            shown.append(places | {"similarity": one.similarity, "exact": one.exact})
    return shown


def _turn_end(material: Material, used: Sequence[_Line]) -> Report:
    kept = [line.mask for line in used if line.mask.trained]
    if material.stage.needs_chat_template:
        end = turn_terminator(material.tokenizer)
    else:
        end = int(material.dataset[0]["input_ids"][-1])
    token = None if end is None else str(material.tokenizer.convert_ids_to_tokens(end))
    trained = 0 if end is None else sum(mask.ended for mask in kept)
    return {"token": token, "rows": len(kept), "trained": trained}


def _samples(material: Material) -> list[Report]:
    """Rows of as many sources as can be, those that fit into what is shown before others."""
    kept = [number for number, mask in enumerate(material.masks.each) if mask.trained]
    place_in_dataset = {number: place for place, number in enumerate(kept)}
    origins, each = material.mixture.origins, material.masks.each
    order = sorted(kept, key=lambda number: (each[number].length > SAMPLE_TOKENS, number))
    first: dict[int, int] = {}
    for number in order:
        first.setdefault(origins[number].source, number)
    chosen = list(dict.fromkeys([*first.values(), *order]))[:SAMPLES]
    rows = material.stage.token_rows(
        material.dataset.select([place_in_dataset[number] for number in chosen]), material.tokenizer
    )
    return [
        {
            "at": origins[number].place(material.folder),
            "tokens": int(ids.shape[1]),
            "cut": ids.shape[1] > SAMPLE_TOKENS,
            "segments": _segments(ids[0].tolist(), labels[0].tolist(), material.tokenizer),
        }
        for number, (ids, labels) in zip(chosen, rows, strict=True)
    ]


def _segments(ids: list[int], labels: list[int], tokenizer: "PreTrainedTokenizerBase") -> list[Report]:
    pairs = list(zip(ids, labels, strict=True))[:SAMPLE_TOKENS]
    return [
        {"text": str(tokenizer.decode([token for token, _ in run])), "trained": trained}
        for trained, run in groupby(pairs, key=lambda pair: pair[1] != IGNORED)
    ]
