"""Prefix tuning (Li & Liang, arXiv 2101.00190): learned keys and values in front of every layer's own."""

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from stages.methods.unmerged import VirtualTokens

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel


class PrefixTuning(VirtualTokens):
    """Train keys and values of virtual tokens in every layer; last stage only, the result is base + adapter.

    The paper's reparametrisation by an MLP is not offered: PEFT keeps what the MLP gives and not the MLP, so a
    stage that was interrupted could not go on.
    """

    kind: Literal["prefix_tuning"]
    virtual_tokens: Annotated[int, Field(gt=0)] = 20
    """Length of the prefix."""

    recomputes: ClassVar[bool] = False

    def adapter_config(self, model: "PreTrainedModel") -> "PeftConfig":
        """PEFT's own."""
        from peft import PrefixTuningConfig

        return PrefixTuningConfig(num_virtual_tokens=self.virtual_tokens, task_type="CAUSAL_LM")
