"""What a run looks like in a terminal: one line per step, progress bars, a table at the end."""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from flows.process import Event
from flows.summary import Summary
from stages.approval import questions, standing
from stages.disk import Estimate
from stages.plan import Plan, Step
from stages.tiers import tier_lines

PIPED = 120
"""Columns of a table that goes into a file or a pipe, unless ``COLUMNS`` says otherwise."""


def width(environment: Mapping[str, str], *, is_terminal: bool) -> int | None:
    """Columns to print in: the ones that ``COLUMNS`` names, or the terminal's own (None)."""
    asked = environment.get("COLUMNS", "")
    if asked.isdecimal() and int(asked) > 0:
        return int(asked)
    return None if is_terminal else PIPED


out = Console(highlight=False, width=width(os.environ, is_terminal=sys.stdout.isatty()))
err = Console(stderr=True, highlight=False)
_COLOUR = {"passed": "green", "failed": "red", "undecided": "yellow"}


class Watcher:
    """Progress bars for the step at work; a plain line per phase where there is no terminal."""

    def __init__(self) -> None:
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=err,
            transient=True,
            disable=not err.is_terminal,
        )
        self._task: Any = None

    def __enter__(self) -> Callable[[Step, Event], None]:
        """Start drawing; returns what hears the events."""
        self._progress.start()
        return self._hear

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the terminal clean."""
        self._progress.stop()

    def _hear(self, step: Step, event: Event) -> None:
        kind = event["event"]
        if kind == "phase_started":
            self._start(f"{escape(step.title)}: {event['phase']}")
        elif kind == "progress":
            loss = event.get("loss")
            self._move(event["step"], event["total"], "" if loss is None else f"loss {loss:.3f}")
        elif kind == "measuring":
            self._move(event["done"], event["total"], event["metric"])
        elif kind == "phase_done":
            err.print(f"[green]✓[/] {escape(step.title)}: {event['phase']} [dim]{event['seconds']:.1f} s[/]")
        elif kind == "info":
            err.print(f"  {event['message']}", style="dim", markup=False, soft_wrap=True)

    def _start(self, description: str) -> None:
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._task = self._progress.add_task(description, total=None, note="")

    def _move(self, done: int, total: int, note: str) -> None:
        if self._task is not None:
            self._progress.update(self._task, completed=done, total=total, note=note)


def print_plan(plan: Plan, details: Mapping[str, Sequence[str]], room: Estimate | None = None) -> None:
    """Which steps will run, and why; under a step its own lines from ``details``, by its name; the disk they need."""
    asked = {question.step.name: [standing(question)] for question in questions(plan)}
    for step in plan.steps:
        if step.artifact is None:
            mark, text = "[yellow]run     [/]", step.reason
        elif step.missing:
            names = ", ".join(one.metric for one in step.missing)
            mark, text = "[yellow]evaluate[/]", f"{step.reason}; not measured yet: {names}"
        else:
            mark, text = "[green]keep    [/]", step.reason
        kind = "" if step.stage is None else f" [dim]({step.stage.kind}, {step.stage.method.kind})[/]"
        out.print(f"{mark} {step.order} {escape(step.title)}{kind}: {escape(text)}")
        for line in (*asked.get(step.name, ()), *details.get(step.name, ()), *_other_attempts(plan, step)):
            out.print(f"{' ' * 11}{line}", style="dim", markup=False, soft_wrap=True)
    for reference in plan.references:
        if reference.artifact is not None and reference.missing:
            names = ", ".join(one.metric for one in reference.missing)
            out.print(f"[yellow]evaluate[/] {reference.order} {escape(reference.title)}: not measured yet: {names}")
    for line in tier_lines(plan):
        out.print(line, style="dim", markup=False, soft_wrap=True)
    if room is not None and room.needed:
        out.print(str(room), style="dim" if room.fits else "red", markup=False, soft_wrap=True)


def _other_attempts(plan: Plan, step: Step) -> list[str]:
    return [
        f"attempt {other.attempt} of {other.attempts} ({other.words}): {_standing(plan, other)}"
        for other in plan.others
        if other.order == step.order
    ]


def _standing(plan: Plan, attempt: Step) -> str:
    if attempt.artifact is None:
        return "only if the gates refuse those before it" if attempt.damaged is None else attempt.reason
    if attempt.missing:
        return "published, not measured"
    return "passes, too" if all(one.passed for one in plan.verdicts(attempt)) else "refused by its gates"


def print_warnings(warnings: Sequence[object]) -> None:
    """What a spec is advised against, a line each: nothing is refused by it."""
    for warning in warnings:
        err.print(str(warning), style="yellow", markup=False, soft_wrap=True)


def print_summary(summary: Summary) -> None:
    """Metrics per step, verdicts, costs, and where the model is."""
    _table(summary.title, summary.columns, summary.metrics)
    _table("", summary.release_columns, summary.release_metrics)
    for stage, verdict in summary.verdicts:
        out.print(
            f"gate [{_COLOUR[verdict.outcome]}]{verdict.outcome}[/] {escape(stage)}: {escape(verdict.reason)}",
            soft_wrap=True,
        )
    for stage, said in summary.decisions:
        out.print(f"decision {stage}: {said}", markup=False, soft_wrap=True)
    _table("", summary.columns, summary.costs)


def _table(title: str, columns: tuple[str, ...], rows: tuple[tuple[str, ...], ...]) -> None:
    if not rows:
        return
    table = Table(title=title or None, title_justify="left")
    for number, name in enumerate(columns):
        table.add_column(name, justify="left" if number == 0 else "right", no_wrap=number == 0)
    for row in rows:
        table.add_row(*map(escape, row))
    out.print(table)
