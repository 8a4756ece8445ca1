"""The contract of an adaptation method."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, cast

from specs.base import Spec

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, Trainer

    from stages.layout import Layout


class Prepared(NamedTuple):
    """A model ready to train, and the parameters that are meant to."""

    model: "torch.nn.Module"
    trainable: frozenset[str]
    """Names in ``model`` of the parameters that train; the run refuses to start if others do."""
    record: dict[str, object]
    """What the manifest keeps of the preparation: ranks, selected modules, measured errors."""


Reference = Literal["adapter_off", "adapter_copy", "precomputed"]
"""``adapter_off``: the model with its PEFT adapter switched off is the start model. ``adapter_copy``: the weights
beneath the adapter were changed, so a frozen copy of the untrained adapter is kept beside the trained one.
``precomputed``: the prepared model scores all pairs before its first step."""


def _no_rows() -> Iterator[tuple["torch.Tensor", "torch.Tensor"]]:
    return iter(())


@dataclass(frozen=True, slots=True)
class Start:
    """What a method may know of its stage beside the loaded model."""

    model: Path
    """The plain checkpoint that the stage starts from."""
    spec_folder: Path = field(default_factory=Path)
    """What paths in the method's fields start from."""
    cache: Path | None = None
    """A folder for results that outlive the stage, keyed by content (Spectrum's scans); None keeps nothing."""
    seed: int = 17
    """The stage's seed, for methods that draw."""
    sequence_length: int | None = None
    """Tokens per sequence that the stage trains with."""
    rows: Callable[[], Iterator[tuple["torch.Tensor", "torch.Tensor"]]] = _no_rows
    """The stage's training rows, for methods that look at them first (LQ-LoRA): token ids and labels, each of
    shape (1, length); labels of -100 are not learned."""


