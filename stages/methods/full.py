"""Full fine-tuning: every weight trains."""

from typing import TYPE_CHECKING, Literal, cast

from stages.methods.base import MethodSpec, Prepared, Start, train_only

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


class Full(MethodSpec):
    """Train every weight: learns the most, costs the most, forgets the most."""

    kind: Literal["full"]

    checkpoints_whole = True

    def prepare(self, model: "PreTrainedModel", start: Start) -> Prepared:
        """All parameters, tied ones once."""
        names = frozenset(name for name, _ in model.named_parameters())
        train_only(model, names)
        return Prepared(model, names, {})

    def finish(self, model: "torch.nn.Module", start: Start) -> "PreTrainedModel":
        """Nothing to merge."""
        return cast("PreTrainedModel", model.float())
