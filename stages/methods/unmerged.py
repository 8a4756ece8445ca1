"""What methods share whose adapter no plain model can hold: it stays beside its base."""

from typing import TYPE_CHECKING, Any, ClassVar

from stages.methods.base import MethodSpec, Prepared, Reference, Start
from stages.methods.lora import only_training

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel


class Unmerged(MethodSpec):
    """A PEFT adapter that stays an adapter: the stage must be the last one, its artifact is base + adapter."""

    mergeable: ClassVar[bool] = False
    reference: ClassVar[Reference] = "adapter_off"
    trained: ClassVar[str]
    """What the names of trained parameters contain."""

    def adapter_config(self, model: "PreTrainedModel") -> "PeftConfig":
        """The settings in PEFT's terms."""
        raise TypeError(f"method {self.kind} does not say how its adapter is set up")

    def prepare(self, model: "PreTrainedModel", start: Start) -> Prepared:
        """Add the adapter; only it trains, in float32."""
        from peft import get_peft_model

        from stages.adapter import ready

        return only_training(ready(get_peft_model(model, self.adapter_config(model))), self.trained)


class VirtualTokens(Unmerged):
    """What prefix and prompt tuning share: learned vectors in front of the text.

    They stand at positions of their own, so the prepared model is not its start from the first step on, the
    model's longest text gets shorter, and documents that share a packed sequence would see one another.
    """

    starts_exactly: ClassVar[bool] = False
    starts_at_reference: ClassVar[bool] = False
    packs: ClassVar[bool] = False
    trained: ClassVar[str] = "prompt_encoder."

    @property
    def positions(self) -> int:
        """The virtual tokens."""
        return int(getattr(self, "virtual_tokens", 0))


def model_type(config: dict[str, Any]) -> str:
    """The architecture that a config.json names."""
    return str(config.get("model_type"))
