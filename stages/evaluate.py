"""Measure a model: one sealed file per metric, so that none is measured twice and none is half there."""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from specs.metric import MetricSpec, PerplexitySpec, PreferenceSpec
from stages.documents import read_sealed, write_sealed
from stages.errors import InvalidInput
from stages.measure import Measure
from stages.metrics import harness, perplexity, preference

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What one metric found on one model."""

    measures: dict[str, Measure]
    default: str
    """The measure that gates and tables use when they name none."""
    shown: dict[str, Any]
    """Numbers for people: word perplexity, tokens, the task's version."""
    log_likelihoods: dict[str, list[float]]
    """Of preference pairs: what the next stage refers to."""
    seconds: float

    def measure(self, name: str | None) -> Measure | None:
        """The named measure, or the default one; None where it was not measured."""
        return self.measures.get(name or self.default)


_KEPT = TypeAdapter(Evaluation)
LIMIT = 256 << 20
"""Bytes of an evaluation file: some million examples, each with its numbers."""


def evaluate(
    spec: MetricSpec,
    name: str,
    folder: Path,
    model: Any,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    chat_template: bool,
    reference: Evaluation | None,
) -> Evaluation:
    """Measure one metric on one model.

    Args:
        spec: the metric as the spec has it.
        name: what the spec calls it.
        folder: what relative paths start from.
        model: in eval mode, in the precision of the release.
        tokenizer: the model's.
        chat_template: whether a harness task is put as a user's turn.
        reference: the same metric on the stage's start, for preferences.
    """
    started = time.monotonic()
    kept: dict[str, list[float]] = {}
    if isinstance(spec, PerplexitySpec):
        default = perplexity.DEFAULT
        measures, shown = perplexity.measure(spec, folder, model, tokenizer, name)
    elif isinstance(spec, PreferenceSpec):
        default = preference.DEFAULT
        known = None if reference is None else reference.log_likelihoods
        measures, shown, kept = preference.measure(spec, folder, model, tokenizer, name, known)
    else:
        default = spec.metric
        measures, shown = harness.measure(spec, folder, model, tokenizer, chat_template=chat_template)
    return Evaluation(measures, default, shown, kept, round(time.monotonic() - started, 3))


def save(evaluation: Evaluation, path: Path, identity: dict[str, Any]) -> None:
    """Keep an evaluation under what identifies it, sealed by its own hash."""
    body = {
        "identity": identity,
        "measures": {name: measure.as_json() for name, measure in evaluation.measures.items()},
        "default": evaluation.default,
        "shown": evaluation.shown,
        "log_likelihoods": evaluation.log_likelihoods,
        "seconds": evaluation.seconds,
    }
    plain = json.loads(json.dumps(body, default=float))
    write_sealed(path, plain)


def load(path: Path) -> Evaluation | None:
    """The evaluation kept at ``path``, or None where there is none that is whole."""
    try:
        return _KEPT.validate_python(read_sealed(path, limit=LIMIT))
    except (InvalidInput, ValidationError):
        return None
