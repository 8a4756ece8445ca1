"""The weights of a checkpoint or of a loaded model, one at a time, under names that both share."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.layout import HEADS, Key, Layout, Matrix, matrices, read_layout

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Weights:
    """Matrices inside the numbered layers by what they are, everything else by name."""

    matrices: dict[Key, Matrix]
    others: tuple[str, ...]
    transposed: bool
    """Whether whole matrices are stored as (inputs, outputs)."""
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
        elif self.transposed:
            found = found.T
        return found.to(device=training_device(), dtype=torch.float32)

    def other(self, name: str) -> "torch.Tensor":
        """What is no matrix of a layer, in float64: sums over millions of numbers lose digits in float32."""
        return self.read(name, None).double()


def of_checkpoint(folder: Path) -> Weights:
    """The weights in the files of a plain checkpoint; none of them is read yet.

    Raises:
        InvalidInput: it is not one.
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
    return _weights(layout.matrices, [one.name for one in layout.tensors if one.name != head], layout.is_conv1d, read)


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
    return _weights(own, list(tensors), like.is_conv1d, read)


def _weights(
    own: tuple[Matrix, ...], names: list[str], transposed: bool, read: Callable[[str, int | None], "torch.Tensor"]
) -> Weights:
    inside = {matrix.tensor for matrix in own}
    others = tuple(name for name in names if name not in inside)
    return Weights({matrix.key: matrix for matrix in own}, others, transposed, read)


def _tied_head(layout: Layout) -> str | None:
    """A head that is stored although it is the embedding."""
    if not layout.is_tied:
        return None
    names = (one.name for one in layout.tensors if one.name.endswith(".weight"))
    return next((name for name in names if name.split(".")[-2] in HEADS), None)
