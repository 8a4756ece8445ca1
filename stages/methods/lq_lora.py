"""LQ-LoRA (Guo et al., arXiv 2311.12023): LoftQ that knows which weights matter, from gradients on the stage's data.

The paper's second half, an integer program that gives each layer a bit width of its own, is left out: its mixed
widths need storage that bitsandbytes does not have.
"""

from collections.abc import Iterable
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from stages.errors import InvalidInput
from stages.finite import IGNORED
from stages.methods.base import Start
from stages.methods.loftq import AdaptedStart, Importance
from stages.methods.qlora import as_linear

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

FLOOR = 1e-3
"""Least importance of a row or column, as a share of the mean: a direction without gradients cannot be divided by."""


class LqLora(AdaptedStart):
    """LoftQ weighed by the Fisher information: the adapters undo the errors that cost the most.

    Before training, the float32 model runs forward and backward over some rows, on the training device.
    """

    kind: Literal["lq_lora"]
    calibration_rows: Annotated[int, Field(gt=0)] = 64
    """Rows of the stage's data whose gradients say what matters: the first with anything to learn."""

    def notes(self, config: dict[str, Any]) -> list[str]:
        """Say what the calibration costs."""
        return [
            *super().notes(config),
            f"lq_lora first runs {self.calibration_rows} rows through the float32 model, on the training device beside "
            "the quantised one: 4 bytes per parameter until the first step",
        ]

    def importance(self, plain: "PreTrainedModel", names: list[str], start: Start) -> dict[str, Importance]:
        """Square roots of row and column means of the diagonal Fisher information of each named layer.

        Raises:
            InvalidInput: the stage has no row to learn from.
        """
        from stages.model import training_device

        device = training_device()
        found = fisher_roots(plain.to(device), names, start.rows(), self.calibration_rows)
        plain.to("cpu")
        return found


def fisher_roots(
    model: "PreTrainedModel", names: list[str], rows: Iterable[tuple["torch.Tensor", "torch.Tensor"]], count: int
) -> dict[str, Importance]:
    """D1 = sqrt(mean over columns of F), D2 = sqrt(mean over rows of F), F = mean of squared gradients (section 3.3).

    A layer that no row reaches has no entry.

    Args:
        model: plain, in float32; its gradients are left empty.
        names: its linear layers.
        rows: token ids and labels, each of shape (1, length).
        count: rows to use; those without a label are skipped.

    Raises:
        InvalidInput: no row has a label to learn.
    """
    layers = {name: model.get_submodule(name) for name in names}
    model.requires_grad_(False).eval()
    sums: dict[str, list[torch.Tensor]] = {}
    hooks = [_collect(name, layer, sums) for name, layer in layers.items()]
    device = next(model.parameters()).device
    used = 0
    for ids, labels in islice((row for row in rows if bool((row[1][:, 1:] != IGNORED).any())), count):
        model(input_ids=ids.to(device), labels=labels.to(device), use_cache=False).loss.backward()
        used += 1
    for hook in hooks:
        hook.remove()
    model.requires_grad_(False)
    if not used:
        raise InvalidInput(
            "method lq_lora weighs errors by gradients on the stage's rows, and none has a token to learn; give the "
            "stage rows, or use method loftq, which needs none"
        )
    return {name: Importance(*(_root(total / used) for total in both)) for name, both in sums.items()}


def _collect(name: str, layer: "torch.nn.Module", sums: dict[str, list["torch.Tensor"]]) -> Any:
    """Let a layer's gradients be summed up by row and column as they come, and forgotten: one is held at a time."""
    import torch

    parameter: torch.nn.Parameter = layer.weight  # type: ignore[assignment]
    parameter.requires_grad_(True)

    def collect(_: "torch.Tensor") -> None:
        square = as_linear(layer, parameter.grad).square()
        both = [square.mean(dim=1).cpu(), square.mean(dim=0).cpu()]
        sums[name] = [a + b for a, b in zip(sums[name], both, strict=True)] if name in sums else both
        parameter.grad = None

    return parameter.register_post_accumulate_grad_hook(collect)  # type: ignore[no-untyped-call]


def _root(fisher: "torch.Tensor") -> "torch.Tensor":
    """The square root, scaled to a mean of 1 and kept away from 0."""
    root = fisher.sqrt()
    return (root / root.mean().clamp(min=1e-30)).clamp(min=FLOOR)
