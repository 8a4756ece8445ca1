"""The card of a released model: what it was made from and how, what was measured, what the gates came to.

A pure function of what is on the disk, so a card is current when writing it anew would change nothing. The block of
settings at its top is what the Hugging Face hub reads (https://huggingface.co/docs/hub/model-cards).
"""

import json
import math
import os
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.markdown import code, fence, prose, without_places
from flows.summary import counted
from specs.base import fingerprint
from specs.metric import JudgeSpec, LmEvalSpec, MetricSpec
from specs.pipeline import BASE
from specs.secrets import redact
from stages.approval import decision_about
from stages.artifact import CARD, Artifact, short
from stages.data_report import DATA_REPORT
from stages.documents import read_object, sealed_card, write_text
from stages.errors import InvalidInput
from stages.evaluate import Evaluation
from stages.gate import interval_of
from stages.measure import Measure
from stages.origin import Origin, origin_of, with_word_of
from stages.pipeline import spec_as_run
from stages.plan import RELEASE, Plan, Step

if TYPE_CHECKING:
    from jinja2 import Template

CONFIDENCE = 0.95
"""Of the intervals in a card, two-sided."""
SAMPLES = 3
"""Answers of each `generation` metric that a card shows."""
_LONGEST_SAMPLE = 600
"""Characters of a prompt or an answer."""
_NAMES = {"cpt": "continued pre-training", "ift": "instruction fine-tuning", "dpo": "direct preference optimisation"}


def keep_card(plan: Plan, spec: Path) -> Path | None:
    """Bring the card beside the release up to date and return its place; None where nothing is released.

    Args:
        plan: as it stands after a run.
        spec: the file that it was read from.
    """
    last = plan.steps[-1]
    if last.name != RELEASE or last.artifact is None or any(step.artifact is None for step in plan.steps):
        return None
    file = last.artifact.path / CARD
    text = sealed_card(card_text(plan, spec, "model" if last.artifact.adapter is None else "."))
    if not (file.is_file() and not file.is_symlink() and file.read_text("utf-8", "replace") == text):
        write_text(file, text)
    return file


def card_text(plan: Plan, spec: Path, place: str) -> str:
    """The card of a chain that is published to its release.

    Args:
        plan: as it stands.
        spec: the file that it was read from.
        place: where the model's files lie, seen from the card; they are loaded from there.
    """
    release = plan.steps[-1].artifact
    assert release is not None  # noqa: S101 - the callers look
    origin = _origin(plan)
    measured = _measured(plan)
    text = _template().render(
        settings=_settings(plan, release, origin, measured),
        plan=plan,
        name=plan.pipeline.name,
        release=release,
        origin=origin,
        place=place,
        base=_base(plan),
        stages=[_stage(plan, step) for step in plan.steps if step.stage is not None],
        judged=[_judged(plan, step) for step in plan.steps if plan.verdicts(step)],
        measured=measured,
        confidence=f"{100 * CONFIDENCE:g}%",
        samples=_samples(plan),
        spec=without_places(spec_as_run(plan.pipeline, spec), _absolute(plan.pipeline.model_dump(mode="json"))),
        versions=plan.steps[-1].record.get("versions", {}),
    )
    return redact(text.rstrip(), os.environ) + "\n"


@cache
def _template() -> "Template":
    from jinja2 import Environment, StrictUndefined

    # Nothing is escaped by itself: Markdown has no escape that is right everywhere, so each value names its own.
    environment = Environment(trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)  # noqa: S701
    environment.filters |= {"code": code, "prose": prose, "fence": fence, "short": short, "counted": counted}
    source = Path(__file__).with_suffix(".md.jinja").read_text(encoding="utf-8")
    return environment.from_string(source)


def _settings(plan: Plan, release: Artifact, origin: Origin, measured: list[dict[str, Any]]) -> str:
    """The YAML block that the hub reads."""
    from huggingface_hub import EvalResult, ModelCardData

    stages = plan.pipeline.stages
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=row["data"],
            dataset_name=row["data"],
            metric_type=row["measure"],
            metric_name=f"{row['metric']} {row['measure']}",
            metric_value=row["value"],
            metric_args={"examples": row["n"]} | ({} if row["ends"] is None else {"interval_95": list(row["ends"])}),
        )
        for row in measured
        if row["value"] is not None
    ]
    relation: dict[str, Any] = {}
    if origin.hub is not None:
        relation["base_model_relation"] = "finetune" if release.adapter is None else "adapter"
    hub = [source.hub for stage in stages for source in stage.data if source.hub is not None]
    return str(
        ModelCardData(
            model_name=plan.pipeline.name,
            base_model=origin.hub,
            license=origin.license,
            license_name=origin.license_name if origin.license == "other" else None,
            license_link=origin.license_link if origin.license == "other" else None,
            library_name="transformers" if release.adapter is None else "peft",
            pipeline_tag="text-generation",
            tags=["trivium", *(part for stage in stages for part in (stage.kind, stage.method.kind))],
            datasets=list(dict.fromkeys(hub)) or None,
            eval_results=results or None,
            **relation,
        ).to_yaml()
    )


