"""Train chosen matrices of a model, also where one is only a part of a parameter.

Fused projections and experts live in one parameter. Freezing a part by masking its gradient is not enough: weight
decay and an optimizer's momentum would still move it. So the parameter is replaced by a parametrization
(`torch.nn.utils.parametrize`): the parts that train become parameters of their own, the rest stays as it was, and
the forward pass puts them together.
"""

from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, cast

from stages.errors import InvalidInput
from stages.layout import Matrix, matrices
from stages.methods.base import train_only

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def model_matrices(model: "PreTrainedModel") -> tuple[Matrix, ...]:
    """The matrices inside the numbered layers of a loaded model; works on the meta device too.

    Raises:
        InvalidInput: there are none, or two stacks of layers have matrices of one name.
    """
    shapes = ((name, tuple(parameter.shape)) for name, parameter in model.named_parameters())
    found = matrices(shapes, model.config.to_dict())
    if not found:
        raise InvalidInput("this model has no weight matrices in numbered layers; use method full")
    if len({matrix.key for matrix in found}) < len(found):
        raise InvalidInput("this model has two stacks of layers whose matrices cannot be told apart; use method full")
    return found


def embeddings(model: "PreTrainedModel") -> list[str]:
    """Names of the parameters of the input embedding and the output head; of the one where they are tied."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    wanted = {id(end.weight) for end in ends if end is not None}
    return [name for name, parameter in model.named_parameters() if id(parameter) in wanted]


def train_matrices(model: "PreTrainedModel", chosen: Sequence[Matrix], also: Sequence[str] = ()) -> frozenset[str]:
    """Freeze everything but the chosen matrices and the parameters ``also``.

    Returns:
        The names of the parameters that train: float32, some of them parts of what was one parameter before.
    """
    names = set(also)
    within: dict[str, list[Matrix]] = defaultdict(list)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    for matrix in chosen:
        within[matrix.tensor].append(matrix)
    for name, own in within.items():
        if sum(matrix.size for matrix in own) == sizes[name]:
            names.add(name)
        else:
            names |= _split_off(model, name, own)
    train_only(model, frozenset(names))
    if also:  # a trained embedding hands on float32, and layer norms want their weights in the type of their input
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.data = parameter.data.float()
    return frozenset(names)


def whole_again(model: "torch.nn.Module") -> "PreTrainedModel":
    """Put the parts back where they came from: the plain model, in float32."""
    import torch
    from torch.nn.utils import parametrize

    for module in list(model.modules()):
        if parametrize.is_parametrized(module):
            for name in list(cast("Any", module).parametrizations):
                with torch.enable_grad():  # without a gradient torch would register a buffer
                    parametrize.remove_parametrizations(module, name, leave_parametrized=True)
    return cast("PreTrainedModel", model.float())


def _split_off(model: "PreTrainedModel", name: str, parts: list[Matrix]) -> set[str]:
    from torch.nn.utils import parametrize

    owner, last = name.rsplit(".", 1)
    # Unsafe only in that the parameter's dtype may change: what trains is float32, so the whole becomes float32.
    parametrize.register_parametrization(model.get_submodule(owner), last, _joined_class()(parts), unsafe=True)
    return {f"{owner}.parametrizations.{last}.original{number}" for number in range(1, len(parts) + 1)}


def _view(weight: "torch.Tensor", matrix: Matrix) -> "torch.Tensor":
    """The part of a weight that is a matrix: a view of shape (groups, rows, columns), never a copy."""
    one = weight if matrix.index is None else weight[matrix.index]
    part = matrix.part
    if part is None:
        return one.unsqueeze(0)
    along = one if part.axis == 0 else one.T
    # Splitting the first axis needs no copy, whatever the strides.
    return along.view(part.groups, -1, along.shape[1])[:, part.start : part.stop]


@cache
def _joined_class() -> "type[torch.nn.Module]":
    """The parametrization's class; made on first use, because this file is read without torch."""
    import torch

    class Join(torch.autograd.Function):
        """Write parts over a weight. Left to itself, autograd would copy the whole gradient once for each part."""

        @staticmethod
        def forward(ctx: Any, parts: list[Matrix], rest: torch.Tensor, *trained: torch.Tensor) -> torch.Tensor:
            ctx.parts, ctx.shapes = parts, [values.shape for values in trained]
            weight = rest.to(trained[0].dtype, copy=True)
            for matrix, values in zip(parts, trained, strict=True):
                view = _view(weight, matrix)
                view.copy_(values.view(view.shape))
            return weight

        @staticmethod
        def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
            whole = gradients[0]
            pairs = zip(ctx.parts, ctx.shapes, strict=True)
            return None, None, *(_view(whole, matrix).reshape(shape) for matrix, shape in pairs)

    class Joined(torch.nn.Module):
        """A weight whose chosen parts are parameters of their own."""

        def __init__(self, parts: list[Matrix]) -> None:
            super().__init__()
            self._parts = parts

        def forward(self, rest: torch.Tensor, *trained: torch.Tensor) -> torch.Tensor:
            return cast("torch.Tensor", Join.apply(self._parts, rest, *trained))  # type: ignore[no-untyped-call]

        def right_inverse(self, weight: torch.Tensor) -> list[torch.Tensor]:
            views = [_view(weight, matrix) for matrix in self._parts]
            return [weight, *(view.to(torch.float32, copy=True).flatten(0, 1).contiguous() for view in views)]

    return Joined
