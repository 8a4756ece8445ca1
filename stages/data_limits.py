"""What a data report means for its stage: what is told, what is advised against, and what is refused."""

from typing import Any

from specs.data import DataLimits, exceeds
from stages.errors import InvalidInput
from stages.objective import ObjectiveSpec

Report = dict[str, Any]
"""As `stages.data_report` documents it."""

DUPLICATES = 0.05
"""Share of a stage's rows from which on duplicates are warned of."""
OVERLAP = 0.01
"""Share of an evaluation set's examples from which on their overlap is warned of."""
TRUNCATED = 0.1
DROPPED = 0.01
"""Shares of a stage's rows."""
PASSES = 4
"""Uses of a row in a pass up to which repeated data is almost as good as new (Muennighoff et al., arXiv 2305.16264)."""
MISSED = 0.1
"""How far a share may be from what was asked for, relative to it; rows cannot be cut to fit."""


def summary(report: Report) -> str:
    """One line: rows, tokens, and what is remarkable."""
    total, sets = report["total"], report["overlap"]["sets"]
    doubles = report["duplicates"]
    parts = [
        f"{total['rows_per_pass']:,} rows and {total['tokens_per_pass']:,} tokens per pass, "
        f"{100 * total['trained_share']:.3g}% of them trained",
        f"{doubles['rows']:,} duplicates",
        f"{total['truncated']['rows']:,} rows truncated, {total['dropped']['rows']:,} dropped",
    ]
    looked = [one for one in sets if one["judged"]]
    if looked:
        parts.append("overlap " + ", ".join(f"{one['metric']} {one['overlapping']}/{one['judged']}" for one in looked))
    return f"data of {report['stage']}: {'; '.join(parts)}"


def warnings(report: Report) -> list[str]:
    """What is remarkable, and not refused: a line each, with an example and what could be done."""
    found = []
    total, doubles = report["total"], report["duplicates"]
    if doubles["share"] > DUPLICATES:
        found.append(
            f"{doubles['rows']:,} of {total['rows']:,} rows ({100 * doubles['share']:.3g}%) are, or nearly are, an "
            f"earlier one{_first_pair(doubles)}: they count more than the others, and are learned by heart first"
        )
    for one in report["overlap"]["sets"]:
        if one["share"] > OVERLAP:
            found.append(f"{_overlap(one)}: what is learned by heart looks like an ability; take such rows out")
        if one["not_looked_at"]:
            found.append(f"overlap with metric {one['metric']} was not looked at: {one['not_looked_at']}")
    for name, most, remedy in (
        ("truncated", TRUNCATED, "their end is lost"),
        ("dropped", DROPPED, "nothing to learn of them is within the sequence length"),
    ):
        rows = total[name]["rows"]
        if rows > most * total["rows"]:
            found.append(f"{_rows(report, name)}; {remedy}: raise train.sequence_length, or shorten them")
    if report["turn_end"]["token"] is None:
        found.append("the chat template ends a turn without a token of its own: the model does not learn to stop")
    return found + _shares(report)


def _shares(report: Report) -> list[str]:
    found = []
    for one in report["sources"]:
        wanted, got = one["wanted_share"], one["share_of_tokens"]
        if not one["rows"]:
            found.append(
                f"{one['source']}: none of its {one['available']:,} rows is trained on at a weight of "
                f"{one['weight']:g}: raise it, or remove the source"
            )
        if wanted is not None and abs(got - wanted) > MISSED * wanted:
            found.append(f"{one['source']} makes up {got:.3g} of the tokens, not {wanted:g}: its rows are too long")
        if wanted is not None and one["rows_per_pass"] > PASSES * one["rows"]:
            found.append(
                f"{one['source']} has {one['available']:,} rows, and its share of {wanted:g} uses each "
                f"{one['rows_per_pass'] / one['rows']:.3g} times a pass: add rows, or lower the share"
            )
    return found


def refusals(report: Report, limits: DataLimits) -> list[str]:
    """What is surely wrong, and what is beyond the limits of the spec: a line each."""
    found = []
    end = report["turn_end"]
    if report["kind"] == "ift" and end["token"] is not None and not end["trained"]:
        found.append(
            f"in none of the {end['rows']:,} rows the end of a turn ({end['token']}) is learned, so the model would "
            "not learn to stop: every answer is longer than train.sequence_length; raise it"
        )
    found += [line for number in range(len(report["sources"])) if (line := _nothing_new(number, report)) is not None]
    total, doubles = report["total"], report["duplicates"]
    if limits.duplicates is not None and exceeds(doubles["rows"], limits.duplicates, total["rows"]):
        found.append(
            f"{doubles['rows']:,} of {total['rows']:,} rows are, or nearly are, an earlier one{_first_pair(doubles)}; "
            f"{_allowed('duplicates', limits)}: take them out"
        )
    for name in ("truncated", "dropped"):
        limit = getattr(limits, name)
        if limit is not None and exceeds(total[name]["rows"], limit, total["rows"]):
            allowed = _allowed(name, limits)
            found.append(f"{_rows(report, name)}; {allowed}: raise train.sequence_length, or shorten them")
    if limits.overlap is not None:
        for one in report["overlap"]["sets"]:
            if exceeds(one["overlapping"], limits.overlap, one["judged"]):
                found.append(f"{_overlap(one)}; {_allowed('overlap', limits)}: take such rows out")
    return found


def judged(report: Report, stage: ObjectiveSpec) -> None:
    """Let the stage train, or not.

    Raises:
        InvalidInput: the report shows what is surely wrong, or more than the stage's `data_limits` let be.
    """
    if found := refusals(report, stage.data_limits):
        raise InvalidInput("\n".join(f"stage {stage.name}: {line}" for line in found))


def _nothing_new(number: int, report: Report) -> str | None:
    """That a source gives nothing but rows which are there already, or one row over and over."""
    source = report["sources"][number]
    kinds, rows = source["duplicates"], source["rows"]
    if rows < 2:
        return None
    pairs = (pair for pair in report["duplicates"]["shown"] if pair["exact"] and pair["sources"][0] == number)
    example = next(pairs, None)
    first = "" if example is None else f" ({example['at']} is {example['of']})"
    if kinds["exact_across"] + kinds["exact_within"] == rows:
        return f"{source['source']}: every row is also in a source before it{first}: remove it, or set a weight there"
    if kinds["exact_within"] == rows - 1:
        return f"{source['source']}: all {rows:,} rows are the same{first}: correct the file"
    return None


def _first_pair(doubles: Report) -> str:
    pair = next(iter(doubles["shown"]), None)
    return "" if pair is None else f" (first: {pair['at']} is like {pair['of']})"


def _rows(report: Report, name: str) -> str:
    one, rows = report["total"][name], report["total"]["rows"]
    first, length = one["shown"][0], report["sequence_length"]
    return f"{one['rows']:,} of {rows:,} rows are {name} at {length} tokens (first: {first})"


def _overlap(one: Report) -> str:
    first = one["shown"][0]
    return (
        f"{one['overlapping']:,} of {one['judged']:,} examples of metric {one['metric']} share a run of words with the "
        f"training rows (first: {first['at']} with {first['with']})"
    )


def _allowed(name: str, limits: DataLimits) -> str:
    return f"data_limits.{name} allows {getattr(limits, name)}"
