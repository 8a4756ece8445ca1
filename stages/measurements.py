"""Which measurements a step has, in both tiers, and what identifies each."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from specs.base import fingerprint, identity_fields
from specs.metric import JudgeSpec, MetricSpec, PreferenceSpec
from specs.pipeline import PREVIOUS
from specs.release import ReleaseSpec
from stages import evaluate
from stages.artifact import EVALUATION, short
from stages.identity import MEASURING_LIBRARIES, Digests, metric_digests, model_digests, versions
from stages.job import Measurement, Tier
from stages.pipeline import Pipeline


@dataclass(frozen=True, slots=True)
class Measured:
    """A model that is measured."""

    name: str
    """The step whose settings of chat templates hold: the base's or a stage's."""
    place: Path
    """Its artifact."""
    key: str
    """Its identity's fingerprint."""
    before: "Measured | None"
    """What it was trained from, which its rewards refer to; None for the base."""
    between: Mapping[str, Measurement] = field(default_factory=dict)
    """What is measured of it between the stages, by metric."""


@dataclass(frozen=True, slots=True)
class Measurements:
    """Makes the measurements of one pipeline."""

    pipeline: Pipeline
    folder: Path
    digest: Digests

    def between_stages(self, model: Measured) -> tuple[Measurement, ...]:
        """The cheap tier: every metric, over as many rows as it says. What judges say of answers comes last."""
        metrics = self.pipeline.metrics
        found = {
            name: self._one(name, "stages", model, self._reference(name, model))
            for name, spec in metrics.items()
            if not isinstance(spec, JudgeSpec)
        }
        for name, spec in metrics.items():
            if isinstance(spec, JudgeSpec) and (other := _opponent(spec, model, {})) is not None:
                found[name] = self._judged(name, "stages", model, found[spec.answers], other.between[spec.answers])
        return tuple(found.values())

    def before_release(
        self, released: Measured, others: Mapping[str, Measured], release: ReleaseSpec
    ) -> dict[str, dict[str, Measurement]]:
        """The full tier: the metrics of the release, of it and of what they refer to.

        Args:
            released: the released model; its `before` is what the last stage started from.
            others: the base and the stages, by name, in order.
            release: what is asked for.

        Returns:
            By step, and there by metric; the released model's are under its own key.
        """
        found: dict[str, dict[str, Measurement]] = {}

        def keep(model: Measured, metric: str, one: Measurement) -> Measurement:
            found.setdefault(released.key if model is released else model.name, {})[metric] = one
            return one

        def full(metric: str, model: Measured) -> Measurement:
            """With rewards where they are compared; the model below needs none for the one above to have them."""
            reference = None
            compared = model is released or model.name in release.compared_over(metric)
            if model.before is not None and compared and self._refers(metric):
                reference = full(metric, model.before), model.before
            if model is not released and self._is_whole(metric) and metric in model.between:
                return keep(model, metric, model.between[metric])
            return keep(model, metric, self._one(metric, "release", model, reference))

        for metric in release.measured:
            spec = self.pipeline.metrics[metric]
            for model in (*(others[name] for name in release.compared_over(metric)), released):
                if not isinstance(spec, JudgeSpec):
                    full(metric, model)
                elif (other := _opponent(spec, model, others if model is released else {})) is not None:
                    answers = full(spec.answers, model), full(spec.answers, other)
                    keep(model, metric, self._judged(metric, "release", model, *answers))
        return found

    def _refers(self, metric: str) -> bool:
        return isinstance(self.pipeline.metrics[metric], PreferenceSpec)

    def _is_whole(self, metric: str) -> bool:
        """Whether both tiers measure the same."""
        return self.pipeline.metric(metric, "release") == self.pipeline.metrics[metric]

    def _reference(self, metric: str, model: Measured) -> tuple[Measurement, Measured] | None:
        if model.before is None or not self._refers(metric):
            return None
        return model.before.between[metric], model.before

    def _one(
        self, metric: str, tier: Tier, model: Measured, reference: tuple[Measurement, Measured] | None
    ) -> Measurement:
        spec = self.pipeline.metric(metric, tier)
        chat = getattr(spec, "chat_template", False)
        applied = chat if isinstance(chat, bool) else model.name in chat
        own = {
            # Whether the template is applied here counts, not where else it is.
            "metric": {key: value for key, value in identity_fields(spec).items() if key != "chat_template"},
            "data": metric_digests(spec, self.folder, self.digest),
            "dtype": self.pipeline.model.dtype,
            "chat_template": applied,
            "reference": None if reference is None else reference[1].key,
        }
        one = _measurement(metric, tier, model, spec, own)
        other = None if reference is None else reference[0].file
        return one.model_copy(update={"chat_template": applied, "reference": other})

    def _judged(self, metric: str, tier: Tier, model: Measured, ours: Measurement, theirs: Measurement) -> Measurement:
        """The comparison of a model's answers with another's."""
        spec = self.pipeline.metric(metric, tier)
        judge = getattr(spec, "model", None)
        own = {
            "metric": identity_fields(spec),
            "judge": None if judge is None else model_digests(judge, self.folder, self.digest),
            "answers": [fingerprint(ours.identity), fingerprint(theirs.identity)],
        }
        one = _measurement(metric, tier, model, spec, own)
        return one.model_copy(update={"reference": theirs.file, "answers": ours.file})


def _measurement(metric: str, tier: Tier, model: Measured, spec: MetricSpec, own: dict[str, Any]) -> Measurement:
    """A measurement that refers to no other yet: its identity is what all kinds depend on, and ``own``."""
    identity = own | {
        "model": model.key,
        "versions": versions(MEASURING_LIBRARIES),
        "code": evaluate.VERSIONS[spec.kind],
    }
    return Measurement(
        metric=metric,
        file=str(model.place / EVALUATION / f"{metric}-{short(fingerprint(identity))}.json"),
        identity=identity,
        chat_template=False,
        reference=None,
        tier=tier,
    )


def _opponent(spec: JudgeSpec, model: Measured, beside: Mapping[str, Measured]) -> Measured | None:
    """Whose answers a judge compares a model's with; None where that model comes no earlier.

    Args:
        spec: the judge's.
        model: the model that is judged.
        beside: models that it may be compared with besides those that it was made from, by name.
    """
    if spec.against == PREVIOUS:
        return model.before
    return ({one.name: one for one in _above(model)} | dict(beside)).get(spec.against)


def _above(model: Measured) -> Iterator[Measured]:
    """What a model was made from, the nearest first."""
    before = model.before
    while before is not None:
        yield before
        before = before.before