def _origin(plan: Plan) -> Origin:
    kept = plan.steps[0].record.get("origin")
    spec = plan.pipeline.model
    if not isinstance(kept, dict):  # a base of before it was recorded
        return origin_of(spec, plan.folder)
    names = Origin.__dataclass_fields__
    found = Origin(**{name: value for name, value in kept.items() if name in names and isinstance(value, str)})
    return with_word_of(spec, found)  # said later, perhaps: neither is part of an identity


def _base(plan: Plan) -> dict[str, Any]:
    spec, inputs = plan.pipeline.model, plan.steps[0].identity
    file = spec.gguf or spec.path
    return {
        "source": f"{spec.hub}@{spec.revision}" if spec.hub is not None else Path(str(file)).name,
        "form": "hub" if spec.hub is not None else "GGUF file" if spec.gguf is not None else "folder",
        "files": inputs.get("files", {}),
        "identity": plan.steps[0].key,
        "parameters": plan.steps[0].record.get("parameters"),
    }


def _stage(plan: Plan, step: Step) -> dict[str, Any]:
    record, stage = step.record, step.stage
    assert stage is not None  # noqa: S101 - the caller looks
    fields = step.identity["stage"]
    counts = record.get("data", [])
    sources = [
        {
            "name": _source_name(source.label),
            "rows": counts[number]["rows"] if number < len(counts) else None,
            "dropped": counts[number]["dropped"] if number < len(counts) else None,
            "use": f"weight {source.weight:g}" if source.share is None else f"{100 * source.share:g}% of the tokens",
            "content": _content(step.identity["data"][number]),
        }
        for number, source in enumerate(stage.data)
    ]
    training, masks = record.get("training", {}), record.get("masks", {})
    return {
        "name": step.name,
        "kind": stage.kind,
        "kind_in_words": _NAMES.get(stage.kind, stage.kind),
        "method": stage.method.kind,
        "identity": step.key,
        "sources": sources,
        "settings": _lines({"method": fields["method"], "train": fields["train"], "seed": step.identity["seed"]}),
        "training": training,
        "masks": masks,
        "hand_over": record.get("hand_over", {}),
        "durations": record.get("durations", {}),
        "attempt": f"attempt {step.attempt} of {step.attempts}: {step.words}" if step.attempts > 1 else "",
        "report": _data_report(step),
    }


def _judged(plan: Plan, step: Step) -> dict[str, Any]:
    verdicts = plan.verdicts(step)
    decision = decision_about(step, verdicts)
    return {"name": step.name, "policy": step.policy, "verdicts": verdicts, "decision": decision}


def _data_report(step: Step) -> dict[str, Any]:
    """What was found of duplicates and of overlap with what metrics measure on; empty where it was not looked for."""
    file = step.place / DATA_REPORT
    try:
        report = read_object(file) if file.is_file() else {}
    except InvalidInput:  # damaged since: `verify` says so
        report = {}
    sets = report.get("overlap", {}).get("sets", [])
    return {"duplicates": report.get("duplicates"), "overlap": [one for one in sets if not one.get("not_looked_at")]}


def _source_name(label: str) -> str:
    """What a source is called, without where it lies on this machine."""
    return Path(label).name if Path(label).is_absolute() else label


def _content(digests: list[str]) -> str:
    """The content of a source in one hash: the file's own sha256, or that of the list of its files' hashes."""
    hashes = [digest.rpartition(":")[2] for digest in digests]
    return f"sha256 {hashes[0]}" if len(hashes) == 1 else f"{len(hashes)} files, sha256 {fingerprint(digests)}"


def _lines(settings: dict[str, Any], indent: str = "") -> str:
    """Nested settings as lines of YAML for people; places on this machine are left out."""
    found = []
    for name, value in settings.items():
        if isinstance(value, dict) and value:
            found += [f"{indent}{name}:", _lines(value, f"{indent}  ")]
        elif isinstance(value, str) and Path(value).is_absolute():
            found.append(f"{indent}{name}: {Path(value).name}")
        else:
            found.append(f"{indent}{name}: {json.dumps(value, ensure_ascii=False)}")
    return "\n".join(found)


