"""LoRA: low-rank adapters beside frozen weights (Hu et al., arXiv 2106.09685)."""

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, cast

from pydantic import Field

from stages.methods.base import MethodSpec, Prepared, Reference, Start

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel


class LowRank(MethodSpec):
    """What the LoRA family shares: dW = (alpha / rank) B A, with B zero at the start."""

    reference: ClassVar[Reference] = "adapter_off"

    rank: Annotated[int, Field(gt=0)] = 16
    """Rank of each update."""
    alpha: Annotated[float, Field(gt=0)] | None = None
    """The update is scaled by alpha / rank; twice the rank where it is not given."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapters' input while training (DPO switches it off)."""
    target_modules: Literal["all-linear"] | Annotated[tuple[str, ...], Field(min_length=1)] = "all-linear"
    """Modules that get an adapter: every linear one but the output head, or names such as q_proj."""

    def targets(self) -> tuple[str, ...] | None:
        """The named modules, if any are named."""
        return None if isinstance(self.target_modules, str) else self.target_modules

    def adapter_config(self) -> "LoraConfig":
        """The settings in PEFT's terms."""
        from peft import LoraConfig

        named = self.target_modules
        return LoraConfig(
            r=self.rank,
            lora_alpha=2 * self.rank if self.alpha is None else self.alpha,
            lora_dropout=self.dropout,
            target_modules=named if isinstance(named, str) else list(named),
            task_type="CAUSAL_LM",
        )

    def prepare(self, model: "PreTrainedModel", start: Start) -> Prepared:
        """Add the adapters; only they train."""
        import torch
        from peft import get_peft_model

        adapted = get_peft_model(model, self.adapter_config())
        trainable = frozenset(name for name, p in adapted.named_parameters() if ".lora_" in name)
        for name, parameter in adapted.named_parameters():
            if name in trainable:
                parameter.data = parameter.data.to(torch.float32)
        return Prepared(adapted, trainable, {})


class Lora(LowRank):
    """Train low-rank adapters: cheap, forgets little, learns less than full training in CPT."""

    kind: Literal["lora"]

    def finish(self, model: "torch.nn.Module", start: Start) -> "PreTrainedModel":
        """Fold the adapters into the weights, in float32; a non-finite adapter is refused by PEFT."""
        return cast("PreTrainedModel", cast("PeftModel", model.float()).merge_and_unload(safe_merge=True))
