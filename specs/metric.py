"""Metrics: what is measured on the base and after every stage."""

from typing import Annotated, Literal

from pydantic import Field

from specs.base import Spec
from specs.data import DataSpec
from specs.paths import FilePath

Positive = Annotated[int, Field(gt=0)]


class PerplexitySpec(Spec):
    """Bits per byte (and word perplexity) of held-out text, or of the assistant's turns of held-out chats."""

    kind: Literal["perplexity"]
    data: DataSpec
    """Held-out rows: `text`, or `messages`, `prompt` and `completion`, or Alpaca columns."""
    sequence_length: Positive = 1024
    """Window in tokens: longer documents are scored window by window. The value depends on it."""
    batch_size: Positive = 8
    """Windows per forward pass."""


class PreferenceSpec(Spec):
    """Reward accuracy and margin of held-out pairs, the stage's start being the reference model."""

    kind: Literal["preference"]
    data: DataSpec
    """Held-out rows: `prompt`, `chosen`, `rejected`."""
    beta: Annotated[float, Field(gt=0)] = 0.1
    """Scale of the implicit reward (DPO eq. 5)."""
    sequence_length: Positive = 1024
    """Tokens at most of prompt and answer; longer pairs are refused."""
    batch_size: Positive = 8
    """Pairs per forward pass."""


class LmEvalSpec(Spec):
    """A task of the LM evaluation harness, by its installed name or as a task YAML with local files."""

    kind: Literal["lm_eval"]
    task: FilePath
    """A task YAML relative to the spec, or the name of an installed task."""
    metric: str = "acc"
    """The task's measure that gates use when they name none."""
    limit: Positive | None = None
    """The first n rows only."""
    few_shot: Annotated[int, Field(ge=0)] = 0
    """Examples before each question."""
    chat_template: bool | tuple[str, ...] = False
    """Whether questions are put as a user's turn: always, never, or only for the named stages (`base` too)."""
    sequence_length: Positive = 1024
    """The harness's max_length: longer contexts are cut from the left."""
    batch_size: Positive = 8
    """Requests per forward pass."""


MetricSpec = Annotated[PerplexitySpec | PreferenceSpec | LmEvalSpec, Field(discriminator="kind")]
