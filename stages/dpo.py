"""Direct preference optimisation and its variants: learn how to say it, on TRL's DPO trainer."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from specs.train import DpoTrainSpec
from stages.conversation import encode_conversation, turn_terminator
from stages.errors import StageFailed
from stages.finite import IGNORED, learned_rows
from stages.objective import MaskReport, ObjectiveSpec, RowMask
from stages.rows import Row, preference_row

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback


REFERENCE_TOLERANCE = 0.05
"""Nats that policy and reference may differ by on a pair: the same model, batched otherwise, under autocast."""

_SHARE = "share"
"""The key under which a micro-batch says what part of its batch it is, relative to an even one."""


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
            # A model that cannot become its start again scores the reference before its first step: TRL would
            # otherwise read a second model from wherever the config says that this one came from.
            "precompute_ref_log_probs": self.method.reference == "precomputed",
        }

    @property
    def first_loss(self) -> float | None:
        """What the loss must be while policy and reference are the same model; None where it says nothing."""
        known = self.method.starts_at_reference and not self.method.adds_to_loss
        return math.log(2) if self.train.loss == "sigmoid" and known else None

    def check_reference(self, trainer: "Trainer") -> Callable[[], None]:
        """Compare the log-probabilities of policy and reference on the first pairs, under the trainer's autocast.

        The first loss alone would not do: most variants have none that is known, and a policy that was moved
        together with its reference has the right one.
        """
        unwrapped: Any = trainer
        pairs = [unwrapped.train_dataset[number] for number in range(min(4, len(unwrapped.train_dataset)))]
        batch = unwrapped._prepare_inputs(unwrapped.data_collator(pairs))
        start = self._reference(unwrapped, batch)
        if not bool(start.isfinite().all()):
            shown = "\n".join(f"  {row}" for row in learned_rows(batch, unwrapped.processing_class))
            raise StageFailed(
                f"stage {self.name}: the start model gives log-probabilities that are inf or nan to some of the first "
                f"pairs, whose chosen answers begin with\n{shown}\nLook at these rows in the data; if they are sound, "
                "the start model is not: look at the stage before, or take another base"
            )
        if self.method.starts_at_reference:
            self._hold("policy and reference differ before the first step", _policy(unwrapped, batch), start)
        else:  # by design: then the reference must be what is left without the adapter
            with unwrapped.model.disable_adapter():
                plain = _policy(unwrapped, batch)
            self._hold("the reference is not the model without its adapter", plain, start)
        changed = "training changed the reference"
        return lambda: self._hold(changed, self._reference(unwrapped, batch), start)

    def _reference(self, trainer: Any, batch: dict[str, Any]) -> "torch.Tensor":
        import torch

        if self.method.reference != "precomputed":
            training = trainer.model.training
            trainer.model.eval()
            found = trainer.compute_ref_log_probs(trainer.model, batch)
            trainer.model.train(training)
        else:
            found = batch["ref_chosen_logps"], batch["ref_rejected_logps"]
        return torch.cat(list(found)).float()

    def _hold(self, what: str, found: "torch.Tensor", wanted: "torch.Tensor") -> None:
        difference = float((found - wanted).abs().max())
        if not difference <= REFERENCE_TOLERANCE:
            raise StageFailed(
                f"stage {self.name}: {what} (reference off by {difference:.2g} nats, allowed "
                f"{REFERENCE_TOLERANCE:g}); this is a fault of ours, please report it"
            )

    def dataset(self, rows: Sequence[Row], tokenizer: "PreTrainedTokenizerBase") -> tuple["Dataset", MaskReport]:
        """Pairs as messages, which TRL tokenises; a pair with nothing left to compare is dropped and counted."""
        from datasets import Dataset

        length = self.train.sequence_length
        terminator = turn_terminator(tokenizer)
        kept: list[Row] = []
        each: list[RowMask] = []
        for row in rows:
            answers = [encode_conversation(tokenizer, [*row["prompt"], *row[side]]) for side in ("chosen", "rejected")]
            lengths = [len(answer.ids) for answer in answers]
            marked = [sum(answer.mask[:length]) for answer in answers]
            ends = [terminator in [t for t, on in zip(a.ids[:length], a.mask, strict=False) if on] for a in answers]
            sees = all(marked)
            each.append(
                RowMask(
                    length=sum(lengths),
                    seen=sum(min(one, length) for one in lengths) if sees else 0,
                    trained=sum(marked) if sees else 0,
                    ended=all(ends),
                    truncated=any(one > length for one in lengths),
                )
            )
            if sees:
                kept.append(row)
        report = MaskReport.of(each, tokens=sum(row.seen for row in each), terminator=terminator is not None)
        return Dataset.from_list(kept), report

    def token_rows(
        self, dataset: "Dataset", tokenizer: "PreTrainedTokenizerBase"
    ) -> Iterator[tuple["torch.Tensor", "torch.Tensor"]]:
        """The chosen answers as token ids and labels."""
        import torch

        for row in dataset:
            answer = encode_conversation(tokenizer, [*row["prompt"], *row["chosen"]])
            ids = torch.tensor([answer.ids[: self.train.sequence_length]])
            mask = torch.tensor([answer.mask[: self.train.sequence_length]], dtype=torch.bool)
            yield ids, ids.masked_fill(~mask, IGNORED)

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

        copies = self.method.reference == "adapter_copy"
        with nullcontext() if copies else _without_adapter_copy(model):
            made = DPOTrainer(
                model=model,
                args=DPOConfig(**arguments),
                train_dataset=dataset,
                processing_class=tokenizer,
                callbacks=callbacks,
            )
        _weigh_pairs_alike(made)
        return made


@contextmanager
def _without_adapter_copy(model: Any) -> Iterator[None]:
    """Keep TRL 1.16 from adding a copy of the adapter as the reference: it then switches the adapter off instead.

    The copy costs memory and, where an adapter starts from an SVD, a second one; AdaLoRA refuses it altogether.
    """
    model.add_adapter = lambda *_: None
    model.get_parameter = lambda name: type(model).get_parameter(model, name.replace(".ref.", ".default."))
    try:
        yield
    finally:
        del model.add_adapter, model.get_parameter


def _weigh_pairs_alike(trainer: Any) -> None:
    """Let a pair count in the last batch of an epoch, which may end in a smaller micro-batch, as in any other.

    transformers 5.23 takes the mean over the micro-batches of each one's mean over its pairs: what a batch is cut into
    would change the result, and a rerun with smaller micro-batches would be another run. A full batch keeps its bits.
    """
    collect, loss = trainer.get_batch_samples, trainer.compute_loss

    def get_batch_samples(*arguments: Any, **named: Any) -> Any:
        samples, items = collect(*arguments, **named)
        mean = sum(len(sample["input_ids"]) for sample in samples) / max(1, len(samples))
        return [{**sample, _SHARE: len(sample["input_ids"]) / mean} for sample in samples], items

    def compute_loss(model: Any, inputs: Any, *arguments: Any, **named: Any) -> Any:
        share = inputs.pop(_SHARE, None)
        found = loss(model, inputs, *arguments, **named)
        return found if share is None else found * share

    trainer.get_batch_samples, trainer.compute_loss = get_batch_samples, compute_loss


def _policy(trainer: Any, batch: dict[str, Any]) -> "torch.Tensor":
    """The trained model's summed log-probabilities of the answers: chosen ones first, then rejected ones."""
    import torch

    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, IGNORED)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    training = trainer.model.training
    trainer.model.eval()
    with torch.no_grad(), trainer.accelerator.autocast():
        scored = trainer.model(**inputs, labels=labels, use_cache=False, fused_lm_head=True)
    trainer.model.train(training)
    return scored.log_probs.sum(dim=1).float()  # type: ignore[no-any-return]
