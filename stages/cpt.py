"""Continued pre-training: learn a domain's language and facts from raw text, on TRL's SFT trainer."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from specs.train import CptTrainSpec
from stages.columns import CHUNK, TokenColumns
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
        end = end_of_text(tokenizer, self.train.document_end)
        length = self.train.sequence_length if self.train.packing == "none" else None
        columns = TokenColumns()
        each = []
        for start in range(0, len(rows), CHUNK):
            documents: Any = tokenizer([row["text"] for row in rows[start : start + CHUNK]], verbose=False)["input_ids"]
            for document in documents:
                ids = [*(document[:-1] if document[-1:] == [end] else document), end]
                columns.add(ids, ids)
                seen = len(ids[:length])
                cut = seen < len(ids)
                each.append(RowMask(length=len(ids), seen=seen, trained=seen, ended=not cut, truncated=cut))
        return columns.dataset(), MaskReport.of(each, tokens=sum(row.length for row in each))
