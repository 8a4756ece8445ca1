"""AdaLoRA (Zhang et al., arXiv 2303.10512): the budget of ranks moves to the matrices that need it."""

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from stages.methods.base import Start
from stages.methods.lora import Adapter
from stages.methods.targets import adapter_targets, check_rank, is_transposed

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig
    from transformers import PreTrainedModel, Trainer

_UNKNOWN_YET = 10**9
"""Stands for the number of steps in PEFT's settings until the trainer has counted them."""


class Adalora(Adapter):
    """Train P diag(E) Q per matrix and set the least important entries of E to zero while training."""

    kind: Literal["adalora"]
    trained: ClassVar[str] = ".lora_"
    adds_to_loss: ClassVar[bool] = True

    initial_rank: Annotated[int, Field(gt=1)] = 12
    """Rank of each update at the start."""
    target_rank: Annotated[int, Field(gt=0)] = 8
    """Average rank at the end."""
    alpha: Annotated[float, Field(gt=0)] | None = None
    """The update is scaled by alpha / initial_rank; twice the initial rank where it is not given."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapters' input while training (DPO switches it off)."""
    warmup_share: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the steps before the budget begins to shrink."""
    final_share: Annotated[float, Field(ge=0, lt=1)] = 0.3
    """Share of the steps after the budget has been reached."""
    allocate_every: Annotated[int, Field(gt=0)] = 1
    """Steps between two allocations of the budget."""
    orthogonality: Annotated[float, Field(ge=0)] = 0.5
    """Weight of the term that keeps P and Q orthogonal (eq. 4)."""

    @model_validator(mode="after")
    def _shrinks(self) -> "Adalora":
        if self.target_rank >= self.initial_rank:
            raise ValueError(
                f"target_rank {self.target_rank} is not below initial_rank {self.initial_rank}: nothing would be pruned"
            )
        if self.warmup_share + self.final_share >= 1:
            raise ValueError("warmup_share and final_share leave no steps in which the budget can shrink")
        return self

    def adapter_config(self, model: "PreTrainedModel", start: Start) -> "PeftConfig":
        """The settings in PEFT's terms; the schedule is set when the number of steps is known."""
        from peft import AdaLoraConfig

        targets = adapter_targets(model, self.target_modules)
        check_rank(model, targets, self.initial_rank)
        return AdaLoraConfig(
            init_r=self.initial_rank,
            target_r=self.target_rank,
            lora_alpha=2 * self.initial_rank if self.alpha is None else self.alpha,
            lora_dropout=self.dropout,
            deltaT=self.allocate_every,
            orth_reg_weight=self.orthogonality,
            total_step=_UNKNOWN_YET,
            target_modules=targets,
            fan_in_fan_out=is_transposed(model, targets),
            task_type="CAUSAL_LM",
        )

    def attach(self, trainer: "Trainer") -> None:
        """Add the orthogonality term to the loss and allocate the budget after each step: nobody else does."""
        from stages.methods.adalora_budget import Budget

        compute_loss = trainer.compute_loss

        def with_orthogonality(
            model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            found = compute_loss(model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch)
            # The trainer averages micro batches itself unless the loss is already per token of the whole batch.
            scaled = _is_scaled(trainer, num_items_in_batch)
            share = 1 / trainer.args.gradient_accumulation_steps if scaled else 1.0
            term = self.orthogonality * share * orthogonality(trainer.model)
            return (found[0] + term, found[1]) if return_outputs else found + term

        trainer.compute_loss = with_orthogonality
        # First in the list: what it keeps in a checkpoint must lie there before the checkpoint is sealed.
        trainer.callback_handler.callbacks.insert(0, Budget(self, trainer.model))


def _is_scaled(trainer: "Trainer", num_items_in_batch: Any) -> bool:
    if trainer.loss_is_scaled_for_ga is not None:
        return bool(trainer.loss_is_scaled_for_ga)
    return bool(trainer.model_accepts_loss_kwargs and num_items_in_batch is not None)


def orthogonality(model: Any) -> "torch.Tensor":
    """Mean over P and Q of all layers of the Frobenius norm of P^T P - I and Q Q^T - I, as PEFT has it (eq. 4)."""
    import torch

    terms = []
    for name, parameter in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            gram = parameter @ parameter.T if "lora_A" in name else parameter.T @ parameter
            terms.append(torch.linalg.matrix_norm(gram - torch.eye(len(gram), device=gram.device, dtype=gram.dtype)))
    return torch.stack(terms).mean()