class MethodSpec(Spec):
    """How a stage adapts its start model. One subclass per file, all behind the same two verbs.

    ``prepare`` turns the loaded start model into the one that trains, ``finish`` turns the trained one into a plain
    model of the start's architecture. The other methods have defaults that fit most.
    """

    kind: str
    """The method."""

    version: ClassVar[int] = 1
    """Part of a stage's identity: raise it when the method computes something else."""
    reference: ClassVar[Reference] = "precomputed"
    """Where DPO's reference log-probabilities come from."""
    starts_exactly: ClassVar[bool] = True
    """Whether the prepared model equals the start model; quantised ones only come near."""
    starts_at_reference: ClassVar[bool] = True
    """Whether DPO's policy and reference are the same model before the first step; with virtual tokens they are not."""
    packs: ClassVar[bool] = True
    """Whether documents that share a packed sequence stay apart."""
    recomputes: ClassVar[bool] = True
    """Whether activations can be recomputed in the backward pass (train.gradient_checkpointing)."""
    mergeable: ClassVar[bool] = True
    """Whether a plain model can hold what was trained. If not, the stage must be the last one."""
    narrows: ClassVar[bool] = True
    """Whether frozen weights can be held in ``train.weights_dtype``; quantised ones have a width of their own."""
    widest: ClassVar[str] = "float64"
    """The widest precision in which the trained model can compute; 4-bit kernels end at float32."""
    merge_tolerance: ClassVar[float] = 1e-4
    """Largest difference in logits between the trained model and its merge."""
    checkpoints_whole: ClassVar[bool] = False
    """Whether a resumable checkpoint holds the whole model; if not, only the adapter."""
    kept_for_start: ClassVar[bool] = True
    """Whether the adapter that `keep` writes belongs on the start model, as others of the same start do."""
    config_changes: ClassVar[frozenset[str]] = frozenset()
    """Settings of the model's config that the method may change, on purpose."""
    new_weights: ClassVar[tuple[str, ...]] = ()
    """Endings of the names of weights that a merged model has beyond its start: ``.bias`` for BitFit."""
    adds_to_loss: ClassVar[bool] = False
    """Whether `attach` adds a term to the loss: DPO's first loss then says nothing."""
    objectives: ClassVar[tuple[str, ...]] = ("cpt", "ift", "dpo")
    """The objectives for which the method is sound."""
    requires: ClassVar[tuple[str, ...]] = ()
    """Packages beyond torch and transformers that the method needs."""
    rank_is_bounded: ClassVar[bool] = True
    """Whether ``rank`` (``initial_rank``), where a method has one, ends at `rank_limit` of each target matrix."""
    rank_bound: ClassVar[str] = "the smaller side"
    """What of a target matrix `rank_limit` is, for messages."""

    @property
    def positions(self) -> int:
        """How many of the model's positions the method takes from the text."""
        return 0

    def targets(self) -> tuple[str, ...] | None:
        """Module names that must exist in the model, or None where the method finds its own."""
        return None

    def files(self) -> tuple[str, ...]:
        """Files of the spec's folder that the method reads; their content is part of the stage's identity."""
        return ()

    def rank_limit(self, out: int, into: int) -> int:
        """The largest rank that an update of a matrix with ``out`` outputs and ``into`` inputs can have."""
        return min(out, into)

    def field_problems(self, config: dict[str, Any]) -> Iterator[tuple[str, str]]:
        """Fields that do not fit a model, by its config.json: each with its name and a message."""
        return iter(())

    def file_problems(self, folder: Path, layout: "Layout | None") -> Iterator[tuple[str, str]]:
        """What is wrong with the files that the method reads: the field that names the file, and a message.

        Args:
            folder: what the paths start from.
            layout: the model's config and headers; None where only the files themselves can be looked at.
        """
        return iter(())

    def unsupported(self, config: dict[str, Any]) -> str | None:
        """Why the method cannot serve a model, by its config.json; None where it can.

        Asked by `validate`, without torch; the message says what was found and which method to take instead.
        """
        return None

    def notes(self, config: dict[str, Any]) -> list[str]:
        """What the plan says of the method on a model with this config.json: one line each."""
        return []

    def load(self, start: Path, dtype: "torch.dtype", compute: "torch.dtype") -> "PreTrainedModel":
        """The start model as this method trains it: frozen weights in ``dtype``, multiplied in ``compute``."""
        from stages.model import load_plain, training_device

        return load_plain(start, dtype, training_device())

    def for_comparison(self, model: "torch.nn.Module", dtype: "torch.dtype") -> "torch.nn.Module":
        """The trained model, on the CPU and computing in ``dtype``: what its merge is compared with."""
        return model.to(device="cpu", dtype=dtype)

    def with_exact_inputs(self, model: "torch.nn.Module") -> AbstractContextManager[None]:
        """Let ``model`` round none of its inputs meanwhile: 8-bit layers round all rows of a batch together."""
        return nullcontext()

    def prepare(self, model: "PreTrainedModel", start: Start) -> Prepared:
        """Turn the loaded start model into the one that trains. Works on the meta device too, for counting.

        Raises:
            stages.errors.InvalidInput: the method cannot serve this model.
        """
        raise TypeError(f"method {self.kind} does not say how it prepares a model")

    @property
    def exact_merge(self) -> bool:
        """Whether the merge is meant to be the trained model.

        If not, its distance is recorded, and only the written checkpoint is held against the merge.
        """
        return True

    def attach(self, trainer: "Trainer") -> None:
        """What the method adds to the trainer before its first step: an optimizer of its own, a loss term."""

    def keep(self, model: "torch.nn.Module", folder: Path) -> None:
        """Write the adapter that was trained, if there is one, so that it belongs on the start model."""
        from stages.adapter import save_adapter

        if hasattr(model, "peft_config"):
            save_adapter(model, folder)

    def finish(self, model: "torch.nn.Module", start: Start) -> "PreTrainedModel":
        """The trained model as a plain one of the start's architecture, in float32."""
        raise TypeError(f"method {self.kind} does not say how it merges")

    def load_beneath(self, start: Path, dtype: "torch.dtype") -> "PreTrainedModel":
        """The float32 model on the CPU that the stage's kept adapter belongs on: the start, unless it was quantised."""
        import torch

        from stages.model import load_plain

        return cast("PreTrainedModel", load_plain(start, dtype).to(torch.float32))

    @property
    def beneath(self) -> dict[str, Any]:
        """What `load_beneath` depends on beside the start: adapters that differ in it have no base in common."""
        return {}

    def merge_record(self, model: "torch.nn.Module", start: Start) -> dict[str, Any]:
        """What the manifest keeps of the merge beside its error; called before `finish` may change ``model``."""
        return {}


def train_only(model: "torch.nn.Module", names: frozenset[str]) -> None:
    """Freeze every parameter but ``names``, and hold those in float32: updates below bfloat16's step survive."""
    import torch

    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
        if name in names:
            parameter.data = parameter.data.to(torch.float32)
