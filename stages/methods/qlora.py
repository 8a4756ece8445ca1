"""QLoRA: LoRA over a 4-bit base (Dettmers et al., arXiv 2305.14314).

The merge goes into the dequantised base: that is the model that was trained. Merging into the quantised
layers would round most of a small update away, and merging into the original weights gives another model.
"""

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, cast

from stages.methods.base import Start
from stages.methods.lora import LowRank

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel


class Qlora(LowRank):
    """Train low-rank adapters over a base held in 4 bits: fits a large model on a small GPU."""

    kind: Literal["qlora"]
    quantization: Literal["nf4", "fp4"] = "nf4"
    """The 4-bit data type of the frozen weights."""
    double_quantization: bool = True
    """Quantise the quantisation constants too: 4.13 instead of 4.5 bits per weight."""

    starts_exactly: ClassVar[bool] = False
    widest: ClassVar[str] = "float32"
    requires: ClassVar[tuple[str, ...]] = ("bitsandbytes",)

    def load(self, start: Path, dtype: "torch.dtype", compute: "torch.dtype") -> "PreTrainedModel":
        """The start model with its linear layers in 4 bits; the rest stays in float32, as it was handed over."""
        import torch
        from transformers import BitsAndBytesConfig

        from stages.model import load_plain, training_device

        settings = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=self.quantization,
            bnb_4bit_use_double_quant=self.double_quantization,
            bnb_4bit_compute_dtype=compute,
        )
        model = load_plain(start, torch.float32, training_device(), quantization_config=settings)
        keep_weights_trainable(model)
        return model

    def for_comparison(self, model: "torch.nn.Module", dtype: "torch.dtype") -> "torch.nn.Module":
        """The trained model where it is (4-bit weights stay on their device), computing in ``dtype``."""
        import bitsandbytes as bnb

        for module in model.modules():
            if isinstance(module, bnb.nn.Linear4bit):
                module.compute_dtype = dtype
        return model

    def finish(self, model: "torch.nn.Module", start: Start) -> "PreTrainedModel":
        """Load the start quantised once more, dequantise it and fold the trained adapters in, in float32."""
        import torch
        from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

        base = self.load(start.model, torch.float32, torch.float32).dequantize().to("cpu").float()
        target = get_peft_model(base, self.adapter_config()).float()
        result = set_peft_model_state_dict(target, get_peft_model_state_dict(cast("PeftModel", model)))
        if result.unexpected_keys:
            raise RuntimeError(f"the adapter does not fit its own base: {result.unexpected_keys[:3]}")
        return cast("PreTrainedModel", target.merge_and_unload(safe_merge=True))


def keep_weights_trainable(model: "torch.nn.Module") -> None:
    """Stop bitsandbytes from repacking 4-bit weights in place on CPUs with AVX512-BF16.

    After any forward pass in eval mode it would leave the weights in a layout that its own backward pass
    and dequantisation read wrongly, without an error: wrong gradients, garbage merges.
    """
    import bitsandbytes as bnb

    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
