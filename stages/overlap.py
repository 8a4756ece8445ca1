"""Training rows that hold what a metric measures on: the runs of words that both have.

The measure of Brown et al. (arXiv 2005.14165, appendix C): an example of an evaluation set overlaps where any run of 13
words of it, without case and punctuation, occurs in the training rows. Examples of 8 to 12 words are judged by runs of
8; shorter ones are not, for such runs mean nothing. Nothing is dropped: that is for people to decide.
"""

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from specs.data import FORMATS, DataSpec
from specs.metric import GenerationSpec, JudgeSpec, LmEvalSpec, MetricSpec, PerplexitySpec, PreferenceSpec
from specs.printable import printable_line
from stages.data import Line, read_lines
from stages.errors import InvalidInput
from stages.metrics.harness import is_task_file, scored_files
from stages.metrics.held_out import row_schema
from stages.rows import Row
from stages.words import words_of

MeasuredOnRows = PerplexitySpec | PreferenceSpec | GenerationSpec | LmEvalSpec
LONG, SHORT = 13, 8
"""Words of a run: of examples that have as many, and of shorter ones."""
MOST_RUNS = 4_000_000
"""Runs of all evaluation sets that are kept, about 0.6 GB; examples beyond are counted as not looked at."""
SHOWN = 5
"""Examples of each set that are named."""


class Found(NamedTuple):
    """Where a run of words of an example was met first."""

    place: int
    """Of the training row, among those that were given."""
    words: str


@dataclass(slots=True)
class EvaluationSet:
    """The examples of one metric, as runs of words."""

    metric: str
    unread: str | None = None
    """Why the set was not looked at, or not as a whole."""
    lines: list[Line] = field(default_factory=list)
    """Of the examples that can be judged."""
    runs: list["array[int]"] = field(default_factory=list)
    """Hashes of the runs of each of them."""
    sizes: set[int] = field(default_factory=set)
    """Words of a run that occur: `LONG`, `SHORT`."""
    too_short: int = 0
    beyond: int = 0
    """Examples beyond `MOST_RUNS`."""


def evaluation_sets(metrics: dict[str, MetricSpec], folder: Path, number: Callable[[str], int]) -> list[EvaluationSet]:
    """The evaluation sets of all metrics whose rows are files on this machine.

    Args:
        metrics: by name.
        folder: the spec's.
        number: gives each word a number of its own.
    """
    sets, left = [], MOST_RUNS
    for name, metric in metrics.items():
        if isinstance(metric, JudgeSpec):
            continue  # its prompts are those of the metric that it reads
        one = EvaluationSet(name)
        sets.append(one)
        try:
            for line, row in _examples(metric, folder):
                words = [number(word) for word in words_of(row)]
                runs = array("q", dict.fromkeys(run for _, run in _runs(words, _size(words))))
                if not runs:
                    one.too_short += 1
                elif len(runs) > left:
                    one.beyond += 1
                else:
                    left -= len(runs)
                    one.sizes.add(_size(words))
                    one.lines.append(line)
                    one.runs.append(runs)
            if not (one.lines or one.too_short or one.beyond):
                one.unread = "no examples are where the metric's task looks for them"
        except (InvalidInput, OSError) as error:
            one.unread = printable_line(str(error))[:300]
    return sets


def overlaps(metrics: dict[str, MetricSpec], folder: Path, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """What of each metric's evaluation set occurs in the rows, as `stages.data_report` documents it.

    In ``examples``, ``with`` is the place of the training row in ``rows``.
    """
    numbers: dict[str, int] = {}
    sets = evaluation_sets(metrics, folder, lambda word: numbers.setdefault(word, len(numbers)))
    wanted = {run for one in sets for runs in one.runs for run in runs}
    sizes = sorted({size for one in sets for size in one.sizes})
    found = _search(rows, numbers, wanted, sizes) if wanted else {}
    return [_record(one, found, folder) for one in sets]


def _search(rows: Iterable[Row], numbers: dict[str, int], wanted: set[int], sizes: Sequence[int]) -> dict[int, Found]:
    """The first place of every wanted run that occurs. A word of no evaluation set ends a stretch: most are short."""
    found: dict[int, Found] = {}
    for place, row in enumerate(rows):
        words = words_of(row)
        known = [numbers.get(word, -1) for word in words]
        for start, end in _stretches(known):
            for size in sizes:
                for offset, run in _runs(known[start:end], size):
                    if run in wanted and run not in found:
                        found[run] = Found(place, " ".join(words[start + offset : start + offset + size]))
    return found


def _stretches(known: list[int]) -> Iterator[tuple[int, int]]:
    """Beginning and end of every stretch of known words that is long enough for a run."""
    start = 0
    for place, word in enumerate([*known, -1]):
        if word < 0:
            if place - start >= SHORT:
                yield start, place
            start = place + 1


def _size(words: Sequence[int]) -> int:
    return LONG if len(words) >= LONG else SHORT


def _runs(words: Sequence[int], size: int) -> Iterator[tuple[int, int]]:
    """Offset and hash of every run; of whole numbers, Python's hash is the same in every process."""
    for offset in range(len(words) - size + 1):
        yield offset, hash(tuple(words[offset : offset + size]))


def _record(one: EvaluationSet, found: dict[int, Found], folder: Path) -> dict[str, Any]:
    overlapping = contained = 0
    examples: list[dict[str, Any]] = []
    for line, runs in zip(one.lines, one.runs, strict=True):
        met = [found[run] for run in runs if run in found]
        if not met:
            continue
        overlapping += 1
        contained += 2 * len(met) >= len(runs)
        if len(examples) < SHOWN:
            at = printable_line(f"{line.file.removeprefix(f'{folder}/')}:{line.line}")
            part = round(len(met) / len(runs), 3)
            examples.append({"at": at, "with": met[0].place, "words": met[0].words, "part": part})
    judged = len(one.lines)
    return {
        "metric": one.metric,
        "not_looked_at": one.unread,
        "examples": judged + one.too_short + one.beyond,
        "judged": judged,
        "too_short": one.too_short,
        "beyond": one.beyond,
        "overlapping": overlapping,
        "share": round(overlapping / judged, 4) if judged else 0.0,
        "contained": contained,
        "shown": examples,
    }


def _examples(metric: MeasuredOnRows, folder: Path) -> Iterator[tuple[Line, Row]]:
    """What a metric measures on, and where it stands.

    Raises:
        InvalidInput: it is not in files here, or they cannot be read.
    """
    if not isinstance(metric, LmEvalSpec):
        yield from islice(read_lines(metric.data, folder, row_schema(metric), metric.limit), metric.limit)
        return
    if not is_task_file(metric.task):
        raise InvalidInput(f"the rows of the installed task {metric.task} are no files of the spec")
    yield from islice(_task_examples(folder / metric.task, folder), metric.limit)


def _task_examples(task: Path, folder: Path) -> Iterator[tuple[Line, Row]]:
    for name in scored_files(task):
        if not name.endswith(FORMATS):
            raise InvalidInput(f"{name}: cannot tell its format; read are {', '.join(FORMATS)}")
        source = DataSpec(path=name, on_bad_row="drop", max_bad_rows="100%")
        yield from read_lines(source, folder, lambda row: row)
