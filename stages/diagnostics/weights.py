"""The weights of a checkpoint or of a loaded model, one at a time, under names that both share."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.errors import InvalidInput
from stages.layout import CONV1D_MODELS, HEADS, Key, Layout, Matrix, identify, matrices, read_layout

if TYPE_CHECKING:
    import torch

_BLOCK = 1 << 22
"""Numbers of a weight that are in memory in float64 at a time."""


@dataclass(frozen=True)
class Weights:
    """Matrices inside the numbered layers by what they are, everything else by name."""

    matrices: dict[Key, Matrix]
    others: dict[str, str]
    """Their names in this checkpoint, by `spot`."""
    kind: str
    """The architecture's name in transformers."""
    read: Callable[[str, int | None], "torch.Tensor"]
    """A tensor by its name, or one of the experts that it holds."""

    def matrix(self, key: Key) -> "torch.Tensor":
        """A matrix as float32 on the training device, rows being outputs."""
        import torch

        from stages.model import training_device

        matrix = self.matrices[key]
        found = self.read(matrix.tensor, matrix.index)
        part = matrix.part
        if part is not None:
            along = found if part.axis == 0 else found.T
            width = along.shape[1]
            found = along.reshape(part.groups, -1, width)[:, part.start : part.stop].reshape(-1, width)
        elif _inputs_first(matrix, self.kind):
            found = found.T
        return found.to(device=training_device(), dtype=torch.float32)

    def other(self, place: str) -> "torch.Tensor":
        """What is no matrix of a layer, as it is stored."""
        return self.read(self.others[place], None)


def of_checkpoint(folder: Path) -> Weights:
    """The weights in the files of a plain checkpoint; none of them is read yet.

    Raises:
        InvalidInput: it is not one, or two stacks of layers have matrices of one name.
    """
    from safetensors import safe_open

    layout = read_layout(folder)
    opened: dict[Path, Any] = {}

    def read(name: str, index: int | None) -> "torch.Tensor":
        file = layout.tensor[name].file
        if file not in opened:
            opened[file] = safe_open(file, framework="pt")
        found: torch.Tensor = opened[file].get_tensor(name) if index is None else opened[file].get_slice(name)[index]
        return found

    head = _tied_head(layout)
    return _weights(layout.matrices, [one.name for one in layout.tensors if one.name != head], layout.model_type, read)


def of_model(model: "torch.nn.Module", like: Layout) -> Weights:
    """The weights of a loaded model.

    Args:
        model: a plain one, on the CPU.
        like: the checkpoint that it was loaded from: its config says how tensors are split.
    """
    tensors = dict(model.named_parameters())  # tied ones once

    def read(name: str, index: int | None) -> "torch.Tensor":
        found = tensors[name].detach()
        return found if index is None else found[index]

    own = matrices(((name, tuple(one.shape)) for name, one in tensors.items()), like.config)
    return _weights(own, list(tensors), like.model_type, read)


def blocks(*tensors: "torch.Tensor") -> "Iterator[tuple[torch.Tensor, ...]]":
    """Tensors of one size side by side, flat, a block at a time.

    In float64: sums over millions of numbers lose digits in float32. In blocks: that is twice the memory.
    """
    import torch

    for parts in zip(*(torch.split(one.flatten(), _BLOCK) for one in tensors), strict=True):
        yield tuple(part.double() for part in parts)


def spot(name: str) -> str:
    """What a tensor is, whatever stands before it: names of a checkpoint may lack the ``model.`` of another."""
    key = identify(name)
    return ".".join(name.split(".")[-2:]) if key is None else f"{key[0]}.{key[1]}"


def _weights(
    own: tuple[Matrix, ...], names: list[str], kind: str, read: Callable[[str, int | None], "torch.Tensor"]
) -> Weights:
    by_key = {matrix.key: matrix for matrix in own}
    if len(by_key) < len(own):
        raise InvalidInput("this model has two stacks of layers whose matrices cannot be told apart")
    inside = {matrix.tensor for matrix in own}
    others = [name for name in names if name not in inside]
    often = Counter(map(spot, others))
    return Weights(by_key, {spot(name) if often[spot(name)] == 1 else name: name for name in others}, kind, read)


def _inputs_first(matrix: Matrix, kind: str) -> bool:
    """Whether a matrix that is no part of another is stored as (inputs, outputs)."""
    of_bank = matrix.index is not None
    return kind.startswith(("gpt_oss", "llama4")) if of_bank else kind in CONV1D_MODELS


def _tied_head(layout: Layout) -> str | None:
    """A head that is stored although it is the embedding."""
    if not layout.is_tied:
        return None
    names = (one.name for one in layout.tensors if one.name.endswith(".weight"))
    return next((name for name in names if name.split(".")[-2] in HEADS), None)
