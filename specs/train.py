"""How a stage trains: optimizer, schedule, batches, checkpoints."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from specs.base import Spec, name_only

Positive = Annotated[int, Field(gt=0)]
Optimizer = Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "adafactor", "sgd"]
Schedule = Literal["linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt"]


class TrainSpec(Spec):
    """The settings that every objective has."""

    learning_rate: Annotated[float, Field(gt=0)]
    """Peak learning rate."""
    epochs: Annotated[float, Field(gt=0)] | None = None
    """Passes over the data; give this or `max_steps`."""
    max_steps: Positive | None = None
    """Optimizer steps; give this or `epochs`."""
    sequence_length: Positive = 1024
    """Tokens per sequence."""
    batch_size: Positive = 16
    """Sequences (pairs, in DPO) per optimizer step."""
    micro_batch_size: Positive = 1
    """Sequences (pairs, in DPO) per forward pass; divides `batch_size`. The rest is gradient accumulation."""
    schedule: Schedule = "cosine"
    """Shape of the learning rate after warm-up."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of the steps over which the learning rate rises to its peak."""
    optimizer: Optimizer = "adamw"
    """adamw is fused where the device has it; the 8-bit and paged ones are bitsandbytes'."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are clipped to this norm."""
    precision: Literal["auto", "bfloat16", "float32"] = "auto"
    """Autocast for the forward pass; auto is bfloat16 where the device computes in it or the weights are in
    it, else float32."""
    weights_dtype: Literal["float32", "bfloat16"] = "float32"
    """How frozen weights are held while training; trained ones are always float32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    checkpoint_every: Positive = name_only(50)
    """Steps between resumable checkpoints; a crash costs at most this many."""
    keep_checkpoints: Annotated[int, Field(ge=2)] = name_only(2)
    """Resumable checkpoints kept inside a stage, the newest by step. One is not enough: it may be damaged."""
    extra: dict[str, Any] = {}
    """Further arguments of the trainer library, by its own names; checked against them at validation."""

    @model_validator(mode="after")
    def _consistent(self) -> "TrainSpec":
        if (self.epochs is None) == (self.max_steps is None):
            raise ValueError("give either epochs or max_steps")
        if self.batch_size % self.micro_batch_size:
            raise ValueError(f"micro_batch_size {self.micro_batch_size} does not divide batch_size {self.batch_size}")
        if self.weights_dtype == "bfloat16" and self.precision == "float32":
            raise ValueError("weights in bfloat16 are multiplied in bfloat16: remove precision or weights_dtype")
        if self.schedule == "constant" and "warmup_ratio" in self.model_fields_set and self.warmup_ratio:
            raise ValueError("schedule constant has no warm-up; use constant_with_warmup or remove warmup_ratio")
        return self


class CptTrainSpec(TrainSpec):
    """Settings of continued pre-training."""

    packing: Literal["split", "wrapped", "none"] = "split"
    """split: long documents are cut, short ones share a sequence and never see one another; wrapped: one
    stream cut into sequences, so neighbours see one another; none: a document per sequence, cut at its end."""
    document_end: str | None = None
    """The token after each document; by default the tokenizer's end-of-text token, never a chat turn's end."""


class IftTrainSpec(TrainSpec):
    """Settings of instruction fine-tuning."""

    packing: bool = True
    """Short conversations share a sequence and never see one another."""


DpoLoss = Literal[
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard",
    "aot", "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
]  # fmt: skip
"""The loss variants that TRL's DPO trainer knows; a test holds the list against the library."""

SMOOTHED_LOSSES = ("robust", "exo_pair", "aot", "aot_unpaired")
"""The variants in which TRL uses label smoothing; in the others it would be silently ignored."""


class DpoTrainSpec(TrainSpec):
    """Settings of direct preference optimisation (Rafailov et al., arXiv 2305.18290)."""

    beta: Annotated[float, Field(gt=0)] = 0.1
    """Strength of the pull towards the reference model."""
    loss: DpoLoss = "sigmoid"
    """sigmoid is DPO as published; the others are TRL's variants by their names there."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Assumed share of flipped labels; only the losses in `SMOOTHED_LOSSES` use it."""

    @model_validator(mode="after")
    def _nothing_inert(self) -> "DpoTrainSpec":
        if self.loss == "sft" and "beta" in self.model_fields_set:
            raise ValueError("beta has no effect on loss sft: remove it")
        if self.loss == "exo_pair" and self.label_smoothing == 0:
            raise ValueError("loss exo_pair needs label_smoothing above 0, for example 1e-3")
        if self.label_smoothing and self.loss not in SMOOTHED_LOSSES:
            raise ValueError(f"label_smoothing has no effect on loss {self.loss}: remove it")
        return self
