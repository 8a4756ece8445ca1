"""What a run came to, from the disk alone: the same table for the terminal, the Prefect UI and `show`."""

from dataclasses import dataclass
from pathlib import Path

from specs.metric import JudgeSpec
from stages.approval import decision_about, questions, standing
from stages.artifact import MODEL
from stages.evaluate import Evaluation
from stages.gate import Verdict
from stages.metrics.ranking import Comparison, Ranked, ranking
from stages.plan import RELEASE, Plan, Step

_ABSENT = "–"
_ANSWERS = ("self_bleu", "refusal_rate", "empty_rate", "truncated_rate", "repetition_rate", "length")
_EXTRA_MEASURES = {
    "reward_accuracy": ("reward_margin", "policy_accuracy", "length_bias"),
    "distinct_2": _ANSWERS,
    "chrf": ("exact_match", "distinct_2", *_ANSWERS),
    "win_rate": ("tie_rate", "consistency"),
}
"""What stands in the table beneath a metric's own choice, where it was measured."""


@dataclass(frozen=True)
class Summary:
    """Rows of text, ready to print."""

    title: str
    columns: tuple[str, ...]
    metrics: tuple[tuple[str, ...], ...]
    """A row per measure, a column per step."""
    costs: tuple[tuple[str, ...], ...]
    """Method, parameters, hand-over, time and memory, a column per step."""
    verdicts: tuple[tuple[str, Verdict], ...]
    """Stage and verdict, in order."""
    release: Path | None
    """The final model's folder, once it is released."""
    decisions: tuple[tuple[str, str], ...] = ()
    """Stage, and what a person decided on it or that one has to."""
    withheld: str = ""
    """Why there is none although the model is made: its gates refuse it."""
    release_columns: tuple[str, ...] = ()
    release_metrics: tuple[tuple[str, ...], ...] = ()
    """What was measured for the release: a column for each step that it is compared with, and its own."""


def summarise(plan: Plan) -> Summary:
    """The table of everything that is published of a pipeline."""
    steps = [step for step in plan.steps if step.name != RELEASE]
    tried = [step for step in plan.named if step.artifact is not None and not step.missing]
    tried.sort(key=lambda step: (step.order, step.attempt))
    judged = tuple((step.title, verdict) for step in tried for verdict in plan.verdicts(step))
    ranked = rankings(plan)
    rows = [
        row
        for metric in plan.pipeline.metrics
        for row in [*_metric_rows(metric, steps), *_elo_rows(metric, ranked.get(metric, ()), steps)]
    ]
    costs = [(name, *(show(step) for step in steps)) for name, show in _COSTS.items()]
    full = [step for step in (*plan.references, plan.steps[-1]) if step.tier == "release"]
    of_release = [row for metric in plan.pipeline.metrics for row in _metric_rows(metric, full)]
    withheld = _withheld(plan)
    link = plan.store / MODEL
    last = plan.steps[-1]
    released = last.name == RELEASE and last.artifact is not None and link.exists() and not withheld
    return Summary(
        title=plan.pipeline.name,
        columns=("", *(step.name for step in steps)),
        metrics=tuple(rows),
        costs=tuple(row for row in costs if row[0] != "attempt" or set(row[1:]) != {_ABSENT}),
        verdicts=judged,
        release=link if released else None,
        withheld=withheld,
        release_columns=("for the release", *(step.name for step in full)),
        release_metrics=(*of_release, ("time measuring", *map(_measuring, full))) if of_release else (),
        decisions=tuple((asked.step.title, standing(asked)) for asked in questions(plan)),
    )


def _withheld(plan: Plan) -> str:
    last = plan.steps[-1]
    if last.artifact is None or last.missing or last.policy == "warn":
        return ""
    verdicts = plan.verdicts(last) if last.name == RELEASE else []
    against = [one for one in verdicts if not one.passed]
    decision = decision_about(last, verdicts)
    if not against or (decision is not None and decision.approved):
        return ""
    link = plan.store / MODEL
    earlier = f"; {link} leads to an earlier release" if link.exists() else ""
    return f"the release is made and not let out: {len(against)} of {len(last.gates)} gates refuse it{earlier}"


