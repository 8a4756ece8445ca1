"""GLoRA (Chavan et al., arXiv 2306.07967): weights and biases scaled and shifted, each by a low-rank term."""

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from stages.methods.base import Start
from stages.methods.lora import Adapter
from stages.methods.targets import adapter_targets, check_rank

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel


class Glora(Adapter):
    """Train W (1 + A) + B, elementwise, and where a layer has a bias b (1 + D) + E + W C."""

    kind: Literal["glora"]
    trained: ClassVar[str] = ".glora_"

    rank: Annotated[int, Field(gt=0)] = 4
    """Rank of A, B and C."""
    bias_terms: Literal["vector", "constant"] = "constant"
    """D and E: one number per output, or one per layer."""

    def adapter_config(self, model: "PreTrainedModel", start: Start) -> "PeftConfig":
        """The settings in PEFT's terms."""
        from peft import GloraConfig

        targets = adapter_targets(model, self.target_modules)
        check_rank(model, targets, self.rank)
        return GloraConfig(r=self.rank, target_modules=targets, config_D_E=self.bias_terms, task_type="CAUSAL_LM")

    def unsupported(self, config: dict[str, Any]) -> str | None:
        """PEFT's layers know no Conv1D."""
        if config.get("model_type") == "gpt2":
            return "method glora cannot adapt GPT-2's Conv1D layers; use lora, dora or adalora"
        return None
