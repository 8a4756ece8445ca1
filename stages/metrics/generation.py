"""Answers to fixed prompts, and what can be counted of them without a judge."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specs.metric import GenerationSpec
from stages.conversation import Messages, render
from stages.data import Count, read_source, tell_what_was_left_out
from stages.errors import InvalidInput
from stages.measure import Measure, ratio
from stages.metrics.answers import Answer, answers_of
from stages.metrics.diversity import distinct, repeats, self_bleu
from stages.rows import Row, plain_prompt_row, prompt_row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MEASURES = (
    "chrf",
    "exact_match",
    "distinct_1",
    "distinct_2",
    "self_bleu",
    "refusal_rate",
    "empty_rate",
    "truncated_rate",
    "repetition_rate",
    "length",
)
WITH_REFERENCE, WITHOUT = "chrf", "distinct_2"
"""What tables show first, where rows have a reference and where none has."""
VERSION = 1
"""Of what is measured and kept."""
LONGEST = 8_192
"""Characters of a message, an answer or a reference that are kept."""

Samples = list[dict[str, Any]]


def measure(
    spec: GenerationSpec,
    folder: Path,
    model: Any,
    tokenizer: "PreTrainedTokenizerBase",
    label: str,
    *,
    chat_template: bool,
) -> tuple[dict[str, Measure], dict[str, Any], Samples]:
    """Let the model answer every prompt.

    Args:
        spec: the metric as the spec has it.
        folder: what relative paths start from.
        model: in eval mode.
        tokenizer: the model's.
        label: what progress and messages call the metric.
        chat_template: whether a prompt is put as a user's turn.

    Returns:
        Measures (those against a reference where a row has one), what is shown beside them, and the answers, as the
        model wrote them: whoever shows them escapes them.
    """
    count = Count(spec.data.label)
    rows = list(read_source(spec.data, folder, prompt_schema(spec), spec.limit, count))[: spec.limit]
    tell_what_was_left_out(count)
    prompts = [_encoded(tokenizer, row["prompt"], chat_template=chat_template) for row in rows]
    for number, ids in enumerate(prompts, start=1):
        if len(ids) + spec.max_new_tokens > spec.sequence_length:
            raise InvalidInput(
                f"metric {label}: prompt {number} of {spec.data.label} has {len(ids)} tokens, and its answer may have "
                f"{spec.max_new_tokens}; raise its sequence_length ({spec.sequence_length})"
            )
    answers = answers_of(model, prompts, stop_tokens(model, tokenizer), spec, label)
    texts = [str(tokenizer.decode(answer.ids, skip_special_tokens=True)) for answer in answers]
    measures = _measures(answers, texts, spec.refusals) | _against_references(texts, rows)
    shown = {
        "prompts": len(rows),
        "references": sum(row["reference"] is not None for row in rows),
        "tokens": sum(len(answer.ids) for answer in answers),
        **({"left_out": count.as_record(folder)} if count.bad else {}),
    }
    samples = [
        {
            "prompt": [message | {"content": _cut(message["content"])} for message in row["prompt"]],
            "answer": _cut(text),
            "reference": None if row["reference"] is None else _cut(row["reference"]),
            "tokens": len(answer.ids),
            "stopped": answer.stopped,
        }
        for row, text, answer in zip(rows, texts, answers, strict=True)
    ]
    return measures, shown, samples


def prompt_schema(spec: GenerationSpec) -> Any:
    """What a row of the metric must look like: without the chat template at some stage, a prompt is one message."""
    return prompt_row if spec.chat_template is True else plain_prompt_row


def stop_tokens(model: Any, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The tokens that end an answer: those of the model's generation config, or else the tokenizer's eos."""
    stops = None if model.generation_config is None else model.generation_config.eos_token_id
    if stops is None:
        stops = tokenizer.eos_token_id
    return [] if stops is None else [stops] if isinstance(stops, int) else list(stops)


def _encoded(tokenizer: "PreTrainedTokenizerBase", prompt: Messages, *, chat_template: bool) -> list[int]:
    if chat_template:
        found: Any = tokenizer(render(tokenizer, prompt, ask=True), add_special_tokens=False)
    else:
        found = tokenizer(prompt[0]["content"])
    ids: list[int] = found["input_ids"]
    return ids


def _measures(answers: Sequence[Answer], texts: Sequence[str], refusals: Sequence[str]) -> dict[str, Measure]:
    ids = [answer.ids for answer in answers]
    beginnings = tuple(_plain(one) for one in refusals)
    of_each: dict[str, list[float]] = {
        "refusal_rate": [_plain(text).startswith(beginnings) for text in texts],
        "empty_rate": [not text.strip() for text in texts],
        "truncated_rate": [not answer.stopped for answer in answers],
        "repetition_rate": [repeats(one) for one in ids],
        "length": [len(one) for one in ids],
    }
    ones = [1.0] * len(answers)
    of_all = {"distinct_1": distinct(ids, 1), "distinct_2": distinct(ids, 2), "self_bleu": self_bleu(ids)}
    return {name: one for name, one in of_all.items() if one is not None} | {
        name: ratio(list(map(float, values)), ones, "lower") for name, values in of_each.items()
    }


def _plain(text: str) -> str:
    return " ".join(text.replace("’", "'").casefold().split())


def _against_references(texts: Sequence[str], rows: Sequence[Row]) -> dict[str, Measure]:
    """Of the rows that have a reference; the others weigh nothing, so that every measure has the same examples."""
    from sacrebleu.metrics.chrf import CHRF

    weights = [float(row["reference"] is not None) for row in rows]
    if not any(weights):
        return {}
    chrf = CHRF()
    scores, hits = [], []
    for text, row in zip(texts, rows, strict=True):
        wanted = row["reference"]
        scores.append(0.0 if wanted is None else float(chrf.sentence_score(text, [wanted]).score))
        hits.append(float(wanted is not None and text.strip() == wanted.strip()))
    return {"chrf": ratio(scores, weights, "higher"), "exact_match": ratio(hits, weights, "higher")}


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
