"""LLaMA-Adapter (Zhang et al., arXiv 2303.16199): gated learned prompts inside the last layers' attention."""

from collections.abc import Iterator
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
        """Another architecture than PEFT knows."""
        if model_type(config) not in ARCHITECTURES:
            return (
                f"llama_adapter serves {', '.join(ARCHITECTURES)} models, and this one is {model_type(config)}; "
                "use bottleneck or prefix_tuning"
            )
        return None

    def field_problems(self, config: dict[str, Any]) -> Iterator[tuple[str, str]]:
        """More layers than there are."""
        depth = config.get("num_hidden_layers", config.get("n_layer"))
        if self.layers is not None and isinstance(depth, int) and self.layers > depth:
            yield "layers", f"{self.layers}, and this model has {depth}; name {depth} or fewer, or leave it out"

    def adapter_config(self, model: "PreTrainedModel") -> "PeftConfig":
        """PEFT's own."""
        from peft import AdaptionPromptConfig

        if reason := self.unsupported(model.config.to_dict()):
            raise InvalidInput(reason)
        for field, message in self.field_problems(model.config.to_dict()):
            raise InvalidInput(f"{field}: {message}")
        depth = model.config.num_hidden_layers
        return AdaptionPromptConfig(adapter_len=self.length, adapter_layers=self.layers or depth, task_type="CAUSAL_LM")
