"""Measure a model: one sealed file per metric, so that none is measured twice and none is half there."""

import copy
import json
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from specs.metric import GenerationSpec, JudgeSpec, LmEvalSpec, MetricSpec, PerplexitySpec, PreferenceSpec
from stages.documents import read_sealed, write_sealed
from stages.errors import InvalidInput, StageFailed
from stages.measure import Measure
from stages.metrics import generation, harness, judge, perplexity, preference
from stages.metrics.results import measure_name
from stages.model import set_stop_tokens

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
    samples: list[dict[str, Any]] = field(default_factory=list)
    """Of generation: each prompt, the answer, the reference; of a judge, both answers and its letters.
    As the model wrote them: who shows them escapes them."""

    def measure(self, name: str | None) -> Measure | None:
        """The named measure, or the default one; None where it was not measured."""
        return self.measures.get(name or self.default)


MEASURES: dict[str, tuple[str, ...]] = {
    "perplexity": perplexity.MEASURES,
    "preference": preference.MEASURES,
    "generation": generation.MEASURES,
    "judge": judge.MEASURES,
}
"""The measures of each kind of metric, in the order of tables; those of a harness task are the task's."""
VERSIONS = {
    "perplexity": perplexity.VERSION,
    "preference": preference.VERSION,
    "generation": generation.VERSION,
    "lm_eval": harness.VERSION,
    "judge": judge.VERSION,
}
"""What a change of a kind's measures raises: evaluations of another version are measured again."""
_KEPT = TypeAdapter(Evaluation)
LIMIT = 256 << 20
"""Bytes of an evaluation file: some million examples, each with its numbers."""


def measure_names(spec: MetricSpec, folder: Path) -> tuple[str, ...] | None:
    """The measures that a metric can have, or None where only its harness task knows.

    Raises:
        InvalidInput: the metric's task cannot be read.
    """
    return harness.measure_names(spec, folder) if isinstance(spec, LmEvalSpec) else MEASURES[spec.kind]


def evaluate(
    spec: PerplexitySpec | PreferenceSpec | GenerationSpec | LmEvalSpec,
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
        chat_template: whether a harness task, or a prompt, is put as a user's turn.
        reference: the same metric on the stage's start, for preferences.
    """
    started = time.monotonic()
    kept: dict[str, list[float]] = {}
    samples: list[dict[str, Any]] = []
    with _undisturbed(model):
        # A stage teaches both ends, and the release stops at both: so it is judged by what people get.
        set_stop_tokens(model, tokenizer)
        if isinstance(spec, PerplexitySpec):
            default = perplexity.DEFAULT
            measures, shown = perplexity.measure(spec, folder, model, tokenizer, name)
        elif isinstance(spec, PreferenceSpec):
            default = preference.DEFAULT
            known = None if reference is None else reference.log_likelihoods
            measures, shown, kept = preference.measure(spec, folder, model, tokenizer, name, known)
        elif isinstance(spec, GenerationSpec):
            measures, shown, samples = generation.measure(
                spec, folder, model, tokenizer, name, chat_template=chat_template
            )
            default = generation.WITH_REFERENCE if shown["references"] else generation.WITHOUT
        else:
            default = measure_name(spec.metric)
            measures, shown = harness.measure(spec, folder, model, tokenizer, chat_template=chat_template)
    return Evaluation(measures, default, shown, kept, round(time.monotonic() - started, 3), samples)


def evaluate_answers(
    spec: JudgeSpec, name: str, ours: Evaluation | None, theirs: Evaluation | None, ask: judge.Ask
) -> Evaluation:
    """Let a judge compare two models by the answers that were kept of them.

    Args:
        spec: the metric as the spec has it.
        name: what the spec calls it.
        ours: what the generation metric found on this model.
        theirs: and on the other one.
        ask: the judge.

    Raises:
        StageFailed: answers are missing, or the judge cannot be read.
    """
    if ours is None or theirs is None:
        raise StageFailed(
            f"metric {name}: the answers of {'this model' if ours is None else spec.against} (metric {spec.answers}) "
            "are not there or are damaged; run again, they are then measured first"
        )
    started = time.monotonic()
    measures, shown, samples = judge.compare(spec, name, ours.samples, theirs.samples, ask)
    return Evaluation(measures, judge.DEFAULT, shown, {}, round(time.monotonic() - started, 3), samples)


@contextmanager
def _undisturbed(model: Any) -> Iterator[None]:
    """Measure in eval mode and give everything back as it was: the harness seeds every generator there is."""
    import numpy as np
    import torch

    modes = {module: module.training for module in model.modules()}
    settings = None if model.generation_config is None else copy.deepcopy(vars(model.generation_config))
    drawn, drawn_by_numpy = random.getstate(), np.random.get_state()
    model.eval()
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(drawn)
        np.random.set_state(drawn_by_numpy)
        for module, mode in modes.items():
            module.training = mode
        if settings is not None:
            vars(model.generation_config).clear()
            vars(model.generation_config).update(settings)


def save(evaluation: Evaluation, path: Path, identity: dict[str, Any]) -> None:
    """Keep an evaluation under what identifies it, sealed by its own hash."""
    body = {
        "identity": identity,
        "measures": {name: measure.as_json() for name, measure in evaluation.measures.items()},
        "default": evaluation.default,
        "shown": evaluation.shown,
        "log_likelihoods": evaluation.log_likelihoods,
        "seconds": evaluation.seconds,
        "samples": evaluation.samples,
    }
    plain = json.loads(json.dumps(body, default=float))
    write_sealed(path, plain)


def load(path: Path) -> Evaluation | None:
    """The evaluation kept at ``path``, or None where there is none that is whole."""
    try:
        return _KEPT.validate_python(read_sealed(path, limit=LIMIT))
    except (InvalidInput, ValidationError):
        return None