def _measured_on(plan: Plan, spec: MetricSpec) -> str:
    """The task or the rows; a judge's are those of the answers that it reads."""
    if isinstance(spec, JudgeSpec):
        return _measured_on(plan, plan.pipeline.metrics[spec.answers])
    return spec.task if isinstance(spec, LmEvalSpec) else spec.data.label


def _measured(plan: Plan) -> list[dict[str, Any]]:
    """Each metric's own choice of a measure, and what gates name, at both ends of the chain: a row each."""
    rows = []
    for metric, spec in plan.pipeline.metrics.items():
        first, last = _first_evaluation(plan, metric), _last_evaluation(plan, metric)
        data = _measured_on(plan, spec)
        for name in _measures(plan, metric, last):
            before = None if first is None else first.measure(name)
            after = None if last is None else last.measure(name)
            known = after or before
            rows.append(
                {
                    "metric": metric,
                    "measure": name,
                    "data": _source_name(data),
                    "better": "" if known is None else known.better,
                    "base": _value(before),
                    "release": _value(after),
                    "value": None if after is None or not math.isfinite(after.value) else after.value,
                    "ends": None if after is None else interval_of(after, CONFIDENCE),
                    "n": 0 if known is None else known.n,
                }
            )
    return rows


def _last_evaluation(plan: Plan, metric: str) -> Evaluation | None:
    """What was measured on the release, or else on the last stage: in the precision of the release, so the same."""
    step = _last_measured(plan, metric)
    return None if step is None else step.evaluation(metric)


def _first_evaluation(plan: Plan, metric: str) -> Evaluation | None:
    """What the base came to on the examples of `_last_evaluation`; None where it was measured on others only."""
    last = _last_measured(plan, metric)
    if last is None:
        return plan.steps[0].evaluation(metric)
    found = (plan.step(BASE, last), plan.steps[0])
    return next(
        (base.evaluation(metric) for base in found if base and _asked(base, metric) == _asked(last, metric)), None
    )


def _asked(step: Step, metric: str) -> Any:
    """What identifies the examples of a measurement, and what they are asked."""
    return next((one.identity["metric"] for one in step.measurements if one.metric == metric), None)


def _last_measured(plan: Plan, metric: str) -> Step | None:
    return next((step for step in reversed(plan.steps[1:]) if step.evaluation(metric) is not None), None)


def _measures(plan: Plan, metric: str, found: Evaluation | None) -> list[str]:
    gates = [gate for _, gate in plan.pipeline.placed_gates() if gate.metric_name == metric]
    default = [] if found is None else [found.default]
    return list(dict.fromkeys([*default, *(gate.measure for gate in gates if gate.measure is not None)]))


def _value(measure: Measure | None) -> str:
    if measure is None:
        return "–"
    ends = interval_of(measure, CONFIDENCE)
    return f"{measure.value:.4g}" + ("" if ends is None else f" ({ends[0]:.4g} to {ends[1]:.4g})")


def _samples(plan: Plan) -> list[dict[str, Any]]:
    """The first answers of each metric that keeps them: the base's beside the release's."""
    found = []
    for metric, spec in plan.pipeline.metrics.items():
        first, last = _first_evaluation(plan, metric), _last_evaluation(plan, metric)
        if last is None or isinstance(spec, JudgeSpec):  # a judge's pairs are the answers of another metric
            continue
        for number, sample in enumerate(last.samples[:SAMPLES]):
            before = first.samples[number] if first is not None and number < len(first.samples) else {}
            found.append(
                {
                    "metric": metric,
                    "prompt": _cut(_prompt(sample.get("prompt"))),
                    "base": _cut(before.get("answer")),
                    "release": _cut(sample.get("answer")),
                }
            )
    return found


def _prompt(asked: object) -> object:
    """A prompt as it reads: the turns of a conversation one below the other."""
    if not isinstance(asked, list) or not all(isinstance(turn, dict) for turn in asked):
        return asked
    return "\n".join(f"{turn.get('role')}: {turn.get('content')}" for turn in asked)


def _cut(text: object) -> str:
    whole = text if isinstance(text, str) else "" if text is None else str(text)
    return whole if len(whole) <= _LONGEST_SAMPLE else f"{whole[: _LONGEST_SAMPLE - 1]}…"


def _absolute(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value] if Path(value).is_absolute() else []
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [place for part in parts for place in _absolute(part)]
