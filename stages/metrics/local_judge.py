"""A judge that is loaded here: which of the three letters it would say next."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from specs.metric import JudgeSpec
from stages.conversation import render
from stages.errors import InvalidInput
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
    """
    letters = [_tokens(tokenizer, letter) for letter in LETTERS]
    if len({token for tokens in letters for token in tokens}) < sum(map(len, letters)):
        raise InvalidInput(
            f"metric {label}: the judge's tokenizer has no tokens for the letters A, B and C; take another"
        )

    def ask(questions: Sequence[str]) -> list[str | None]:
        prompts = [_encoded(tokenizer, one) for one in questions]
        for number, ids in enumerate(prompts):
            if len(ids) > spec.sequence_length:
                raise InvalidInput(
                    f"metric {label}: the question on prompt {number // 2 + 1} has {len(ids)} tokens; raise its "
                    f"sequence_length ({spec.sequence_length}), or lower max_new_tokens of metric {spec.answers}"
                )
        order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))
        found: dict[int, str] = {}
        for start in range(0, len(order), spec.batch_size):
            chosen = order[start : start + spec.batch_size]
            scores = _next_scores(model, [prompts[number] for number in chosen])
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
    places = (attention.cumsum(-1) - 1).clamp(min=0)
    with torch.inference_mode():
        scores: torch.Tensor = model(
            input_ids=ids.to(device), attention_mask=attention.to(device), position_ids=places.to(device)
        ).logits[:, -1]
    return scores.float().cpu()
