"""A judge that is loaded here: which of the three letters it would say next."""

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from specs.metric import JudgeSpec
from stages.conversation import render
from stages.errors import InvalidInput, StageFailed
from stages.log import event
from stages.metrics.judge import Ask

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

LETTERS = ("A", "B", "C")


def local_judge(spec: JudgeSpec, label: str, model: Any, tokenizer: "PreTrainedTokenizerBase") -> Ask:
    """A judge by its next token: the likeliest of the letters, with or without a space before it.

    Every question so has a readable reply, and none costs more than one forward pass.

    Args:
        spec: the metric as the spec has it.
        label: what progress and messages call it.
        model: the judge, in eval mode, on its device.
        tokenizer: the judge's; where it has a chat template, the question is put as a user's turn.

    Raises:
        InvalidInput: the letters are no tokens of their own; by the returned function, a question is too long.
        StageFailed: by the returned function: the judge's scores are no numbers.
    """
    letters = [_tokens(tokenizer, letter) for letter in LETTERS]
    if len({token for tokens in letters for token in tokens}) < sum(map(len, letters)):
        raise InvalidInput(
            f"metric {label}: the judge's tokenizer has no tokens for the letters A, B and C; take another"
        )

    positions = getattr(model.config, "max_position_embeddings", None)
    longest = min(spec.sequence_length, positions if isinstance(positions, int) else spec.sequence_length)

    def ask(questions: Sequence[str]) -> list[str | None]:
        prompts = [_encoded(tokenizer, one) for one in questions]
        for number, ids in enumerate(prompts):
            if len(ids) > longest:
                more = (
                    f"raise its sequence_length ({longest})"
                    if longest == spec.sequence_length
                    else f"the judge has {longest} positions: take another one"
                )
                raise InvalidInput(
                    f"metric {label}: question {number + 1} of {len(prompts)} has {len(ids)} tokens; {more}, or lower "
                    f"max_new_tokens of metric {spec.answers}"
                )
        order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))
        found: dict[int, str] = {}
        for start in range(0, len(order), spec.batch_size):
            chosen = order[start : start + spec.batch_size]
            scores = _next_scores(model, [prompts[number] for number in chosen])
            if not all(bool(row[list(tokens)].isfinite().all()) for row in scores for tokens in letters):
                raise StageFailed(
                    f"metric {label}: the judge's scores are no numbers in {model.dtype}; give its model another dtype"
                )
            best = [[row[list(tokens)].max() for tokens in letters] for row in scores]
            found |= {number: LETTERS[own.index(max(own))] for number, own in zip(chosen, best, strict=True)}
            event("measuring", metric=label, done=len(found), total=len(order))
        return [found[number] for number in range(len(prompts))]

    return ask


def _tokens(tokenizer: "PreTrainedTokenizerBase", letter: str) -> set[int]:
    """The tokens that are this letter, alone or after a space."""
    alone, spaced = (tokenizer.encode(text, add_special_tokens=False) for text in (letter, f" {letter}"))
    return {alone[-1], *(spaced[:1] if len(spaced) == 1 else ())} if len(alone) <= 2 else {alone[0]}


def _encoded(tokenizer: "PreTrainedTokenizerBase", question: str) -> list[int]:
    if getattr(tokenizer, "chat_template", None):
        messages = [{"role": "user", "content": question}]
        found: Any = tokenizer(render(tokenizer, messages, ask=True), add_special_tokens=False)
    else:
        found = tokenizer(question)
    ids: list[int] = found["input_ids"]
    return ids


def _next_scores(model: Any, prompts: Sequence[list[int]]) -> "torch.Tensor":
    """Scores of the token after each prompt, of shape (prompts, vocabulary), on the CPU."""
    import torch

    length = max(map(len, prompts))
    ids = torch.zeros((len(prompts), length), dtype=torch.long)
    attention = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):  # on the left, so that every one ends where the reply begins
        ids[row, length - len(prompt) :] = torch.tensor(prompt)
        attention[row, length - len(prompt) :] = 1
    device = next(model.parameters()).device
    accepted = inspect.signature(model.forward).parameters
    more: dict[str, Any] = {}
    if "position_ids" in accepted:  # some models count from the mask themselves, or have no positions
        more["position_ids"] = (attention.cumsum(-1) - 1).clamp(min=0).to(device)
    if "logits_to_keep" in accepted:  # those of all places may be larger than the judge itself
        more["logits_to_keep"] = 1
    with torch.inference_mode():
        scores: torch.Tensor = model(
            input_ids=ids.to(device), attention_mask=attention.to(device), use_cache=False, **more
        ).logits[:, -1]
    return scores.float().cpu()
