"""What the report says, gathered from a plan and the files of its artifacts. Nothing here draws."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flows.report.charts import Axis, Point
from specs.metric import GenerationSpec
from specs.printable import printable
from stages.approval import decision_on, question_of
from stages.artifact import Artifact, short
from stages.data_report import DATA_REPORT
from stages.diagnostics.stage import diagnostics_of
from stages.documents import read_object
from stages.errors import InvalidInput
from stages.evaluate import Evaluation
from stages.plan import RELEASE, Plan, Step

PROMPTS = 12
"""Prompts of a metric that are shown."""
LONGEST = 2_000
"""Characters of a prompt or an answer that are shown."""
MOST_POINTS = 400
"""Of a curve: more would be drawn on top of one another."""
SURE = 1.959964
"""Standard errors to each side of the 95% interval."""


@dataclass(frozen=True)
class Link:
    """A step of the chain, at a glance."""

    name: str
    method: str
    state: str
    """One word: passed, refused, undecided, approved, rejected, waiting, warned, made, kept, missing, unmeasured."""
    line: str
    seconds: float | None


@dataclass(frozen=True)
class Stage:
    """A stage that is published, or an attempt at it."""

    name: str
    training: dict[str, Any]
    data: dict[str, Any] | None
    update: dict[str, Any] | None
    curve: list[dict[str, float]] = field(default_factory=list)

    @property
    def spectrum(self) -> list[dict[str, Any]]:
        """The scores of every matrix, where the method is Spectrum."""
        method = self.training.get("method")
        rows = method.get("spectrum") if isinstance(method, dict) else None
        return list(rows) if isinstance(rows, list) else []


@dataclass(frozen=True)
class Trade:
    """Learning against forgetting."""

    points: tuple[Point, ...]
    x: Axis
    y: Axis
    why: str
    """How the two axes were chosen."""


def chain(plan: Plan) -> list[Link]:
    """Every step of the plan, and the attempts that were refused, in order."""
    steps = sorted(plan.named, key=lambda step: (step.order, step.attempt))
    return [_link(plan, step) for step in steps if step.artifact is not None or step in plan.steps]


def stages(plan: Plan) -> list[Stage]:
    """Every stage that is published, attempts included."""
    found = []
    for step in sorted(plan.named, key=lambda step: (step.order, step.attempt)):
        if step.stage is None or step.artifact is None:
            continue
        found.append(stage_facts(step.title, step.artifact))
    return found


def stage_facts(name: str, artifact: Artifact) -> Stage:
    """What the artifact of a stage says of it; what cannot be read is left out."""
    training = _kept(artifact.path / "training.json") or {}
    trained = training.get("training")
    curve = trained.get("curve") if isinstance(trained, dict) else None
    data = _kept(artifact.path / DATA_REPORT)
    return Stage(name, training, data, diagnostics_of(artifact), _thinned(curve if isinstance(curve, list) else []))


def trade(plan: Plan) -> Trade | None:
    """What to plot learning and forgetting by, and where each model stands; None where nothing can be said.

    Learning is the metric of the first gate that wants an improvement, or else a minimum or a maximum; forgetting that
    of the first `keeps` gate over another metric. Without such gates, nobody has said what either is.
    """
    release = plan.pipeline.release
    gates = [gate for stage in plan.pipeline.stages for gate in stage.gates] + list(release.gates if release else ())
    learning = [gate for gate in gates if gate.improves_on is not None] or [
        gate for gate in gates if gate.keeps is None
    ]
    learned = learning[0] if learning else None
    kept = next((gate for gate in gates if gate.keeps is not None and learned and gate.metric != learned.metric), None)
    if learned is None or kept is None:
        return None
    points, directions = [], {}
    for step in plan.steps:
        if step.name == RELEASE:
            continue
        measured = [_measure(step, gate.metric_name, gate.measure) for gate in (learned, kept)]
        if all(one is not None and math.isfinite(one.value) for one in measured):
            x, y = (one for one in measured if one is not None)
            directions = {"x": x.better == "higher", "y": y.better == "higher"}
            errors = [SURE * (one.standard_error or 0.0) for one in (x, y)]
            points.append(Point(step.name, x.value, y.value, errors[0], errors[1]))
    if len(points) < 2:
        return None
    why = f"learned is what gate «{learned}» judges, kept what gate «{kept}» judges: the first of each kind in the spec"
    return Trade(
        tuple(points),
        Axis(f"learned: {learned.metric}", directions["x"]),
        Axis(f"kept: {kept.metric}", directions["y"]),
        why,
    )


def samples(plan: Plan) -> list[dict[str, Any]]:
    """Answers to the same prompts side by side: of each generation metric, the base and every stage."""
    found = []
    for metric, spec in plan.pipeline.metrics.items():
        if not isinstance(spec, GenerationSpec):
            continue
        measured = [(step.name, one) for step in plan.steps if (one := step.evaluation(metric)) is not None]
        if not measured:
            continue
        rows = []
        for number, first in enumerate(measured[0][1].samples[:PROMPTS]):
            answers = [(name, _answer(one, number)) for name, one in measured]
            prompt = "\n".join(message["content"] for message in first["prompt"])
            rows.append({"prompt": _cut(prompt), "reference": _cut(first["reference"] or ""), "answers": answers})
        found.append({"metric": metric, "rows": rows, "of": len(measured[0][1].samples)})
    return found


def costs(plan: Plan) -> list[dict[str, Any]]:
    """Time by phase, tokens per second and peak memory of every step."""
    found = []
    for step in plan.steps:
        record = step.record
        if not record:
            continue
        phases = {name: float(seconds) for name, seconds in record.get("durations", {}).items()}
        phases["evaluate"] = step.seconds_measuring
        found.append(
            {
                "name": step.title,
                "phases": phases,
                "seconds": sum(phases.values()),
                "speed": _tokens_per_second(step, record),
                "memory": record.get("peak_memory"),
                "trained": record.get("training", {}).get("trainable_parameters"),
            }
        )
    return found


def lineage(plan: Plan) -> list[dict[str, Any]]:
    """What came of what: identities, when, and with which versions."""
    found = []
    for step in plan.steps:
        if step.artifact is None:
            continue
        parent = step.artifact.manifest["inputs"].get("parent")
        record = step.record
        found.append(
            {
                "name": step.title,
                "folder": step.artifact.path.name,
                "identity": step.artifact.identity,
                "parent": None if parent is None else short(parent),
                "published": record.get("published", ""),
                "versions": record.get("versions", {}),
            }
        )
    return found


def _link(plan: Plan, step: Step) -> Link:
    method = "" if step.stage is None else f"{step.stage.kind} · {step.stage.method.kind}"
    if step.artifact is None:
        return Link(step.title, method, "missing", step.reason, None)
    durations = step.record.get("durations", {})
    seconds = sum(durations.values()) + step.seconds_measuring
    if step.missing:
        names = ", ".join(one.metric for one in step.missing)
        return Link(step.title, method, "unmeasured", f"not measured yet: {names}", seconds)
    state, line = _judged(plan, step)
    return Link(step.title, method, state, line, seconds)


def _judged(plan: Plan, step: Step) -> tuple[str, str]:
    verdicts = plan.verdicts(step)
    if not verdicts:
        released = step.name == RELEASE
        return (
            ("released", str(step.artifact.loadable.name) if step.artifact else "")
            if released
            else ("made", "no gates")
        )
    against = [verdict for verdict in verdicts if not verdict.passed]
    if not against:
        return "passed", f"{len(verdicts)} of {len(verdicts)} gates passed"
    line = "; ".join(verdict.reason for verdict in against)
    asked = question_of(step, verdicts)
    if asked is not None:
        decision = decision_on(asked)
        if decision is None:
            return "waiting", f"a person decides: {line}"
        return ("approved" if decision.approved else "rejected"), f"{decision}"
    if step.policy == "warn":
        return "warned", line
    undecided = all(verdict.outcome == "undecided" for verdict in against)
    return ("undecided" if undecided else "refused"), line


def _measure(step: Step, metric: str, measure: str | None) -> Any:
    evaluation = step.evaluation(metric)
    return None if evaluation is None else evaluation.measure(measure)


def _answer(evaluation: Evaluation, number: int) -> str:
    return _cut(evaluation.samples[number]["answer"]) if number < len(evaluation.samples) else ""


def _cut(text: str) -> str:
    text = printable(text)
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def _tokens_per_second(step: Step, record: dict[str, Any]) -> float | None:
    """Tokens that went through the model in training; of a stage that was resumed, its seconds are not all known."""
    training, seconds = record.get("training", {}), record.get("durations", {}).get("train")
    report = None if step.artifact is None else _kept(step.artifact.path / DATA_REPORT)
    if step.stage is None or report is None or not seconds or training.get("resumed_at"):
        return None
    try:
        per_sequence = report["total"]["tokens_per_pass"] / max(1, training.get("sequences", 0))
        return float(training["steps"] * step.stage.train.batch_size * per_sequence / seconds)
    except (LookupError, TypeError):  # damaged, or of another version
        return None


def _thinned(curve: list[Any]) -> list[dict[str, float]]:
    """The entries that tell a step and a loss, so many at most."""
    told = [
        {"step": entry["step"], "loss": float(entry["loss"]), "rate": float(entry.get("learning_rate") or 0.0)}
        for entry in curve
        if isinstance(entry, dict)
        and isinstance(entry.get("step"), int)
        and isinstance(entry.get("loss"), int | float)
        and isinstance(entry.get("learning_rate"), int | float | None)
    ]
    step = max(1, math.ceil(len(told) / MOST_POINTS))
    return [one for number, one in enumerate(told) if number % step == 0 or number == len(told) - 1]


def _kept(file: Path) -> dict[str, Any] | None:
    """A document of an artifact, or None where it is not there or cannot be read: the page goes on without it."""
    try:
        return read_object(file)
    except InvalidInput:
        return None
