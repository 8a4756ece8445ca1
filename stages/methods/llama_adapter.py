"""LLaMA-Adapter (Zhang et al., arXiv 2303.16199): gated learned prompts inside the last layers' attention."""

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from stages.errors import InvalidInput
from stages.methods.unmerged import Unmerged, model_type

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel

ARCHITECTURES = ("llama", "mistral", "gpt2")
"""The model types that PEFT 0.21 knows; a test holds the list against the library."""


class LlamaAdapter(Unmerged):
    """Train prompts that enter attention through a gate of zero; last stage only, the result is base + adapter."""

    kind: Literal["llama_adapter"]
    length: Annotated[int, Field(gt=0)] = 10
    """Vectors in each adapted layer."""
    layers: Annotated[int, Field(gt=0)] | None = None
    """The last n layers are adapted (30 of 32 in the paper); all where it is not given."""

    trained: ClassVar[str] = ".adaption_"

    def unsupported(self, config: dict[str, Any]) -> str | None:
        """Another architecture than PEFT knows, or fewer layers than asked for."""
        if model_type(config) not in ARCHITECTURES:
            return (
                f"llama_adapter serves {', '.join(ARCHITECTURES)} models, and this one is {model_type(config)}; "
                "use bottleneck or prefix_tuning"
            )
        depth = int(config.get("num_hidden_layers", config.get("n_layer", 0)))
        if self.layers is not None and self.layers > depth:
            return f"layers is {self.layers}, and the model has {depth}; name {depth} or fewer, or leave it out"
        return None

    def adapter_config(self, model: "PreTrainedModel") -> "PeftConfig":
        """PEFT's own."""
        from peft import AdaptionPromptConfig

        if reason := self.unsupported(model.config.to_dict()):
            raise InvalidInput(reason)
        depth = model.config.num_hidden_layers
        return AdaptionPromptConfig(adapter_len=self.length, adapter_layers=self.layers or depth, task_type="CAUSAL_LM")
