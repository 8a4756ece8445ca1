"""How far a stage moved held-out preferences: the implicit reward against the stage's start (DPO eq. 5)."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from specs.metric import PreferenceSpec
from stages.conversation import Encoded, encode_conversation
from stages.data import Count, read_source, tell_what_was_left_out
from stages.errors import InvalidInput
from stages.measure import Measure, ratio
from stages.metrics.scoring import log_likelihoods
from stages.rows import preference_row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT = "reward_accuracy"


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
        Measures (`reward_accuracy` and `reward_margin` where there is a reference, `policy_accuracy`
        always), what is shown beside them, and the log-probabilities for the next stage to refer to.
    """
    count = Count(spec.data.label)
    pairs = list(read_source(spec.data, folder, preference_row, count=count))
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
    ones = [1.0] * len(pairs)
    policy = [float(c > r) for c, r in zip(found["chosen"], found["rejected"], strict=True)]
    measures = {"policy_accuracy": ratio(policy, ones, "higher")}
    shown: dict[str, Any] = {"pairs": len(pairs), **({"left_out": count.as_record(folder)} if count.bad else {})}
    if reference is not None:
        rewards = {
            side: [spec.beta * (ours - start) for ours, start in zip(found[side], reference[side], strict=True)]
            for side in found
        }
        margins = [c - r for c, r in zip(rewards["chosen"], rewards["rejected"], strict=True)]
        measures["reward_accuracy"] = ratio([float(margin > 0) for margin in margins], ones, "higher")
        measures["reward_margin"] = ratio(margins, ones, "higher")
        shown["chosen_reward"] = sum(rewards["chosen"]) / len(pairs)
        shown["rejected_reward"] = sum(rewards["rejected"]) / len(pairs)
    return measures, shown, found


def _answer_only(encoded: Encoded) -> Encoded:
    """Mark the last assistant turn only: earlier ones belong to the prompt."""
    last = len(encoded.mask) - 1 - encoded.mask[::-1].index(True)
    first = last
    while first > 0 and encoded.mask[first - 1]:
        first -= 1
    return Encoded(encoded.ids, [first <= number <= last for number in range(len(encoded.ids))])
