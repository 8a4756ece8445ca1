"""QA-LoRA (Xu et al., arXiv 2309.14717): adapters over a 4-bit base whose merge stays on the 4-bit grid.

PEFT's own serves GPTQ layers only and cannot merge. Here the adapter sees the sum of each group's inputs, as in
algorithm 1 of the paper (its published code sees the mean and divides in the merge), and the merge moves the groups'
zero-points, which are floating-point numbers: rounding them to integers would move logits by a tenth.

The next stage gets a plain checkpoint: the dequantised weights. Its 4-bit form is not kept beside it, as it is still
there: of every group the least weight is number 0 and the largest 15, so `stages.methods.grouped.quantise` with the
same group size finds numbers, scales and zero-points again. A second QA-LoRA stage hence starts without a new error.
"""

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, cast

from pydantic import Field, field_validator

from stages.errors import InvalidInput
from stages.methods.base import Prepared, Reference, Start
from stages.methods.lora import LowRank
from stages.methods.qlora import as_linear, float_experts, unquantisable
from stages.methods.targets import adapter_targets, check_rank, ends_with, linear_modules

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from transformers import PreTrainedModel


class QaLora(LowRank):
    """Train adapters on grouped inputs over a 4-bit base; what is trained merges into 4 bits without a loss."""

    kind: Literal["qa_lora"]
    group_size: Annotated[int, Field(gt=1, le=1024)] = 32
    """Inputs that share a scale, a zero-point and an adapter input; even. 32 costs 6 bits per weight, 128 costs 4.5.
    The adapter's A is (rank, inputs / group size)."""

    reference: ClassVar[Reference] = "precomputed"
    starts_exactly: ClassVar[bool] = False
    narrows: ClassVar[bool] = False
    checkpoints_whole: ClassVar[bool] = True
    rank_bound: ClassVar[str] = "the number of input groups (group_size)"

    @field_validator("group_size")
    @classmethod
    def _packable(cls, size: int) -> int:
        if size % 2:
            raise ValueError("group_size must be even: two 4-bit numbers share a byte")
        return size

    def rank_limit(self, out: int, into: int) -> int:
        """The adapter's A is (rank, groups)."""
        return min(out, -(-into // self.group_size))

    def unsupported(self, config: dict[str, Any]) -> str | None:
        """Why a model has no layer to quantise; None where it has."""
        return unquantisable(self.kind, config)

    def notes(self, config: dict[str, Any]) -> list[str]:
        """Say so where most of a model cannot be quantised."""
        return float_experts(self.kind, config)

    def load(self, start: "Path", dtype: "torch.dtype", compute: "torch.dtype") -> "PreTrainedModel":
        """The start model in float32 on the CPU: what the training device gets is quantised already."""
        import torch

        from stages.model import load_plain

        return load_plain(start, torch.float32)

    def prepare(self, model: "PreTrainedModel", start: Start) -> Prepared:
        """Quantise every linear layer but the output head, and add adapters to the targets; only they train."""
        import torch
        from transformers.pytorch_utils import Conv1D

        from stages.methods.grouped import GroupedLinear
        from stages.model import training_device

        targets = adapter_targets(model, self.target_modules)
        check_rank(model, targets, self.rank)
        model.requires_grad_(False)
        # Subclasses multiply in ways of their own: routers, for one.
        layers = [(name, layer) for name, layer in linear_modules(model) if type(layer) in (torch.nn.Linear, Conv1D)]
        for name, layer in layers:
            grouped = GroupedLinear(as_linear(layer).float(), layer.bias, self.group_size)
            if ends_with(name, targets):
                self._check_groups(name, grouped.scales.shape[1])
                grouped.add_adapter(self.rank, self.scaled_by / self.rank, self.dropout)
            model.set_submodule(name, grouped)
        if not next(model.parameters()).is_meta:
            cast("Any", model).to(training_device())
        trainable = frozenset(name for name, parameter in model.named_parameters() if parameter.requires_grad)
        if not trainable:
            raise InvalidInput(f"target_modules: none of {', '.join(targets)} is a plain linear layer; use method lora")
        held = sum(layer.in_features * layer.out_features for layer in model.modules() if is_grouped(layer))
        rest = sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad)
        share = {"layers": len(layers), "quantized_parameters": held, "float_parameters": rest}
        return Prepared(model, trainable, {"quantization": share})

    def _check_groups(self, name: str, groups: int) -> None:
        """Refuse a rank that the adapter's A (rank, groups) cannot have."""
        if self.rank > groups:
            raise InvalidInput(
                f"rank {self.rank} is larger than the {groups} groups of {self.group_size} inputs of {name} allow; "
                f"lower rank to {groups} or less, lower group_size, or leave that module out of target_modules"
            )

    def finish(self, model: "torch.nn.Module", start: Start) -> "PreTrainedModel":
        """The start model with every quantised weight as it was trained: dequantised, with the moved zero-points."""
        import torch

        from stages.model import load_plain

        plain = load_plain(start.model, torch.float32)
        weights = dict(plain.named_modules())
        with torch.no_grad():
            for name, layer in model.named_modules():
                if is_grouped(layer):
                    as_linear(weights[name]).copy_(cast("Any", layer).merged())
        return plain


def is_grouped(module: Any) -> bool:
    """Whether a module is one of ours in 4 bits."""
    from stages.methods.grouped import GroupedLinear

    return isinstance(module, GroupedLinear)
