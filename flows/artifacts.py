"""What the Prefect UI shows of a run: live progress, gate tables, curves, one report."""

import base64
import contextvars
import queue
import threading
import time
from contextlib import suppress
from types import TracebackType
from typing import Any

from prefect.artifacts import (
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)

from flows.engine import Outcome
from flows.markdown import escaped, table
from flows.process import Event
from flows.report.charts import alone, scatter
from flows.report.facts import stage_facts, trade
from flows.report.page import REPORT, pictures
from flows.summary import Summary, summarise
from stages.artifact import read
from stages.plan import Plan, Step

SECONDS_BETWEEN_UPDATES = 2.0


class Reporter:
    """Pushes a step's progress to the server from its own thread: a slow server never stalls training."""

    def __init__(self, step: Step) -> None:
        self._step = step
        self._news: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        context = contextvars.copy_context()  # artifacts belong to the flow run of the thread that made us
        self._thread = threading.Thread(target=context.run, args=(self._push,), daemon=True)

    def __enter__(self) -> "Reporter":
        """Start the thread."""
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let it send what is left, but do not wait for a server that is away."""
        self._news.put(None)
        self._thread.join(timeout=10)

    def hear(self, event: Event) -> None:
        """Take an event; only training progress is shown."""
        if event["event"] == "progress":
            self._news.put(event)

    def _push(self) -> None:
        artifact: Any = None
        sent = 0.0
        while (event := self._news.get()) is not None:
            last = event["step"] == event["total"]
            if not last and time.monotonic() - sent < SECONDS_BETWEEN_UPDATES:
                continue
            sent = time.monotonic()
            loss = event.get("loss")
            text = f"step {event['step']}/{event['total']}" + ("" if loss is None else f", loss {loss:.3f}")
            share = 100 * event["step"] / max(1, event["total"])
            with suppress(Exception):
                if artifact is None:
                    key = _key(*_owner(self._step), "progress")
                    artifact = create_progress_artifact(share, key=key, description=text)
                else:
                    update_progress_artifact(artifact, share, description=text)


def report_stage(step: Step, outcome: Outcome) -> None:
    """The gate table and the pictures of a stage. Never stops a run: what counts is on the disk."""
    with suppress(Exception):
        if outcome.verdicts:
            rows = [verdict.as_record() for verdict in outcome.verdicts]
            create_table_artifact(rows, key=_key(*_owner(step), "gates"), description=outcome.line)
    with suppress(Exception):  # a table that the server does not take costs no picture
        artifact = read(step.place)
        if artifact is not None:
            for name, (title, chart) in pictures(stage_facts(step.title, artifact)).items():
                create_markdown_artifact(
                    f"![{title}]({_data_uri(chart)})",
                    key=_key(*_owner(step), name),
                    description=f"{step.title}: {title}",
                )


def report_run(plan: Plan) -> None:
    """The table of the whole chain, at the flow run itself: the UI does not show a subflow's artifacts there."""
    with suppress(Exception):
        summary = summarise(plan)
        create_markdown_artifact(
            markdown(summary, plan), key=_key(summary.title, "report"), description=f"{summary.title}: every stage"
        )


def markdown(summary: Summary, plan: Plan | None = None) -> str:
    """The summary as a page: the chain, metrics, verdicts, costs, the model's folder."""
    # Under numbers: a stage may be called «end» or «graph», which are words of the diagram's language.
    chain = " --> ".join(f's{number}["{name}"]' for number, name in enumerate(summary.columns[1:]))
    parts = [f"# {summary.title}", f"```mermaid\ngraph LR\n{chain}\n```"]
    parts.append(_table(summary.columns, summary.metrics))
    if summary.release_metrics:
        parts.append(_table(summary.release_columns, summary.release_metrics))
    lines = [f"- **{verdict.outcome}** {stage}: {verdict.reason}" for stage, verdict in summary.verdicts]
    lines += [f"- **decision** {stage}: {escaped(said)}" for stage, said in summary.decisions]
    parts += ["\n".join(lines), _table(summary.columns, summary.costs)]
    if plan is not None:
        if (found := trade(plan)) is not None:
            title = "learned against kept, each stage a point"
            parts.insert(2, f"![{title}]({_data_uri(scatter(found.points, found.x, found.y))})")
        # A page from a server may not open a file: the path is to be copied.
        parts.append(f"Report: `{plan.store / REPORT}`")
    if summary.withheld:
        parts.append(f"**No model**: {summary.withheld}")
    if summary.release is not None:
        parts.append(f"Model: `{summary.release}`")
    return "\n\n".join(part for part in parts if part)


def _table(columns: tuple[str, ...], rows: tuple[tuple[str, ...], ...]) -> str:
    plain = [tuple(cell.replace("|", "\\|") for cell in row) for row in (columns, *rows)]
    return table(plain[0], plain[1:])


def _owner(step: Step) -> tuple[str, str]:
    """Pipeline and stage, or attempt at it: one server may show several pipelines, and keys are global."""
    return step.target.parent.name, step.name if step.attempt == 1 else f"{step.name}-attempt-{step.attempt}"


def _key(*parts: str) -> str:
    """An artifact key: lowercase letters, digits and dashes."""
    return "-".join(parts).replace("_", "-").lower()


def _data_uri(chart: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(alone(chart).encode()).decode()
