"""How far a stage moved held-out preferences: the implicit reward against the stage's start (DPO eq. 5).

Whether it is length that the reward likes is measured, too: DPO is known to take to long answers (Park et al. 2024,
arXiv 2403.19159; Singhal et al. 2023, arXiv 2310.03716).
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specs.metric import PreferenceSpec
from stages.conversation import Encoded, encode_conversation
from stages.data import Count, read_source, tell_what_was_left_out
from stages.errors import InvalidInput
from stages.measure import Measure, ratio
from stages.metrics.scoring import log_likelihoods
from stages.metrics.whole import whole
from stages.rows import preference_row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT = "reward_accuracy"
MEASURES = (
    "reward_accuracy",
    "reward_margin",
    "chosen_reward",
    "rejected_reward",
    "accuracy_chosen_longer",
    "accuracy_chosen_shorter",
    "length_bias",
    "length_correlation",
    "policy_accuracy",
    "policy_length_bias",
)
ON_THE_BASE = ("policy_accuracy", "policy_length_bias")
"""Those that need no model to refer to, so that the base has them, too."""
VERSION = 2
"""Of what is measured and kept."""


def measure(
    spec: PreferenceSpec,
    folder: Path,
    model: Any,
    tokenizer: "PreTrainedTokenizerBase",
    label: str,
    reference: dict[str, list[float]] | None,
) -> tuple[dict[str, Measure], dict[str, Any], dict[str, list[float]]]:
    """Score every pair.

    Args:
        spec: the metric as the spec has it.
        folder: what relative paths start from.
        model: in eval mode.
        tokenizer: the model's.
        label: what progress and messages call the metric.
        reference: the log-probabilities that the stage's start gave to the same pairs, or None for the base.

    Returns:
        Measures (those of `policy_` always, those of the reward where there is a reference), what is shown beside
        them, and the log-probabilities for the next stage to refer to.
    """
    count = Count(spec.data.label)
    pairs = list(read_source(spec.data, folder, preference_row, spec.limit, count))[: spec.limit]
    tell_what_was_left_out(count)
    sequences = []
    for number, pair in enumerate(pairs, start=1):
        for side in ("chosen", "rejected"):
            encoded = encode_conversation(tokenizer, [*pair["prompt"], *pair[side]])
            if len(encoded.ids) > spec.sequence_length:
                raise InvalidInput(
                    f"metric {label}: pair {number} of {spec.data.label} has {len(encoded.ids)} tokens; raise "
                    f"its sequence_length ({spec.sequence_length})"
                )
            sequences.append(_answer_only(encoded))
    scores = log_likelihoods(model, sequences, 2 * spec.batch_size, label)
    found = {"chosen": scores[0::2], "rejected": scores[1::2]}
    sizes = [float(sum(sequence.mask)) for sequence in sequences]
    longer = [chosen - rejected for chosen, rejected in zip(sizes[0::2], sizes[1::2], strict=True)]
    measures = _of_policy(_differences(found), longer)
    shown = {
        "pairs": len(pairs),
        "chosen_tokens": math.fsum(sizes[0::2]) / len(pairs),
        "rejected_tokens": math.fsum(sizes[1::2]) / len(pairs),
        **({"left_out": count.as_record(folder)} if count.bad else {}),
    }
    if reference is not None:
        rewards = {
            side: [spec.beta * (ours - start) for ours, start in zip(found[side], reference[side], strict=True)]
            for side in found
        }
        measures |= _of_reward(rewards, longer)
    return measures, shown, found


def _differences(found: dict[str, list[float]]) -> list[float]:
    return [chosen - rejected for chosen, rejected in zip(found["chosen"], found["rejected"], strict=True)]


def _of_policy(gaps: list[float], longer: list[float]) -> dict[str, Measure]:
    ones = [1.0] * len(gaps)
    return {
        "policy_accuracy": ratio([float(gap > 0) for gap in gaps], ones, "higher"),
        "policy_length_bias": ratio(_excess(gaps, longer), ones, "lower"),
    }


def _of_reward(rewards: dict[str, list[float]], longer: list[float]) -> dict[str, Measure]:
    margins = _differences(rewards)
    ones = [1.0] * len(margins)
    hits = [float(margin > 0) for margin in margins]
    measures = {
        "reward_accuracy": ratio(hits, ones, "higher"),
        "reward_margin": ratio(margins, ones, "higher"),
        "chosen_reward": ratio(rewards["chosen"], ones, "higher"),
        "rejected_reward": ratio(rewards["rejected"], ones, "lower"),
        "length_bias": ratio(_excess(margins, longer), ones, "lower"),
    }
    kinds = {"longer": [float(gap > 0) for gap in longer], "shorter": [float(gap < 0) for gap in longer]}
    for name, own in kinds.items():
        if any(own):
            tops = [hit * here for hit, here in zip(hits, own, strict=True)]
            measures[f"accuracy_chosen_{name}"] = ratio(tops, own, "higher")
    if (correlation := _correlation(margins, longer)) is not None:
        measures["length_correlation"] = correlation
    return measures


def _excess(gaps: list[float], longer: list[float]) -> list[float]:
    """How many tokens longer the answer of each pair is that ``gaps`` prefer; 0 where they prefer none."""
    return [0.0 if gap == 0 else more if gap > 0 else -more for gap, more in zip(gaps, longer, strict=True)]


def _correlation(left: Sequence[float], right: Sequence[float]) -> Measure | None:
    """Pearson's correlation, or None where one side does not vary."""
    n = len(left)
    x, y = ([value - math.fsum(side) / n for value in side] for side in (left, right))
    products = [(a * a, b * b, a * b) for a, b in zip(x, y, strict=True)]
    sums = [math.fsum(part) for part in zip(*products, strict=True)]

    def value(xx: float, yy: float, xy: float) -> float:
        return xy / math.sqrt(xx) / math.sqrt(yy) if xx > 0 and yy > 0 else math.nan

    # Without an example the mean moves, too, which takes n / (n - 1) of its product away.
    without = [
        value(*(total - n / (n - 1) * own for total, own in zip(sums, each, strict=True)))
        for each in (products if n > 2 else ())
    ]
    found = value(*sums)
    return whole(found, n, without, "lower") if math.isfinite(found) else None


def _answer_only(encoded: Encoded) -> Encoded:
    """Mark the last assistant turn only: earlier ones belong to the prompt."""
    last = len(encoded.mask) - 1 - encoded.mask[::-1].index(True)
    first = last
    while first > 0 and encoded.mask[first - 1]:
        first -= 1
    return Encoded(encoded.ids, [first <= number <= last for number in range(len(encoded.ids))])
