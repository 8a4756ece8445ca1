"""What each tier of measurements costs: how many examples, and how long it takes as far as that was ever timed."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specs.data import DataSpec
from specs.metric import LmEvalSpec, MetricSpec
from stages.data import files_of
from stages.errors import InvalidInput
from stages.job import Measurement, Tier
from stages.metrics.harness import is_task_file, scored_files
from stages.plan import RELEASE, Plan, Step

_MINUTE, _HOUR = 60, 3600


@dataclass(frozen=True, slots=True)
class Cost:
    """What one metric costs on one model."""

    examples: int | None
    """None where the rows are not here to be counted."""
    seconds: float | None
    """By what it took per example elsewhere; None where it was never measured."""

    def __str__(self) -> str:
        """A few words: `500 examples, about 12 s`."""
        count = "all examples" if self.examples is None else f"{self.examples:,} example{'s'[: self.examples != 1]}"
        return f"{count}, {'not timed yet' if self.seconds is None else f'about {duration(self.seconds)}'}"


def tier_lines(plan: Plan) -> list[str]:
    """What is measured when, what each metric costs on one model, and what is still to do of it; a line each.

    Empty where the spec has no metrics.
    """
    if not plan.pipeline.metrics:
        return []
    lines = [f"measured of the base and after each stage: {_listed(plan, 'stages', list(plan.pipeline.metrics))}"]
    if plan.pipeline.release is not None and plan.steps[-1].name == RELEASE:
        of = ", ".join([*(step.name for step in plan.references), "the released model"])
        lines.append(
            f"measured before the release, of {of}: {_listed(plan, 'release', plan.pipeline.release.measured)}"
        )
    ahead = [(step, one) for step in (*plan.steps, *plan.references) for one in step.missing]
    files = {one.file: (one, step) for step, one in ahead}
    if files:
        lines.append(_to_do(plan, [one for one, _ in files.values()]))
    return lines


def duration(seconds: float) -> str:
    """A time for people: 40 s, 12 min, 3.5 h."""
    if seconds < 2 * _MINUTE:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / _MINUTE:.0f} min" if seconds < 2 * _HOUR else f"{seconds / _HOUR:.1f} h"


def cost(plan: Plan, metric: str, tier: Tier) -> Cost:
    """What a metric costs on one model."""
    spec = plan.pipeline.metric(metric, tier)
    known = list(_known(plan, metric))
    same = [n for n, _, one in known if one == tier]
    examples = same[0] if same else _examples(spec, plan.folder)
    timed = [seconds / n for n, seconds, _ in known if n]
    if examples is None or not timed:
        return Cost(examples, None)
    return Cost(examples, examples * sum(timed) / len(timed))


def _listed(plan: Plan, tier: Tier, metrics: Any) -> str:
    return "; ".join(f"{name} ({cost(plan, name, tier)})" for name in metrics)


def _to_do(plan: Plan, ahead: list[Measurement]) -> str:
    costs = [cost(plan, one.metric, one.tier).seconds for one in ahead]
    timed = [seconds for seconds in costs if seconds is not None]
    said = f"about {duration(sum(timed))}" if timed else "none of which was timed yet"
    if timed and len(timed) < len(costs):
        said += f" for {len(timed)} of them; the others were not timed yet"
    return f"to measure now: {len(costs)} measurement{'s'[: len(costs) != 1]}, {said}"


def _known(plan: Plan, metric: str) -> Iterator[tuple[int, float, Tier]]:
    """Examples, seconds and tier of each time that a metric was measured in this plan."""
    seen: set[str] = set()
    steps: tuple[Step, ...] = (*plan.named, *plan.references)
    for step in steps:
        for one in step.measurements:
            if one.metric == metric and one.file not in seen and (found := step.evaluation(metric)) is not None:
                seen.add(one.file)
                measure = found.measure(None) or next(iter(found.measures.values()), None)
                if measure is not None:
                    yield measure.n, found.seconds, one.tier


def _examples(spec: MetricSpec, folder: Path) -> int | None:
    limit = getattr(spec, "limit", None)
    try:
        there = _rows_of_task(spec, folder) if isinstance(spec, LmEvalSpec) else _rows(spec, folder)
    except (InvalidInput, OSError):
        there = None  # told where the metric is checked
    return limit if there is None else there if limit is None else min(limit, there)


def _rows(spec: MetricSpec, folder: Path) -> int | None:
    source: DataSpec | None = getattr(spec, "data", None)  # a judge has none: it reads another metric's answers
    return None if source is None or source.path is None else _lines(files_of(source, folder))


def _rows_of_task(spec: LmEvalSpec, folder: Path) -> int | None:
    if not is_task_file(spec.task):
        return None
    return _lines([Path(file) for file in scored_files(folder / spec.task)])


def _lines(files: list[Path]) -> int | None:
    """Rows of files in which each has a line of its own; of other formats that needs a reader, and stays unknown."""
    if not files or any(file.suffix != ".jsonl" for file in files):
        return None
    total = 0
    for file in files:
        with file.open("rb") as rows:
            total += sum(bool(row.strip()) for row in rows)
    return total
