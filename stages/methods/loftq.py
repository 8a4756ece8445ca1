"""LoftQ (Li et al., arXiv 2310.08659): quantise and choose the adapters together, so that both are near the weights.

PEFT's own needs CUDA and leaves alpha / rank out, which cancels its gain where alpha is not the rank; this is
algorithm 1 of the paper, in float32, with the quantiser that then holds the weights. The paper's 2-bit and 3-bit
results simulate the data type: no kernel stores it, so that nothing would be saved. They are not offered.
"""

from collections import defaultdict
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple, cast

from pydantic import Field

from stages.methods.base import Prepared, Reference, Start
from stages.methods.qlora import Quantised, as_linear, quantised_layers

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel


TINY = 1e-24
"""Least square of a singular value: a weight that quantises without an error leaves zeros."""


class Importance(NamedTuple):
    """How much errors in the rows and columns of a weight matter: diagonals of D1 (out,) and D2 (in,)."""

    rows: "torch.Tensor"
    columns: "torch.Tensor"


class Start4Bit(NamedTuple):
    """A weight as 4-bit numbers and adapters: W is near dequantised(packed, state) + scale B A."""

    packed: "torch.Tensor"
    state: Any
    b: "torch.Tensor"
    """(out, rank)."""
    a: "torch.Tensor"
    """(rank, in)."""
    error: float
    """Squared Frobenius norm of D1 (W - Q - scale B A) D2."""


class AdaptedStart(Quantised):
    """What LoftQ and LQ-LoRA share: adapters that start as the best answer to the quantisation error.

    Reads the start model a second time, in float32 on the CPU, while the quantised one is held.
    """

    reference: ClassVar[Reference] = "adapter_copy"
    kept_for_start: ClassVar[bool] = False

    quantization: Literal["nf4", "fp4"] = "nf4"
    """The 4-bit data type of the frozen weights."""
    iterations: Annotated[int, Field(gt=0, le=100)] = 5
    """Rounds of quantising and decomposing; the best is kept. Each costs an eigendecomposition per target: a second
    where the smaller side is 2048 on one CPU core, eight times as much where it is twice as large."""

    def importance(self, plain: "PreTrainedModel", names: list[str], start: Start) -> dict[str, Importance]:
        """What errors in the named layers cost; a layer without an entry weighs all alike."""
        return {}

    def prepare(self, model: "PreTrainedModel", start: Start) -> Prepared:
        """Add the adapters, and set them and the quantised weights beneath to a start near the float weights."""
        import torch

        from stages.model import load_plain

        adapted, trainable, record = super().prepare(model, start)
        if next(adapted.parameters()).is_meta:
            return Prepared(adapted, trainable, record)
        targets = [layer for layer in quantised_layers(cast("PeftModel", adapted)) if layer[2] is not None]
        plain = load_plain(start.model, torch.float32)
        weights = dict(plain.named_modules())
        important = self.importance(plain, [name for name, _, _ in targets], start)
        sums: dict[str, float] = defaultdict(float)
        for name, frozen, adapter in targets:
            weight = as_linear(weights[name])
            for key, value in self._start_layer(weight, frozen, adapter, important.get(name)).items():
                sums[key] += value
        errors = {key: (sums[key] / sums["weights"]) ** 0.5 for key in ("quantized", "adapted")}
        if important:
            errors |= {key: (sums[key] / sums["weighed"]) ** 0.5 for key in ("weighed_quantized", "weighed_adapted")}
        return Prepared(adapted, trainable, record | {"relative_weight_error": errors})

    def _start_layer(
        self, weight: "torch.Tensor", frozen: Any, adapter: Any, importance: Importance | None
    ) -> dict[str, float]:
        """Set one layer's start; returns squared norms of the weight and of what quantising and adapting leave."""
        import torch

        weight = weight.to(frozen.weight.device)
        if importance is not None:
            importance = Importance(*(diagonal.to(weight.device) for diagonal in importance))
        scale = float(adapter.scaling["default"])
        quantiser = self.quantiser(frozen)
        rank = int(adapter.r["default"])
        with torch.no_grad():
            best = nearest_start(weight, quantiser, rank, scale, self.iterations, importance)
            packed, state = quantiser(weight)
            alone = weight - dequantised(packed, state)
            set_weight(frozen, best.packed, best.state)
            adapter.lora_A["default"].weight.copy_(best.a)
            adapter.lora_B["default"].weight.copy_(best.b)
            left = weight - dequantised(best.packed, best.state) - scale * (best.b @ best.a)
        return {
            "weights": squared(weight),
            "quantized": squared(alone),
            "adapted": squared(left),
            "weighed": squared(weighed(weight, importance)),
            "weighed_quantized": squared(weighed(alone, importance)),
            "weighed_adapted": squared(weighed(left, importance)),
        }

    def quantiser(self, frozen: Any) -> Any:
        """The function that a layer's weight was quantised by: (out, in) float32 -> packed, state."""
        from functools import partial

        from bitsandbytes.functional import quantize_4bit

        held = frozen.weight
        return partial(
            quantize_4bit,
            blocksize=held.blocksize,
            compress_statistics=held.compress_statistics,
            quant_type=held.quant_type,
            quant_storage=held.quant_storage,
        )


