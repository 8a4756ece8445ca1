"""LoRA: low-rank adapters beside frozen weights (Hu et al., arXiv 2106.09685)."""

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, cast

from pydantic import Field

from stages.methods.base import MethodSpec, Prepared, Reference, Start, train_only
from stages.methods.targets import Targets, adapter_targets, check_rank, is_transposed

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig, PeftConfig, PeftModel
    from transformers import PreTrainedModel


def only_training(adapted: "torch.nn.Module", *parts: str) -> Prepared:
    """A PEFT model in which the parameters train whose name contains one of ``parts``, in float32, and no others."""
    names = frozenset(name for name, _ in adapted.named_parameters() if any(part in name for part in parts))
    train_only(adapted, names)
    return Prepared(adapted, names, {})


class Adapter(MethodSpec):
    """What methods share that put a PEFT adapter beside frozen linear layers and fold it in at the end."""

    reference: ClassVar[Reference] = "adapter_off"
    trained: ClassVar[str]
    """What the names of trained parameters contain."""

    target_modules: Targets = "all-linear"
    """Modules that get an adapter: all-linear, attention, query-value, or names such as q_proj."""

    def targets(self) -> tuple[str, ...] | None:
        """The named modules, if any are named."""
        return None if isinstance(self.target_modules, str) else self.target_modules

    def adapter_config(self, model: "PreTrainedModel", start: Start) -> "PeftConfig":
        """The settings in PEFT's terms."""
        raise TypeError(f"method {self.kind} does not say how its adapter is set up")

    def prepare(self, model: "PreTrainedModel", start: Start) -> Prepared:
        """Add the adapters; only they train."""
        from peft import get_peft_model

        return only_training(get_peft_model(model, self.adapter_config(model, start)), self.trained)

    def finish(self, model: "torch.nn.Module", start: Start) -> "PreTrainedModel":
        """Fold the adapters into the weights, in float32; a non-finite adapter is refused by PEFT."""
        return cast("PreTrainedModel", cast("PeftModel", model.float()).merge_and_unload(safe_merge=True))


class LowRank(Adapter):
    """What the LoRA family shares: dW = (alpha / rank) B A, with B zero at the start."""

    trained: ClassVar[str] = ".lora_"

    rank: Annotated[int, Field(gt=0)] = 16
    """Rank of each update."""
    alpha: Annotated[float, Field(gt=0)] | None = None
    """The update is scaled by alpha / rank; twice the rank where it is not given."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapters' input while training (DPO switches it off)."""

    @property
    def scaled_by(self) -> float:
        """The alpha in use: the one given, or twice the rank."""
        return 2 * self.rank if self.alpha is None else self.alpha

    def options(self) -> dict[str, Any]:
        """What a variant adds to PEFT's `LoraConfig`."""
        return {}

    def adapter_config(self, model: "PreTrainedModel", start: Start) -> "LoraConfig":
        """The settings in PEFT's terms."""
        from peft import LoraConfig

        targets = adapter_targets(model, self.target_modules)
        check_rank(model, targets, self.rank)
        return LoraConfig(
            r=self.rank,
            lora_alpha=self.scaled_by,
            lora_dropout=self.dropout,
            target_modules=targets,
            fan_in_fan_out=is_transposed(model, targets),
            task_type="CAUSAL_LM",
            **self.options(),
        )


class Lora(LowRank):
    """Train low-rank adapters: cheap, forgets little, learns less than full training in CPT."""

    kind: Literal["lora"]
