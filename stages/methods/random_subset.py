"""A control for Spectrum: as many weight matrices of each module type, drawn at random."""

import random
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from stages.methods.base import MethodSpec, Prepared, Start
from stages.methods.parts import model_matrices, train_matrices, whole_again

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


class RandomSubset(MethodSpec):
    """Train a random share of the weight matrices of each module type: what Spectrum must beat to mean something."""

    kind: Literal["random_subset"]
    percent: Annotated[float, Field(gt=0, le=100)] = 25.0
    """Share of the matrices of each module type that train, at least one; drawn by the stage's seed."""

    checkpoints_whole = True

    def unsupported(self, config: dict[str, Any]) -> str | None:
        """Quantised weights cannot be trained."""
        if config.get("quantization_config"):
            return "method random_subset trains whole weights, and those of this model are quantised; use qlora"
        return None

    def prepare(self, model: "PreTrainedModel", start: Start) -> Prepared:
        """Draw matrices and unfreeze them."""
        from stages.scan.select import by_type, share

        chosen = []
        for kind, own in by_type(model_matrices(model), lambda matrix: matrix).items():
            draw = random.Random(f"{start.seed} {kind}")  # noqa: S311 - a draw that repeats, nothing secret
            chosen += sorted(draw.sample(own, share(len(own), self.percent)), key=own.index)
        record = {"selected": [matrix.module for matrix in chosen], "seed": start.seed}
        return Prepared(model, train_matrices(model, chosen), record)

    def finish(self, model: "torch.nn.Module", start: Start) -> "PreTrainedModel":
        """Put parts of fused projections back; whole matrices are the model's own."""
        return whole_again(model)
