"""What the methods on our own PEFT tuner share (`stages.tuner`): SVF, SVFT, LoRA-XS, Tied-LoRA, MultiLoRA."""

from typing import TYPE_CHECKING, Any, ClassVar

from stages.methods.base import Start
from stages.methods.lora import Adapter
from stages.methods.targets import adapter_targets, check_rank

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel, Trainer


class Update(Adapter):
    """Frozen linear layers with a trained update beside each, zero at the start."""

    trained: ClassVar[str] = ".trivium_update."
    decomposes: ClassVar[bool] = False
    """Whether all singular vectors of each target are computed and held."""

    def options(self) -> dict[str, Any]:
        """The method's fields in the tuner's terms; see `stages.tuner.UpdateConfig`."""
        return {}

    def notes(self, config: dict[str, Any]) -> list[str]:
        """Say what the decomposition costs."""
        if not self.decomposes:
            return []
        return [
            f"{self.kind} decomposes every target matrix when the stage starts or resumes, and holds the singular "
            "vectors in float32: once to twice the memory of the targets' own float32 weights"
        ]

    def adapter_config(self, model: "PreTrainedModel", start: Start) -> "PeftConfig":
        """The settings in PEFT's terms."""
        from stages.tuner import UpdateConfig

        targets = adapter_targets(model, self.target_modules)
        options = self.options()
        if "rank" in options:
            check_rank(model, targets, options["rank"])
        return UpdateConfig(form=self.kind, target_modules=targets, seed=start.seed, task_type="CAUSAL_LM", **options)  # type: ignore[arg-type]

    def attach(self, trainer: "Trainer") -> None:
        """Leave the singular vectors out of the trainer's checkpoints: a resumed stage has decomposed anew."""
        from transformers import TrainerCallback

        config: Any = trainer.model.peft_config["default"]

        class OnlyTrained(TrainerCallback):  # type: ignore[misc]
            def on_train_begin(self, *_: Any, **__: Any) -> None:
                config.save_factors = False

            def on_train_end(self, *_: Any, **__: Any) -> None:
                config.save_factors = True

        trainer.add_callback(OnlyTrained())
