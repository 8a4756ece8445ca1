"""Metrics: what is measured on the base and after every stage."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from specs.base import Spec
from specs.data import DataSpec
from specs.paths import FilePath

Positive = Annotated[int, Field(gt=0)]


class PerplexitySpec(Spec):
    """Bits per byte, word and token of held-out text, or of the assistant's turns of held-out chats."""

    kind: Literal["perplexity"]
    data: DataSpec
    """Held-out rows: `text`, or `messages`, `prompt` and `completion`, or Alpaca columns."""
    sequence_length: Positive = 1024
    """Window in tokens: longer documents are scored window by window. The value depends on it."""
    batch_size: Positive = 8
    """Windows per forward pass."""


class PreferenceSpec(Spec):
    """Reward accuracy, margin and length bias of held-out pairs, the stage's start being the reference model."""

    kind: Literal["preference"]
    data: DataSpec
    """Held-out rows: `prompt`, `chosen`, `rejected`."""
    beta: Annotated[float, Field(gt=0)] = 0.1
    """Scale of the implicit reward (DPO eq. 5)."""
    sequence_length: Positive = 1024
    """Tokens at most of prompt and answer; longer pairs are refused."""
    batch_size: Positive = 8
    """Pairs per forward pass."""


REFUSALS = (
    "I'm sorry, but I",
    "I am sorry, but I",
    "I apologize, but I",
    "Sorry, I can",
    "Sorry, but I can",
    "I can't help",
    "I cannot help",
    "I can't assist",
    "I cannot assist",
    "I can't provide",
    "I cannot provide",
    "I'm unable to",
    "I am unable to",
    "I'm not able to",
    "I am not able to",
    "I will not",
    "I won't",
    "As an AI",
    "As a language model",
    "As a large language model",
)
"""How refusals begin, in English."""


class GenerationSpec(Spec):
    """Answers to fixed prompts, kept for people, and how varied, long, empty, cut off, refused or right they are."""

    kind: Literal["generation"]
    data: DataSpec
    """Rows with `prompt` (text or messages), `messages` or Alpaca columns; an answer that is there is the reference."""
    limit: Annotated[int, Field(gt=0, le=2000)] = 200
    """The first n rows only. All answers are kept."""
    chat_template: bool | tuple[str, ...] = True
    """Whether a prompt is put as a user's turn: always, never, or only for the named stages (`base` too)."""
    temperature: Annotated[float, Field(ge=0, le=10)] = 0.0
    """0 takes the likeliest token each time; above it, tokens are drawn, by the same random numbers for every model."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """With a temperature: draw from the likeliest tokens that make up this share."""
    seed: int = 0
    """Of the draws."""
    max_new_tokens: Positive = 128
    """Tokens after which an answer is cut off."""
    sequence_length: Positive = 1024
    """Tokens at most of prompt and answer; longer prompts are refused."""
    batch_size: Positive = 8
    """Prompts that are answered at once."""
    refusals: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)] = REFUSALS
    """An answer that begins with one of these, in any case, is a refusal; English ones by default."""

    @model_validator(mode="after")
    def _draws(self) -> "GenerationSpec":
        if self.top_p != 1 and self.temperature == 0:
            raise ValueError("top_p goes with a temperature; add one, or remove top_p")
        if self.max_new_tokens >= self.sequence_length:
            raise ValueError(
                f"max_new_tokens {self.max_new_tokens} leaves no room for a prompt; raise sequence_length "
                f"({self.sequence_length})"
            )
        return self


class LmEvalSpec(Spec):
    """A task of the LM evaluation harness, by its installed name or as a task YAML with local files."""

    kind: Literal["lm_eval"]
    task: FilePath
    """A task YAML relative to the spec, or the name of an installed task."""
    metric: str = "acc"
    """The task's measure that gates use when they name none; of several filters, `exact_match,strict-match`."""
    limit: Positive | None = None
    """The first n rows only."""
    few_shot: Annotated[int, Field(ge=0)] | None = None
    """Examples before each question; by default as many as the task itself says."""
    chat_template: bool | tuple[str, ...] = False
    """Whether questions are put as a user's turn: always, never, or only for the named stages (`base` too)."""
    sequence_length: Positive = 1024
    """The harness's max_length: longer contexts are cut from the left."""
    batch_size: Positive = 8
    """Requests per forward pass."""


MetricSpec = Annotated[PerplexitySpec | PreferenceSpec | GenerationSpec | LmEvalSpec, Field(discriminator="kind")]