class Loftq(AdaptedStart):
    """QLoRA whose adapters start where they undo most of the quantisation error."""

    kind: Literal["loftq"]


def nearest_start(
    weight: "torch.Tensor", quantiser: Any, rank: int, scale: float, iterations: int, importance: Importance | None
) -> Start4Bit:
    """Alternate Q = quantised(W - scale B A) and the best B A for W - Q; the round with the least error (alg. 1).

    Args:
        weight: (out, in), float32.
        quantiser: gives packed numbers and their state.
        rank: of the adapters.
        scale: alpha / rank, by which the model multiplies B A.
        iterations: rounds.
        importance: weighs the error; None weighs all alike.
    """
    import torch

    update = torch.zeros_like(weight)
    found = []
    for _ in range(iterations):
        packed, state = quantiser((weight - update).contiguous())
        residual = weight - dequantised(packed, state)
        b, a = best_factors(residual, rank, importance)
        update = b @ a
        b, a = b / scale**0.5, a / scale**0.5
        error = squared(weighed(residual - scale * (b @ a), importance))
        found.append(Start4Bit(packed, state, b, a, error))
        found = [min(found, key=lambda one: one.error)]
    return found[0]


def best_factors(
    residual: "torch.Tensor", rank: int, importance: Importance | None
) -> tuple["torch.Tensor", "torch.Tensor"]:
    """B (out, rank) and A (rank, in) with the least D1 (R - B A) D2: by the SVD of D1 R D2 = U S V^T.

    B = D1^-1 U sqrt(S) and A = sqrt(S) V^T D2^-1 (LQ-LoRA, arXiv 2311.12023, section 3.3; LoftQ where D1 = D2 = 1).
    """
    import torch

    matrix = weighed(residual, importance)
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    # The eigenvectors of the smaller side: the largest singular vectors as exactly, in a third of the time.
    squares, vectors = torch.linalg.eigh(wide @ wide.T)
    largest = vectors[:, -rank:]
    root = squares[-rank:].clamp(min=TINY).sqrt().sqrt()
    b, a = largest * root, (largest.T @ wide) / root[:, None]
    if wide is not matrix:
        b, a = a.T, b.T
    if importance is not None:
        b, a = b / importance.rows[:, None], a / importance.columns
    return b.contiguous(), a.contiguous()


def weighed(matrix: "torch.Tensor", importance: Importance | None) -> "torch.Tensor":
    """D1 M D2."""
    return matrix if importance is None else importance.rows[:, None] * matrix * importance.columns


def dequantised(packed: "torch.Tensor", state: Any) -> "torch.Tensor":
    """The numbers that a packed weight stands for."""
    from bitsandbytes.functional import dequantize_4bit

    return cast("torch.Tensor", dequantize_4bit(packed, state))


def set_weight(frozen: Any, packed: "torch.Tensor", state: Any) -> None:
    """Let a 4-bit layer hold other numbers."""
    frozen.weight.data = packed
    frozen.weight.quant_state = frozen.quant_state = state


def squared(matrix: "torch.Tensor") -> float:
    """The squared Frobenius norm."""
    return float(matrix.double().square().sum())
