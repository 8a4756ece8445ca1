"""The contract of an objective, and what its masks came to."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from specs.pipeline import StageSpec
from stages.data import Count
from stages.errors import InvalidInput
from stages.methods import Method
from stages.rows import Row

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback


class RowMask(NamedTuple):
    """What is learned of one row."""

    length: int
    """Its tokens, whole; of a pair, those of both answers, each after its prompt."""
    seen: int
    """Those of them that the trainer sees: none of a dropped row."""
    trained: int
    ended: bool
    """Whether the token that ends each turn (or the document) is learned."""
    truncated: bool
    """Whether it is longer than the sequence length; its end is not seen."""


@dataclass(frozen=True, slots=True)
class MaskReport:
    """What a stage really trains on."""

    rows: int
    tokens: int
    trained_tokens: int
    truncated_rows: int
    """Rows longer than the sequence length; their end is not seen."""
    dropped_rows: int
    """Rows of which no trained token is left within the sequence length."""
    terminator_trained: bool | None
    """Whether the token that ends a turn (or a document) is learned; None where there is none."""
    each: tuple[RowMask, ...]
    """Of every row, in order."""

    @classmethod
    def of(cls, each: Sequence[RowMask], tokens: int, *, terminator: bool = True) -> "MaskReport":
        """The sums.

        Args:
            each: what is learned of every row.
            tokens: what the trained ones are a share of.
            terminator: whether there is a token that ends a turn or a document.
        """
        kept = [row for row in each if row.trained]
        return cls(
            rows=len(each),
            tokens=tokens,
            trained_tokens=sum(row.trained for row in kept),
            truncated_rows=sum(row.truncated for row in each),
            dropped_rows=len(each) - len(kept),
            terminator_trained=all(row.ended for row in kept) if terminator else None,
            each=tuple(each),
        )

    def as_record(self) -> dict[str, Any]:
        """For manifests and tables, with the share that is trained."""
        record = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "each"}
        return record | {"trained_share": round(self.trained_tokens / max(1, self.tokens), 4)}

    def checked(self, stage: str, read: Sequence[Count]) -> "MaskReport":
        """The report itself.

        Args:
            stage: its name.
            read: what was read of each of its sources.

        Raises:
            InvalidInput: nothing would be trained.
        """
        if self.trained_tokens == 0:
            raise InvalidInput(
                f"stage {stage}: no token would be trained: {self.dropped_rows} of {self.rows} rows have nothing to "
                f"learn within train.sequence_length; raise it, or look at the rows (read: {'; '.join(map(str, read))})"
            )
        return self


class ObjectiveSpec(StageSpec):
    """What a stage learns from its rows. One subclass per file."""

    method: Method

    version: ClassVar[int] = 2
    """Part of a stage's identity: raise it when the objective computes something else."""
    trainer_config: ClassVar[tuple[str, str]] = ("trl.trainer.sft_config", "SFTConfig")
    """Module and name of the trainer's arguments class, for checking `train.extra` without importing it."""
    needs_chat_template: ClassVar[bool] = False
    """Whether rows are conversations."""

    @staticmethod
    def normalise(row: Row) -> Row:
        """The row as the objective takes it.

        Raises:
            stages.rows.BadRow: it cannot be used.
        """
        raise TypeError("an objective says what its rows look like")

    def trainer_arguments(self) -> dict[str, Any]:
        """The objective's own fields in the trainer library's terms."""
        raise TypeError(f"objective {self.kind} has no trainer")

    def dataset(self, rows: Sequence[Row], tokenizer: "PreTrainedTokenizerBase") -> tuple["Dataset", MaskReport]:
        """The rows as the trainer takes them, and what their masks came to."""
        raise TypeError(f"objective {self.kind} has no dataset")

    def sizes(self, rows: Sequence[Row], tokenizer: "PreTrainedTokenizerBase") -> list[int]:
        """The tokens of each row that the trainer sees."""
        return [row.seen for row in self.dataset(rows, tokenizer)[1].each]

    def token_rows(
        self, dataset: "Dataset", tokenizer: "PreTrainedTokenizerBase"
    ) -> Iterator[tuple["torch.Tensor", "torch.Tensor"]]:
        """The rows of `dataset` as token ids and labels, each of shape (1, length); -100 is not learned."""
        import torch

        for row in dataset:
            yield torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])

    def check_reference(self, trainer: "Trainer") -> Callable[[], None]:
        """Hold the trainer's reference model against its policy, before the first step.

        Returns:
            The check to run after the last step: that training left the reference alone.

        Raises:
            stages.errors.StageFailed: they differ; an objective without a reference has nothing to check.
        """
        return lambda: None

    def trainer(
        self,
        model: Any,
        tokenizer: "PreTrainedTokenizerBase",
        dataset: "Dataset",
        arguments: dict[str, Any],
        callbacks: list["TrainerCallback"],
    ) -> "Trainer":
        """The library's trainer, ready to run: TRL's SFT trainer, over rows of `input_ids` and `labels`."""
        from trl import SFTConfig, SFTTrainer

        return SFTTrainer(
            model=model,
            args=SFTConfig(**arguments),
            train_dataset=dataset,
            processing_class=tokenizer,
            callbacks=callbacks,
        )
