"""`trivium data`: what stages would train on, on the terminal, without training."""

from collections.abc import Iterable, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from flows.engine import Run
from flows.terminal import err, out
from specs.printable import printable, printable_line
from stages.check import read_spec
from stages.child import ChildFailed, ask
from stages.count import base_folder
from stages.errors import BY_EXIT_CODE, InvalidInput, StageFailed

_LENGTHS = ("min", "p5", "p25", "median", "p75", "p95", "max", "mean")

_FIGURES = ("source", "rows", "uses", "tokens", "share", "trained", "truncated", "dropped", "left out", "same", "near")

Report = dict[str, Any]


def print_data(asked: Run, stage: str | None) -> None:
    """Make the data reports of a spec's stages in a process of its own, and print them.

    Args:
        asked: what is looked at.
        stage: its name; None for all.

    Raises:
        InvalidInput: an unknown stage, a base that is not on this machine yet, rows that cannot be used, or what a run
            would refuse: all reports are printed before.
        StageFailed: the process broke.
    """
    pipeline, _ = read_spec(asked.spec)
    names = [one.name for one in pipeline.stages]
    if stage is not None and stage not in names:
        raise InvalidInput(f"--stage: no stage {stage!r} in {asked.spec}; its stages: {', '.join(names)}")
    plan = asked.plan(pipeline=pipeline)
    base = base_folder(plan)
    if base is None:
        raise InvalidInput(
            "the base is not prepared yet, so there is no tokenizer to count with: "
            f"`trivium run {asked.spec} --until {names[0]}` prepares it, and makes the report of {names[0]} before it "
            "trains"
        )
    request = {
        "pipeline": pipeline.model_dump(mode="json", exclude_unset=True),
        "folder": str(plan.folder),
        "base": str(base),
        "stages": names if stage is None else [stage],
    }
    answer = _ask(request)
    refused = []
    for one in answer:
        _print_report(one["report"])
        refused += [f"stage {one['report']['stage']}: {line}" for line in one["refused"]]
    if refused:
        raise InvalidInput("\n".join(refused))


def _ask(request: dict[str, Any]) -> list[dict[str, Any]]:
    try:
        answer = ask("stages.data_preview", request, {"CUDA_VISIBLE_DEVICES": "", "TRANSFORMERS_VERBOSITY": "error"})
    except ChildFailed as error:
        raise StageFailed(
            f"the process that looks at the data ended with {error.code}: {error.complaint[:300]}"
        ) from error
    if "error" in answer:
        raise BY_EXIT_CODE[answer["exit_code"]](answer["error"])
    stages: list[dict[str, Any]] = answer["stages"]
    return stages


def _print_report(report: Report) -> None:
    out.print(f"[bold]{report['stage']}[/] ({report['kind']}, sequences of {report['sequence_length']:,} tokens)")
    parts = [*report["sources"], report["total"] | {"source": "total"}] if len(report["sources"]) > 1 else None
    _print_sources(parts or report["sources"])
    _print_lengths(parts or report["sources"])
    end = report["turn_end"]
    if end["token"] is not None:
        _line(f"end of a turn or document: {end['token']}, learned in {end['trained']:,} of {end['rows']:,} rows")
    _print_places(report)
    _print_overlap(report["overlap"])
    for number, sample in enumerate(report["samples"], start=1):
        _print_sample(number, sample)
    for line in report["warnings"]:
        err.print(f"warning: {printable_line(line)}", style="yellow", markup=False, soft_wrap=True)


def _print_sources(sources: Iterable[Report]) -> None:
    rows = []
    for one in sources:
        kinds, wanted = one["duplicates"], one.get("wanted_share")
        share = f"{100 * one['share_of_tokens']:.3g}%" + ("" if wanted is None else f" (wanted {100 * wanted:.3g}%)")
        rows.append(
            (
                one["source"],
                f"{one['rows']:,}",
                f"{one['rows_per_pass']:,}",
                f"{one['tokens_per_pass']:,}",
                share,
                f"{100 * one['trained_share']:.3g}%",
                f"{one['truncated']['rows']:,}",
                f"{one['dropped']['rows']:,}",
                f"{one['left_out']['rows']:,}" if "left_out" in one else "",
                f"{kinds['exact_within'] + kinds['exact_across']:,}",
                f"{kinds['near_within'] + kinds['near_across']:,}",
            )
        )
    _table(_FIGURES, rows)


def _print_lengths(sources: Iterable[Report]) -> None:
    rows = [(one["source"], *(f"{one['lengths'][name]:,}" for name in _LENGTHS)) for one in sources]
    _table(("tokens of a row", *_LENGTHS), rows)


def _print_places(report: Report) -> None:
    for name in ("left_out", "truncated", "dropped"):
        found = [place for one in report["sources"] for place in one[name]["shown"]]
        total = sum(one[name]["rows"] for one in report["sources"])
        if found:
            more = f"; and {total - len(found):,} more" if total > len(found) else ""
            _line(f"{name.replace('_', ' ')}: {', '.join(found)}{more}")
    for pair in report["duplicates"]["shown"]:
        how = "is the same as" if pair["exact"] else f"is like ({pair['similarity']:.2f})"
        _line(f"duplicate: {pair['at']} {how} {pair['of']}")


def _print_overlap(overlap: Report) -> None:
    rows = []
    for one in overlap["sets"]:
        first = "; ".join(f"{example['at']} with {example['with']}" for example in one["shown"][:1])
        if one["not_looked_at"]:
            first = f"not looked at: {one['not_looked_at']}"
        rows.append((one["metric"], f"{one['judged']:,}/{one['examples']:,}", f"{one['overlapping']:,}", first))
    _table(("metric", "judged", "overlapping", "first"), rows)


def _table(names: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    if not rows:
        return
    table = Table()
    for number, name in enumerate(names):
        table.add_column(name, justify="left" if number == 0 or name == "first" else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable_line(cell)) for cell in row))
    out.print(table)


def _print_sample(number: int, sample: Report) -> None:
    """A row as the model gets it; what is learned stands in « », and in green where there are colours."""
    text = Text(f"row {number}, {sample['at']}, {sample['tokens']:,} tokens; « » is learned\n", style="bold")
    for segment in sample["segments"]:
        shown = printable(segment["text"])
        text.append(f"«{shown}»" if segment["trained"] else shown, style="green" if segment["trained"] else "dim")
    if sample["cut"]:
        text.append(" ...", style="dim")
    out.print(text, soft_wrap=True)


def _line(text: str) -> None:
    out.print(printable_line(text), markup=False, soft_wrap=True)
