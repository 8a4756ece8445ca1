"""Answers of a model to prompts: greedy or drawn, the same whatever the batch, and drawn alike for every model."""

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from specs.metric import GenerationSpec
from stages.log import event

if TYPE_CHECKING:
    import torch


class Answer(NamedTuple):
    """What a model wrote."""

    ids: list[int]
    """Its tokens, without the one that ended it."""
    stopped: bool
    """Whether the model ended it; if not, it was cut off."""


def answers_of(
    model: Any, prompts: Sequence[list[int]], stops: Sequence[int], spec: GenerationSpec, label: str
) -> list[Answer]:
    """What a model answers to each prompt.

    Args:
        model: a causal language model in eval mode.
        prompts: token ids.
        stops: the tokens that end an answer.
        spec: how tokens are chosen, and how many at most.
        label: what progress is reported as.
    """
    # Prompts of a length together, so that little is padding.
    order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))
    found: dict[int, Answer] = {}
    for start in range(0, len(order), spec.batch_size):
        chosen = order[start : start + spec.batch_size]
        for number, ids in zip(chosen, _batch(model, prompts, chosen, stops, spec), strict=True):
            end = next((place for place, token in enumerate(ids) if token in stops), None)
            found[number] = Answer(ids[:end], end is not None)
        event("measuring", metric=label, done=len(found), total=len(order))
    return [found[number] for number in range(len(prompts))]


def _batch(
    model: Any, prompts: Sequence[list[int]], chosen: list[int], stops: Sequence[int], spec: GenerationSpec
) -> list[list[int]]:
    import torch
    from transformers import GenerationConfig, LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

    length = max(len(prompts[number]) for number in chosen)
    ids = torch.full((len(chosen), length), stops[0] if stops else 0, dtype=torch.long)
    attention = torch.zeros_like(ids)
    for row, number in enumerate(chosen):  # on the left, so that every prompt ends where its answer begins
        prompt = prompts[number]
        ids[row, length - len(prompt) :] = torch.tensor(prompt)
        attention[row, length - len(prompt) :] = 1
    choosing: list[Any] = []
    if spec.temperature > 0:
        choosing = [TemperatureLogitsWarper(spec.temperature), TopPLogitsWarper(spec.top_p), _Drawn(spec.seed, chosen)]
    device = next(model.parameters()).device
    with torch.inference_mode():
        sequences = model.generate(
            input_ids=ids.to(device),
            attention_mask=attention.to(device),
            # All that a model's own settings could change is said: theirs fill what is left out.
            generation_config=GenerationConfig(
                max_new_tokens=spec.max_new_tokens,
                max_length=None,
                min_length=0,
                do_sample=False,
                num_beams=1,
                temperature=1.0,
                top_k=50,
                top_p=1.0,
                repetition_penalty=1.0,
                no_repeat_ngram_size=0,
                use_cache=True,
                eos_token_id=list(stops) or None,
                pad_token_id=stops[0] if stops else 0,
            ),
            logits_processor=LogitsProcessorList(choosing),
        )
    return [[int(token) for token in row] for row in sequences[:, length:].tolist()]


class _Drawn:
    """Turns the likeliest token into a drawn one: logits and Gumbel noise, whose largest sum is a draw from them.

    The noise is that of the prompt's place in the data, so an answer depends on no neighbour, and two models that are
    compared draw from the same numbers (what differs is the models' doing, which makes a comparison sharper).
    """

    def __init__(self, seed: int, numbers: Sequence[int]) -> None:
        import torch

        self._sources = []
        for number in numbers:
            digest = hashlib.sha256(f"{seed}/{number}".encode()).digest()
            self._sources.append(torch.Generator().manual_seed(int.from_bytes(digest[:7], "big")))

    def __call__(self, input_ids: "torch.Tensor", scores: "torch.Tensor") -> "torch.Tensor":
        import torch

        noise = torch.stack([torch.empty(scores.shape[-1]).exponential_(generator=source) for source in self._sources])
        return scores.float() - noise.log().to(scores.device)
