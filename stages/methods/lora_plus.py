"""LoRA+ (Hayou et al., arXiv 2402.12354): B learns faster than A."""

from typing import TYPE_CHECKING, Annotated, Literal, cast

from pydantic import Field

from stages.methods.lora import LowRank

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import Trainer


class LoraPlus(LowRank):
    """LoRA with a larger learning rate for B, which starts at zero and limits what A can do."""

    kind: Literal["lora_plus"]
    learning_rate_ratio: Annotated[float, Field(ge=1)] = 16.0
    """The learning rate of B over that of A, which is the stage's."""

    def attach(self, trainer: "Trainer") -> None:
        """Give the trainer its own choice of optimizer, with two learning rates."""
        from peft.optimizers import create_loraplus_optimizer

        optimizer, settings = trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)
        trainer.optimizer = create_loraplus_optimizer(
            cast("PeftModel", trainer.model),
            optimizer,
            loraplus_lr_ratio=self.learning_rate_ratio,
            loraplus_weight_decay=trainer.args.weight_decay,
            **settings,
        )
