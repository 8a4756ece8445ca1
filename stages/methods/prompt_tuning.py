"""Prompt tuning (Lester et al., arXiv 2104.08691): learned embeddings in front of the text."""

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from stages.methods.unmerged import VirtualTokens

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel


class PromptTuning(VirtualTokens):
    """Train the embeddings of virtual tokens; last stage only, the result is base + adapter."""

    kind: Literal["prompt_tuning"]
    virtual_tokens: Annotated[int, Field(gt=0)] = 20
    """Length of the prompt."""
    initial: Literal["vocabulary", "random"] = "vocabulary"
    """Embeddings of tokens drawn from the vocabulary (section 3.2 of the paper), or standard normal values, far
    larger than most models' embeddings."""

    def adapter_config(self, model: "PreTrainedModel") -> "PeftConfig":
        """PEFT's own."""
        from peft import PromptTuningConfig

        initial = {"vocabulary": "SAMPLE_VOCAB", "random": "RANDOM"}[self.initial]
        return PromptTuningConfig(
            num_virtual_tokens=self.virtual_tokens, prompt_tuning_init=initial, task_type="CAUSAL_LM"
        )
