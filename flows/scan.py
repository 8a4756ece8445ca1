"""`trivium scan`: the signal-to-noise table of a checkpoint, on the terminal and as files."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from flows.terminal import err, out
from stages.artifact import require_writable
from stages.errors import InvalidInput
from stages.layout import read_layout

if TYPE_CHECKING:
    from stages.scan.score import Kind
    from stages.scan.walk import Progress as Listener
    from stages.scan.walk import Scored


def scan_model(model: Path, name: str, output: Path, percent: float, by: "Kind", embeddings: bool) -> None:
    """Scan a checkpoint, print the table by module type and write every file.

    Args:
        model: the checkpoint's folder.
        name: of the model, for file names.
        output: the folder that gets files, plot and cache.
        percent: share of each module type to select.
        by: the score that ranks.
        embeddings: whether the list to unfreeze opens with head and embedding.

    Raises:
        InvalidInput: not a checkpoint that can be scanned, or an output folder that cannot be written to.
    """
    layout = read_layout(model)  # before numpy: a wrong path is answered at once
    _make(output)
    from stages import plots
    from stages.scan import files, walk
    from stages.scan.select import ranks, top

    with _progress() as listen:
        scored = walk.scan(layout, output, listen)
    values = {one.matrix.key: one.value(by) for one in scored}
    places = ranks(layout.matrices, lambda matrix: values[matrix.key])
    selected = {matrix.key for matrix in top(layout.matrices, places, percent)}
    _print_table(scored, selected)
    for line in walk.warnings(scored, by):
        err.print(f"warning: {line}", style="yellow", markup=False, soft_wrap=True)
    always = files.always_listed(layout) if embeddings else []
    written = files.write(scored, output, name, percent, by, always)
    rows = [
        files.as_row(one) | {"rank": places[one.matrix.key], "selected": one.matrix.key in selected} for one in scored
    ]
    os.environ.setdefault("MPLBACKEND", "agg")
    plots.draw_spectrum(rows, output / plots.SPECTRUM)
    for file in (*written, output / plots.SPECTRUM):
        out.print(f"wrote {file}", markup=False, soft_wrap=True)


def _make(output: Path) -> None:
    """Make sure of the output folder before the work, which may take an hour."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = "a file, not a folder" if output.is_file() else f"cannot be made ({error.strerror})"
        raise InvalidInput(f"{output}: {reason}; name another folder with --output") from error
    require_writable(output)


def layer_ranges(layers: Sequence[int]) -> str:
    """Layer numbers in few words: ``0-3, 7``."""
    spans: list[list[int]] = []
    for layer in sorted(set(layers)):
        if spans and spans[-1][1] == layer - 1:
            spans[-1][1] = layer
        else:
            spans.append([layer, layer])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)


def _print_table(scored: "Sequence[Scored]", selected: set[Any]) -> None:
    table = Table(title="scores per module type: least, median, greatest", title_justify="left")
    table.add_column("module type", no_wrap=True)
    for column in ("matrices", "reference", "marchenko_pastur", "noise values"):
        table.add_column(column, justify="right")
    table.add_column("selected layers")
    for kind in sorted({one.matrix.type for one in scored}):
        own = [one for one in scored if one.matrix.type == kind]
        noise = [one.scores.noise for one in own]
        table.add_row(
            kind,
            str(len(own)),
            _three([one.scores.snr for one in own]),
            _three([one.scores.snr_mp for one in own]),
            f"{min(noise)}-{max(noise)} of {own[0].scores.values}",
            layer_ranges([one.matrix.layer for one in own if one.matrix.key in selected]),
        )
    out.print(table)


def _three(values: list[float]) -> str:
    return "  ".join(f"{value:.3g}" for value in (min(values), median(values), max(values)))


@contextmanager
def _progress() -> "Iterator[Listener]":
    columns = (TextColumn("scanning"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.description}"), console=err, transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total, module: bar.update(task, completed=done, total=total, description=module)
