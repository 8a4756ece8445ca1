"""LoRA-FA (Zhang et al., arXiv 2308.03303): A stays as drawn, only B trains."""

from typing import TYPE_CHECKING, ClassVar, Literal

from stages.methods.base import Prepared, Reference, Start
from stages.methods.lora import LowRank

if TYPE_CHECKING:
    from transformers import PreTrainedModel, Trainer


class LoraFa(LowRank):
    """LoRA with A frozen: half of the trained parameters, and no input of a layer is kept for its gradient."""

    kind: Literal["lora_fa"]
    trained: ClassVar[str] = ".lora_B."
    # Switching an adapter off and on again makes all of it trainable, so the reference is scored once, before.
    reference: ClassVar[Reference] = "precomputed"

    def prepare(self, model: "PreTrainedModel", start: Start) -> Prepared:
        """Add the adapters; only B trains. A is held in float32 too: it is part of the update."""
        import torch

        prepared = super().prepare(model, start)
        for name, parameter in prepared.model.named_parameters():
            if ".lora_A." in name:
                parameter.data = parameter.data.to(torch.float32)
        return prepared

    def attach(self, trainer: "Trainer") -> None:
        """Freeze A once more, after the trainer scored the reference with the adapter off."""
        for name, parameter in trainer.model.named_parameters():
            if ".lora_A." in name:
                parameter.requires_grad_(False)
