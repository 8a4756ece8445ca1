"""Bits per byte, word and token of held-out text, or of the assistant's part of held-out conversations."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specs.metric import PerplexitySpec
from stages.conversation import Encoded, encode_conversation
from stages.data import Count, read_source, tell_what_was_left_out
from stages.errors import InvalidInput
from stages.measure import Measure, ratio
from stages.metrics.scoring import log_likelihoods
from stages.rows import Row, any_scored_row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT = "bits_per_byte"
MEASURES = ("bits_per_byte", "bits_per_word", "bits_per_token")
VERSION = 2
"""Of what is measured and kept."""


def measure(
    spec: PerplexitySpec, folder: Path, model: Any, tokenizer: "PreTrainedTokenizerBase", label: str
) -> tuple[dict[str, Measure], dict[str, Any]]:
    """Score every row; documents longer than the window are scored window by window.

    Returns:
        The measures, in bits, because perplexities themselves cannot be compared example by example; and what is shown
        beside them: 2 to the power of each, and how many tokens, words and bytes were scored.
    """
    count = Count(spec.data.label)
    rows = list(read_source(spec.data, folder, any_scored_row, spec.limit, count))[: spec.limit]
    tell_what_was_left_out(count)
    windows: list[Encoded] = []
    owner: list[int] = []
    for number, row in enumerate(rows):
        for window in _windows(row, tokenizer, spec.sequence_length):
            windows.append(window)
            owner.append(number)
    scores = log_likelihoods(model, windows, spec.batch_size, label)
    bits, tokens = [0.0] * len(rows), [0.0] * len(rows)
    for number, window, score in zip(owner, windows, scores, strict=True):
        bits[number] -= score / math.log(2)
        tokens[number] += sum(window.mask)
    texts = [_scored_text(row) for row in rows]
    sizes = {
        "byte": [float(len(text.encode())) for text in texts],
        "word": [float(len(text.split())) for text in texts],
        "token": tokens,
    }
    measures = {f"bits_per_{unit}": ratio(bits, size, "lower") for unit, size in sizes.items()}
    shown = {
        **{f"{unit}_perplexity": _finite(measures[f"bits_per_{unit}"].value) for unit in sizes},
        **{f"{unit}s": int(sum(size)) for unit, size in sizes.items()},
        **({"left_out": count.as_record(folder)} if count.bad else {}),
    }
    return measures, shown


def _finite(bits: float) -> float | None:
    """2 to the power of ``bits``, or None where that overflows: on a weak model word perplexity explodes."""
    return 2**bits if bits < 512 else None


def _scored_text(row: Row) -> str:
    if "text" in row:
        return str(row["text"])
    return "".join(turn["content"] for turn in row["messages"] if turn["role"] == "assistant")


def _windows(row: Row, tokenizer: "PreTrainedTokenizerBase", length: int) -> list[Encoded]:
    """The row as sequences whose marked tokens cover it once.

    Text starts from the bos (or eos) token; each window after the first starts from the last token of the
    one before, as the LM evaluation harness does it.
    """
    if "messages" in row:
        encoded = encode_conversation(tokenizer, row["messages"])
        if len(encoded.ids) > length:  # cut, it would look like a better model
            raise InvalidInput(f"a conversation has {len(encoded.ids)} tokens; raise sequence_length ({length})")
        return [encoded]
    found: Any = tokenizer(row["text"], add_special_tokens=False, verbose=False)
    ids = found["input_ids"]
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    windows = []
    for start in range(0, len(ids), length):
        before = [first if start == 0 else ids[start - 1]]
        part = ids[start : start + length]
        windows.append(Encoded(before + part, [False] + [True] * len(part)))
    return windows
