"""Instruction fine-tuning: learn to answer, on TRL's SFT trainer."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from specs.train import IftTrainSpec
from stages.columns import TokenColumns
from stages.conversation import encode_conversation, turn_terminator
from stages.finite import IGNORED
from stages.objective import MaskReport, ObjectiveSpec, RowMask
from stages.rows import Row, conversation_row

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


class Ift(ObjectiveSpec):
    """Instruction fine-tuning: only what the assistant says is learned, and the token that ends its turn."""

    kind: Literal["ift"]
    train: IftTrainSpec

    needs_chat_template: ClassVar[bool] = True

    @staticmethod
    def normalise(row: Row) -> Row:
        """A conversation; see `stages.rows.conversation_row`."""
        return conversation_row(row)

    def trainer_arguments(self) -> dict[str, Any]:
        """Packing and length in TRL's terms; rows come cut to length, so no packing cuts them again."""
        return {
            "max_length": self.train.sequence_length,
            "packing": self.train.packing,
            "packing_strategy": "bfd",
        }

    def dataset(self, rows: Sequence[Row], tokenizer: "PreTrainedTokenizerBase") -> tuple["Dataset", MaskReport]:
        """Conversations as token ids and labels; rows with nothing left to learn are dropped and counted."""
        length = self.train.sequence_length
        terminator = turn_terminator(tokenizer)
        columns = TokenColumns()
        each = []
        for row in rows:
            ids, mask = encode_conversation(tokenizer, row["messages"])
            labels = [token if on else IGNORED for token, on in zip(ids[:length], mask[:length], strict=True)]
            trained = sum(label != IGNORED for label in labels)
            seen = len(labels) if trained else 0
            each.append(RowMask(len(ids), seen, trained, ended=terminator in labels, truncated=len(ids) > length))
            if trained:
                columns.add(ids[:length], labels)
        report = MaskReport.of(each, tokens=sum(row.seen for row in each), terminator=terminator is not None)
        return columns.dataset(), report
