"""What PiSSA, MiLoRA and OLoRA share: adapters that start as a part of the weights, beside what remains of them."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from stages.adapter import WEIGHTS, change_settings, save_adapter
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
            for layer in adapted_layers(prepared.model).values():
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
        layer.start_factors = (b.clone(), a.clone())
        rest = weight - scale * (b @ a)
        held.copy_(rest.T if transposed else rest)

    def keep(self, model: "torch.nn.Module", folder: Path) -> None:
        """Write the adapter so that it belongs on the start model, not on what remains of it.

        s (B A - B0 A0) is a plain LoRA of twice the rank: A and A0 above one another, B beside -B0.
        """
        import torch
        from safetensors.torch import save_file

        save_adapter(model, folder)
        tensors = {}
        for name, layer in adapted_layers(model).items():
            b0, a0 = (factor.to(layer.lora_A["default"].weight.device) for factor in layer.start_factors)
            tensors[f"{name}.lora_A.weight"] = torch.cat([layer.lora_A["default"].weight.detach(), a0])
            tensors[f"{name}.lora_B.weight"] = torch.cat([layer.lora_B["default"].weight.detach(), -b0], 1)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        change_settings(folder, r=2 * self.rank, lora_alpha=2 * self.scaled_by)


def adapted_layers(model: Any) -> dict[str, Any]:
    """The layers of a PEFT model that carry a LoRA adapter, by name."""
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