def rankings(plan: Plan) -> dict[str, tuple[Ranked, ...]]:
    """What each judge's comparisons come to on one scale, the base being its anchor; by metric.

    The release is no player of its own: it is the last stage's model, and was compared over other rows.
    """
    found = {}
    steps = [step for step in plan.steps if step.name != RELEASE]
    for metric, spec in plan.pipeline.metrics.items():
        if isinstance(spec, JudgeSpec):
            compared = [one for step in steps if (one := _comparison(plan, step, metric, spec)) is not None]
            found[metric] = ranking([step.name for step in steps], compared)
    return found


def _comparison(plan: Plan, step: Step, metric: str, spec: JudgeSpec) -> Comparison | None:
    evaluation, other = step.evaluation(metric), plan.step(spec.against, step)
    if evaluation is None or other is None:
        return None
    return Comparison(step.name, other.name, tuple(sample["points"] for sample in evaluation.samples))


def _elo_rows(metric: str, ranked: tuple[Ranked, ...], steps: list[Step]) -> list[tuple[str, ...]]:
    if not ranked:
        return []
    shown = {one.model: f"{one.elo:.0f}" for one in ranked[:1]}
    shown |= {one.model: f"{one.elo:.0f} ({one.low:.0f} to {one.high:.0f})" for one in ranked[1:]}
    return [(f"{metric} · Elo", *(shown.get(step.name, _ABSENT) for step in steps))]


def _metric_rows(metric: str, steps: list[Step]) -> list[tuple[str, ...]]:
    found = [step.evaluation(metric) for step in steps]
    if not any(step.tier == "stages" for step in steps) and not any(found):
        return []
    default = next((evaluation.default for evaluation in found if evaluation is not None), "")
    known = {name for evaluation in found if evaluation is not None for name in evaluation.measures}
    names = [default, *(name for name in _EXTRA_MEASURES.get(default, ()) if name in known)]
    rows = [(f"{metric} · {name}", *(_value(evaluation, name) for evaluation in found)) for name in names]
    words = [None if evaluation is None else evaluation.shown.get("word_perplexity") for evaluation in found]
    if any(words):
        rows.append((f"{metric} · word perplexity", *(f"{word:.1f}" if word else _ABSENT for word in words)))
    return rows


def _value(evaluation: Evaluation | None, name: str) -> str:
    measure = None if evaluation is None else evaluation.measure(name)
    if measure is None:
        return _ABSENT
    error = "" if measure.standard_error is None else f" ± {measure.standard_error:.3f}"
    return f"{measure.value:.3f}{error}"


def _method(step: Step) -> str:
    return _ABSENT if step.stage is None else f"{step.stage.kind} · {step.stage.method.kind}"


def _trained(step: Step) -> str:
    training = step.record.get("training")
    return counted(training["trainable_parameters"]) if training else _ABSENT


def counted(parameters: int) -> str:
    """A number of parameters for people: 24.8 M, 1,152."""
    return f"{parameters / 1e6:.1f} M" if parameters >= 1e6 else f"{parameters:,}"


def _error(step: Step) -> str:
    handed = step.record.get("hand_over")
    if not handed:
        return _ABSENT
    if "distance_to_trained" in handed:
        return f"{handed['distance_to_trained']:.1e} (into the original base)"
    beside = ", base + adapter" if handed.get("unmerged") else ""
    return f"{handed['max_logit_error']:.1e} (of {handed['tolerance']:.0e}{beside})"


def _start(step: Step) -> str:
    start = step.record.get("start")
    return f"{start['adapted_difference']:.1e}" if start else _ABSENT


def _time(step: Step) -> str:
    seconds = step.record.get("durations")
    if not seconds:
        return _ABSENT
    measuring = step.seconds_measuring
    own = sum(seconds.values())
    return f"{own + measuring:.0f} s" + (f" ({measuring:.0f} s measuring)" if measuring else "")


def _measuring(step: Step) -> str:
    seconds = step.seconds_measuring
    return f"{seconds:.0f} s" if seconds else _ABSENT


def _memory(step: Step) -> str:
    peak = step.record.get("peak_memory")
    return f"{peak / 1e9:.1f} GB" if peak else _ABSENT


def _attempt(step: Step) -> str:
    return _ABSENT if step.attempts == 1 else f"{step.attempt} of {step.attempts}: {step.words}"


_COSTS = {
    "stage": _method,
    "attempt": _attempt,
    "parameters trained": _trained,
    "start moved by (logits)": _start,
    "hand-over error (logits)": _error,
    "time": _time,
    "peak memory": _memory,
}
