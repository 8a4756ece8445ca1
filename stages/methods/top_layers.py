"""A control for Spectrum: the weight matrices of the last layers, as many layers as are asked for or affordable.

Nothing below the lowest trained layer needs a gradient, so the backward pass ends there: at the same number of
trained weights a step takes about 0.7 of the time of a selection that reaches down to the first layer (measured on
SmolLM2-135M), and fewer activations are kept.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from pydantic import Field, model_validator

from stages.errors import InvalidInput
from stages.layout import Matrix
from stages.methods.base import MethodSpec, Prepared, Start
from stages.methods.parts import model_matrices, train_matrices, whole_again

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

Share = Annotated[float, Field(gt=0, lt=1)]


class Cost(NamedTuple):
    """What training costs, as shares of full fine-tuning."""

    time: float
    """Of a step's arithmetic."""
    memory: float
    """Of the bytes of weights, gradients and optimizer state."""


class TopLayers(MethodSpec):
    """Train the weight matrices of the last layers: the number of them, or what a budget allows."""

    kind: Literal["top_layers"]
    layers: Annotated[int, Field(gt=0)] | None = None
    """How many of the last layers train."""
    time_budget: Share | None = None
    """Or: as many as keep a step's arithmetic within this share of full fine-tuning's."""
    memory_budget: Share | None = None
    """Or: as many as keep weights, gradients and AdamW's state within this share of full fine-tuning's. Activations
    depend on the batch and are left out; they shrink with the number of trained layers."""

    checkpoints_whole = True

    @model_validator(mode="after")
    def _one_measure(self) -> "TopLayers":
        budgets = [name for name in ("time_budget", "memory_budget") if getattr(self, name) is not None]
        if (self.layers is None) == (not budgets):
            raise ValueError("give either layers, or time_budget or memory_budget or both")
        return self

    def unsupported(self, config: dict[str, Any]) -> str | None:
        """Quantised weights cannot be trained."""
        if config.get("quantization_config"):
            return "method top_layers trains whole weights, and those of this model are quantised; use qlora"
        return None

    def field_problems(self, config: dict[str, Any]) -> Iterator[tuple[str, str]]:
        """More layers than there are."""
        number = config.get("num_hidden_layers", config.get("n_layer"))
        if self.layers is not None and isinstance(number, int) and self.layers > number:
            yield "layers", f"{self.layers}, and this model has {number}; ask for fewer, or use method full"

    def prepare(self, model: "PreTrainedModel", start: Start) -> Prepared:
        """Unfreeze the matrices of the last layers."""
        own = model_matrices(model)
        numbers = sorted({matrix.layer for matrix in own})
        lowest = numbers[-self._count(own, numbers, model)]
        chosen = [matrix for matrix in own if matrix.layer >= lowest]
        cost = costs(own, lowest, _outside(own, model), _in_head(model))
        record = {"lowest_layer": lowest, "layers": len(numbers), "estimated_cost": cost._asdict()}
        return Prepared(model, train_matrices(model, chosen), record)

    def finish(self, model: "torch.nn.Module", start: Start) -> "PreTrainedModel":
        """Nothing to merge: the trained matrices are the model's own."""
        return whole_again(model)

    def _count(self, own: tuple[Matrix, ...], numbers: list[int], model: "PreTrainedModel") -> int:
        """How many layers train."""
        if self.layers is not None:
            if self.layers > len(numbers):
                raise InvalidInput(f"layers: {self.layers}, and this model has {len(numbers)}")
            return self.layers
        outside, head = _outside(own, model), _in_head(model)
        allowed = Cost(self.time_budget or 1.0, self.memory_budget or 1.0)
        by_count = [costs(own, lowest, outside, head) for lowest in reversed(numbers)]
        fitting = [cost.time <= allowed.time and cost.memory <= allowed.memory for cost in by_count]
        if not fitting[0]:
            raise InvalidInput(
                f"not even the last layer fits the budget: it takes {by_count[0].time:.2f} of full fine-tuning's time "
                f"and {by_count[0].memory:.2f} of its memory; raise time_budget or memory_budget above that"
            )
        return fitting.index(False) if False in fitting else len(fitting)


def costs(own: tuple[Matrix, ...], lowest: int, outside: int, head: int) -> Cost:
    """What training the matrices of the layers from ``lowest`` on costs.

    Two operations per weight and token in the forward pass, two for the gradient of the activations in every layer
    from the lowest trained one up, two for the gradient of every trained weight. Memory: 4 bytes per weight, 4 for its
    gradient, 8 for AdamW. Measured on SmolLM2-135M with the last 7 of 30 layers: 0.49 of the time (estimated 0.53)
    and 0.37 of the memory with activations (estimated 0.39).

    Args:
        own: the matrices inside the layers.
        lowest: the lowest layer that trains.
        outside: parameters outside those matrices.
        head: how many weights the output head multiplies with, tied or not.
    """
    inside = sum(matrix.size for matrix in own)
    trained = sum(matrix.size for matrix in own if matrix.layer >= lowest)
    time = (2 * (inside + head) + 2 * (trained + head) + 2 * trained) / (6 * (inside + head))
    every = inside + outside
    return Cost(time, (4 * every + 12 * trained) / (16 * every))


def _outside(own: tuple[Matrix, ...], model: "PreTrainedModel") -> int:
    every = sum(int(parameter.numel()) for parameter in model.parameters())
    return every - sum(matrix.size for matrix in own)


def _in_head(model: "PreTrainedModel") -> int:
    head = model.get_output_embeddings()
    return 0 if head is None else int(head.weight.numel())
