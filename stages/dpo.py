"""Direct preference optimisation and its variants: learn how to say it, on TRL's DPO trainer."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from specs.train import DpoTrainSpec
from stages.conversation import encode_conversation, turn_terminator
from stages.objective import MaskReport, ObjectiveSpec
from stages.rows import Row, preference_row

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback


class Dpo(ObjectiveSpec):
    """Alignment on pairs: raise the chosen answer over the rejected one, relative to the stage's start."""

    kind: Literal["dpo"]
    train: DpoTrainSpec

    trainer_config: ClassVar[tuple[str, str]] = ("trl.trainer.dpo_config", "DPOConfig")
    needs_chat_template: ClassVar[bool] = True

    @staticmethod
    def normalise(row: Row) -> Row:
        """A pair; see `stages.rows.preference_row`."""
        return preference_row(row)

    def trainer_arguments(self) -> dict[str, Any]:
        """Beta, loss and length in TRL's terms."""
        return {
            "beta": self.train.beta,
            "loss_type": [self.train.loss],
            "label_smoothing": self.train.label_smoothing,
            "max_length": self.train.sequence_length,
            # An adapted model keeps its start in the frozen copy of its adapter that TRL adds. Any other scores
            # the reference before its first step: TRL would otherwise read a second model from wherever the
            # config says that this one came from.
            "precompute_ref_log_probs": not self.method.is_adapter,
        }

    @property
    def first_loss(self) -> float | None:
        """What the loss must be while policy and reference are the same model; None where it says nothing."""
        return math.log(2) if self.train.loss == "sigmoid" else None

    def dataset(self, rows: Sequence[Row], tokenizer: "PreTrainedTokenizerBase") -> tuple["Dataset", MaskReport]:
        """Pairs as messages, which TRL tokenises; a pair with nothing left to compare is dropped and counted."""
        from datasets import Dataset

        length = self.train.sequence_length
        terminator = turn_terminator(tokenizer)
        kept: list[Row] = []
        tokens = trained = truncated = ended = 0
        for row in rows:
            answers = [encode_conversation(tokenizer, [*row["prompt"], *row[side]]) for side in ("chosen", "rejected")]
            truncated += any(len(answer.ids) > length for answer in answers)
            marked = [sum(answer.mask[:length]) for answer in answers]
            if not all(marked):
                continue
            kept.append(row)
            tokens += sum(min(len(answer.ids), length) for answer in answers)
            trained += sum(marked)
            ended += all(
                terminator in [t for t, on in zip(a.ids[:length], a.mask, strict=False) if on] for a in answers
            )
        report = MaskReport(
            rows=len(rows),
            tokens=tokens,
            trained_tokens=trained,
            truncated_rows=truncated,
            dropped_rows=len(rows) - len(kept),
            terminator_trained=None if terminator is None else ended == len(kept),
        )
        return Dataset.from_list(kept), report

    def trainer(
        self,
        model: Any,
        tokenizer: "PreTrainedTokenizerBase",
        dataset: "Dataset",
        arguments: dict[str, Any],
        callbacks: list["TrainerCallback"],
    ) -> "Trainer":
        """TRL's DPO trainer, with a reference that is the stage's start whatever the method."""
        from trl import DPOConfig, DPOTrainer

        return DPOTrainer(
            model=model,
            args=DPOConfig(**arguments),
            train_dataset=dataset,
            processing_class=tokenizer,
            callbacks=callbacks,
        )
