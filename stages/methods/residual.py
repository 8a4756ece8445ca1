"""What PiSSA, MiLoRA and OLoRA share: adapters that start as a part of the weights, beside what remains of them."""

from typing import TYPE_CHECKING, Any, ClassVar

from stages.methods.base import Prepared, Reference, Start
from stages.methods.lora import LowRank

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


class ResidualLowRank(LowRank):
    """LoRA whose adapters start as factors of each weight: W = (W - s B A) + s B A, s = alpha / rank.

    PEFT's own initialisations run their decomposition again on the remainder when TRL copies the adapter as DPO's
    reference, which moves the policy by whole logits; a stock `LoraConfig` filled here has one decomposition.
    """

    reference: ClassVar[Reference] = "adapter_copy"

    def factors(self, weight: "torch.Tensor") -> tuple["torch.Tensor", "torch.Tensor"]:
        """B (out, rank) and A (rank, in) with B A a part of ``weight`` (out, in), in its precision."""
        raise TypeError(f"method {self.kind} does not say which part of a weight it trains")

    def prepare(self, model: "PreTrainedModel", start: Start) -> Prepared:
        """Add adapters, fill them from the weights and take from the weights what they hold."""
        import torch

        prepared = super().prepare(model, start)
        with torch.no_grad():
            for layer in adapted_layers(prepared.model):
                if layer.get_base_layer().weight.device.type != "meta":
                    self._split(layer)
        return prepared

    def _split(self, layer: Any) -> None:
        import torch

        held = layer.get_base_layer().weight
        transposed = layer.fan_in_fan_out
        weight = (held.T if transposed else held).float()
        b, a = self.factors(weight)
        scale = layer.scaling["default"]
        # In float32: what the adapter holds is what is taken away, whatever the decomposition's own error.
        a, b = (a / scale**0.5).to(torch.float32).contiguous(), (b / scale**0.5).to(torch.float32).contiguous()
        layer.lora_A["default"].weight.copy_(a)
        layer.lora_B["default"].weight.copy_(b)
        rest = weight - scale * (b @ a)
        held.copy_(rest.T if transposed else rest)


def adapted_layers(model: Any) -> list[Any]:
    """The layers of a PEFT model that carry a LoRA adapter."""
    from peft.tuners.lora import LoraLayer

    return [module for module in model.modules() if isinstance(module, LoraLayer)]
