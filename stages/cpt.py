"""Continued pre-training: learn a domain's language and facts from raw text, on TRL's SFT trainer."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from specs.train import CptTrainSpec
from stages.conversation import end_of_text
from stages.objective import MaskReport, ObjectiveSpec, RowMask
from stages.rows import Row, text_row

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

_STRATEGIES = {"split": "bfd_split", "wrapped": "wrapped"}


class Cpt(ObjectiveSpec):
    """Continued pre-training: every token of a document is learned, and the token that ends it."""

    kind: Literal["cpt"]
    train: CptTrainSpec

    @staticmethod
    def normalise(row: Row) -> Row:
        """A document; see `stages.rows.text_row`."""
        return text_row(row)

    def trainer_arguments(self) -> dict[str, Any]:
        """Packing and length in TRL's terms."""
        packing = self.train.packing
        return {
            "max_length": self.train.sequence_length,
            "packing": packing != "none",
            "packing_strategy": _STRATEGIES.get(packing, "bfd"),
        }

    def dataset(self, rows: Sequence[Row], tokenizer: "PreTrainedTokenizerBase") -> tuple["Dataset", MaskReport]:
        """Documents as token ids, each followed by the end-of-text token; all of it is learned."""
        from datasets import Dataset

        end = end_of_text(tokenizer, self.train.document_end)
        documents: Any = tokenizer([row["text"] for row in rows], verbose=False)["input_ids"]
        ids = [[*(document[:-1] if document[-1:] == [end] else document), end] for document in documents]
        length = self.train.sequence_length if self.train.packing == "none" else None
        each = [
            RowMask(
                length=len(document),
                seen=(seen := len(document[:length])),
                trained=seen,
                ended=seen == len(document),
                truncated=seen < len(document),
            )
            for document in ids
        ]
        report = MaskReport.of(each, tokens=sum(map(len, ids)))
        return Dataset.from_dict({"input_ids": ids, "labels": ids}), report
