"""The contract of an adaptation method."""

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from specs.base import Spec

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


class Prepared(NamedTuple):
    """A model ready to train, and the parameters that are meant to."""

    model: "torch.nn.Module"
    trainable: frozenset[str]
    """Names in ``model`` of the parameters that train; the run refuses to start if others do."""
    record: dict[str, object]
    """What the manifest keeps of the preparation: ranks, selected modules, measured errors."""


class MethodSpec(Spec):
    """How a stage adapts its start model. One subclass per file, all behind the same three verbs."""

    kind: str
    """The method."""

    version: ClassVar[int] = 1
    """Part of a stage's identity: raise it when the method computes something else."""
    is_adapter: ClassVar[bool] = False
    """Whether the start model stays intact beneath what trains, so that it can serve as DPO's reference."""
    starts_exactly: ClassVar[bool] = True
    """Whether the prepared model equals the start model; quantised ones only come near."""
    widest: ClassVar[str] = "float64"
    """The widest precision in which the trained model can compute; 4-bit kernels end at float32."""
    merge_tolerance: ClassVar[float] = 1e-4
    """Largest difference in logits between the trained model and its merge."""
    requires: ClassVar[tuple[str, ...]] = ()
    """Packages beyond torch and transformers that the method needs."""

    def targets(self) -> tuple[str, ...] | None:
        """Module names that must exist in the model, or None where the method finds its own."""
        return None

    def load(self, start: Path, dtype: "torch.dtype", compute: "torch.dtype") -> "PreTrainedModel":
        """The start model as this method trains it: frozen weights in ``dtype``, multiplied in ``compute``."""
        from stages.model import load_plain, training_device

        return load_plain(start, dtype, training_device())

    def for_comparison(self, model: "torch.nn.Module", dtype: "torch.dtype") -> "torch.nn.Module":
        """The trained model, on the CPU and computing in ``dtype``: what its merge is compared with."""
        return model.to(device="cpu", dtype=dtype)

    def prepare(self, model: "PreTrainedModel") -> Prepared:
        """Turn the loaded start model into the one that trains.

        Raises:
            stages.errors.InvalidInput: the method cannot serve this model.
        """
        raise TypeError(f"method {self.kind} does not say how it prepares a model")

    def finish(self, model: "torch.nn.Module", start: Path) -> "PreTrainedModel":
        """The trained model as a plain one of the start's architecture, in float32."""
        raise TypeError(f"method {self.kind} does not say how it merges")


def train_only(model: "torch.nn.Module", names: frozenset[str]) -> None:
    """Freeze every parameter but ``names``, and hold those in float32: updates below bfloat16's step survive."""
    import torch

    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
        if name in names:
            parameter.data = parameter.data.to(torch.float32)
