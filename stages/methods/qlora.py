"""QLoRA: LoRA over a quantised base (Dettmers et al., arXiv 2305.14314), and what every method on one shares.

The merge goes into the dequantised weights: that is the model that was trained. Merging into the quantised layers
would round most of a small update away, and merging into the original weights gives another model.

Any forward pass in eval mode makes bitsandbytes 0.50 repack 4-bit weights in place on CPUs with AVX512-BF16, in a
layout that its own backward pass and dequantisation then read wrongly, without an error. `keep_weights_trainable`
closes that for every 4-bit model, where it is loaded; 8-bit layers have no such path.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

from pydantic import model_validator

from stages import probe
from stages.errors import InvalidInput
from stages.methods.base import Prepared, Start
from stages.methods.lora import LowRank

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import BitsAndBytesConfig, PreTrainedModel, Trainer


class Quantised(LowRank):
    """What adapters over a base that bitsandbytes holds in 4 or 8 bits share.

    Quantised are all linear layers but the output head. Embeddings, norms, biases and the stacked weights of a
    mixture's experts (one three-dimensional parameter, which bitsandbytes cannot hold) stay in float32; the record
    of a stage says how many parameters are which.
    """

    quantization: Literal["nf4", "fp4", "int8"] = "nf4"
    """The data type of the frozen weights."""
    double_quantization: bool | None = None
    """Quantise the quantisation constants too: 4.13 instead of 4.5 bits per weight. On where it is not given; 8-bit
    weights have no such thing."""

    starts_exactly: ClassVar[bool] = False
    narrows: ClassVar[bool] = False
    widest: ClassVar[str] = "float32"
    requires: ClassVar[tuple[str, ...]] = ("bitsandbytes",)

    @model_validator(mode="after")
    def _no_inert_setting(self) -> "Quantised":
        if self.quantization == "int8" and self.double_quantization is not None:
            raise ValueError("double_quantization has no effect on int8: remove it, or use nf4 or fp4")
        return self

    def unsupported(self, config: dict[str, Any]) -> str | None:
        """Why a model has no layer to quantise; None where it has."""
        return unquantisable(self.kind, config)

    def notes(self, config: dict[str, Any]) -> list[str]:
        """Say so where most of a model cannot be quantised."""
        return float_experts(self.kind, config)

    def quantization_config(self, compute: "torch.dtype") -> "BitsAndBytesConfig":
        """The settings in transformers' terms; 4-bit weights are multiplied in ``compute``."""
        from transformers import BitsAndBytesConfig

        if self.quantization == "int8":
            return BitsAndBytesConfig(load_in_8bit=True)
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=self.quantization,
            bnb_4bit_use_double_quant=self.double_quantization is not False,
            bnb_4bit_compute_dtype=compute,
        )

    def load(self, start: Path, dtype: "torch.dtype", compute: "torch.dtype") -> "PreTrainedModel":
        """The start model with its linear layers quantised; the rest stays in float32, as it was handed over.

        Raises:
            InvalidInput: the model has no layer that can be quantised.
        """
        import torch

        from stages.model import load_plain, training_device

        settings = self.quantization_config(compute)
        model = load_plain(start, torch.float32, training_device(), quantization_config=settings)
        layers = [module for module in model.modules() if is_quantised(module)]
        if not layers:
            raise InvalidInput(
                f"{start}: method {self.kind} finds no layer to quantise: this architecture "
                f"({model.config.model_type}) has no plain linear layers; use method lora"
            )
        keep_weights_trainable(model)
        for layer in layers:
            # bitsandbytes casts biases in place to whatever it multiplies in, and leaves them there.
            layer.float_bias = None if layer.bias is None else layer.bias.detach().clone()
        return model

    def prepare(self, model: "PreTrainedModel", start: Start) -> Prepared:
        """Add the adapters; only they train, in float32."""
        adapted, trainable, record = super().prepare(model, start)
        if next(adapted.parameters()).is_meta:
            return Prepared(adapted, trainable, record)
        quantised_layers(cast("PeftModel", adapted))
        # TRL would cast the adapters of a quantised model to bfloat16, which moves those that do not start at zero
        # and rounds small updates away. It asks the model that it is given; `attach` takes the answer back.
        for flag in _FLAGS:
            setattr(adapted, flag, False)
        return Prepared(adapted, trainable, record | {"quantization": quantised_share(adapted)})

    def attach(self, trainer: "Trainer") -> None:
        """Let the trainer know again that the model is quantised: it must not be copied to several devices."""
        super().attach(trainer)
        for flag in _FLAGS:
            vars(trainer.model).pop(flag, None)

    def for_comparison(self, model: "torch.nn.Module", dtype: "torch.dtype") -> "torch.nn.Module":
        """The trained model where it is, computing in ``dtype`` with its weights alone.

        8-bit layers round their inputs too (in eval mode on a CPU, always on a GPU). No plain model does that, so
        it is left out here and its size recorded by `merge_record`.
        """
        for module in filter(is_quantised, model.modules()):
            layer = cast("Any", module)
            if layer.bias is not None:
                layer.bias.data = layer.float_bias.to(layer.bias.device)
            if hasattr(layer, "compute_dtype"):
                layer.compute_dtype = dtype
            else:
                layer.forward = _multiply_with(layer)
        return model

    @contextmanager
    def with_exact_inputs(self, model: "torch.nn.Module") -> Iterator[None]:
        """8-bit layers multiply with their dequantised weights, as `for_comparison` lets them for good."""
        layers = [cast("Any", m) for m in model.modules() if is_quantised(m) and not hasattr(m, "compute_dtype")]
        for layer in layers:
            layer.forward = _multiply_with(layer)
        try:
            yield
        finally:
            for layer in layers:
                del layer.forward

    def load_beneath(self, start: Path, dtype: "torch.dtype") -> "PreTrainedModel":
        """The start model with its quantised weights dequantised: what the adapters were trained over."""
        import torch

        from stages.model import load_plain

        plain = load_plain(start, torch.float32)
        layers = dict(plain.named_modules())
        with torch.no_grad():
            for name, module in self.load(start, torch.float32, torch.float32).named_modules():
                if is_quantised(module):
                    as_linear(layers[name]).copy_(dequantise(module))
        return plain

    @property
    def beneath(self) -> dict[str, Any]:
        """The quantisation."""
        return {"quantization": self.quantization, "double_quantization": self.double_quantization is not False}

    def merge_record(self, model: "torch.nn.Module", start: Start) -> dict[str, Any]:
        """How far rounding the inputs of 8-bit layers moves the logits, as the trained model runs with it."""
        rounding = [module for module in model.modules() if is_quantised(module) and "forward" in vars(module)]
        if not rounding:
            return {}
        ids = probe.probe_ids(model)
        without = probe.logits(model, ids)
        kept = [vars(module).pop("forward") for module in rounding]
        found = probe.logits(model, ids)
        for module, forward in zip(rounding, kept, strict=True):
            cast("Any", module).forward = forward
        return {"activation_error": float((found - without).abs().max())}

    def finish(self, model: "torch.nn.Module", start: Start) -> "PreTrainedModel":
        """The start model with the weights that were trained on, dequantised, and the adapters folded in."""
        return fold(cast("PeftModel", model), start.model, original=False)


class Qlora(Quantised):
    """Train low-rank adapters over a base held in 4 or 8 bits: fits a large model on a small GPU."""

    kind: Literal["qlora"]
    merge_into: Literal["dequantized", "original"] = "dequantized"
    """What the adapters are folded into: the weights that were trained on, or the start model's own. The second is
    another model than the trained one (its error is recorded); often as good, as the quantisation error is gone."""

    @property
    def exact_merge(self) -> bool:
        """Whether the merge is the trained model: not where it goes into the original weights."""
        return self.merge_into == "dequantized"

    def load_beneath(self, start: Path, dtype: "torch.dtype") -> "PreTrainedModel":
        """What the adapters are folded into, whatever they were trained over."""
        import torch

        from stages.model import load_plain

        return load_plain(start, torch.float32) if self.merge_into == "original" else super().load_beneath(start, dtype)

    @property
    def beneath(self) -> dict[str, Any]:
        """The quantisation; nothing where the start's own weights are merged into."""
        return {} if self.merge_into == "original" else super().beneath

    def finish(self, model: "torch.nn.Module", start: Start) -> "PreTrainedModel":
        """The start model with the adapters folded in, over its own weights or the dequantised ones."""
        return fold(cast("PeftModel", model), start.model, original=self.merge_into == "original")


_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
"""Settings in which configs say how many experts a mixture has."""
_OWN_LINEAR = ("falcon",)
"""Model types whose linear layers are a class of their own, which neither bitsandbytes nor we know to replace."""


def unquantisable(kind: str, config: dict[str, Any]) -> str | None:
    """Why no layer of a model with this config.json can be quantised; None where some can."""
    if config.get("model_type") not in _OWN_LINEAR:
        return None
    return (
        f"method {kind} cannot quantise a {config['model_type']} model: its linear layers are a class of their own; "
        "use method lora or dora"
    )


def float_experts(kind: str, config: dict[str, Any]) -> list[str]:
    """What the plan says of a mixture of experts: these stay in float32, and are most of such a model."""
    count = next((config[name] for name in _EXPERTS if config.get(name)), None)
    if count is None:
        return []
    return [
        f"{kind} leaves the {count} experts of each layer in float32: they are one three-dimensional parameter, which "
        "no quantised layer holds; method lora with train.weights_dtype bfloat16 takes less memory"
    ]


_FLAGS = ("is_loaded_in_4bit", "is_loaded_in_8bit")


def keep_weights_trainable(model: "torch.nn.Module") -> None:
    """Stop bitsandbytes from repacking 4-bit weights in place on CPUs with AVX512-BF16.

    After any forward pass in eval mode it would leave the weights in a layout that its own backward pass
    and dequantisation read wrongly, without an error: wrong gradients, garbage merges.
    """
    import bitsandbytes as bnb

    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def is_quantised(module: "torch.nn.Module") -> bool:
    """Whether bitsandbytes holds this layer's weight."""
    import bitsandbytes as bnb

    return isinstance(module, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt))


def dequantise(module: "torch.nn.Module") -> "torch.Tensor":
    """The weight of a quantised layer in float32, shape (out, in).

    Raises:
        RuntimeError: the weight was repacked for inference and can no longer be read.
    """
    import bitsandbytes as bnb

    layer = cast("Any", module)
    if isinstance(module, bnb.nn.Linear4bit):
        if getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
            raise RuntimeError("bitsandbytes repacked a 4-bit weight: what was trained since is not what it holds")
        found = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    else:
        scales = layer.weight.SCB if layer.state.SCB is None else layer.state.SCB
        found = bnb.functional.int8_vectorwise_dequant(layer.weight.data, scales)
    return cast("torch.Tensor", found).float()


def quantised_share(model: "torch.nn.Module") -> dict[str, int]:
    """How many layers and parameters are held quantised, and how many frozen parameters are not."""
    layers = [cast("Any", module) for module in model.modules() if is_quantised(module)]
    held = sum(layer.in_features * layer.out_features for layer in layers)
    ours = {id(layer.weight) for layer in layers}
    rest = sum(p.numel() for p in model.parameters() if id(p) not in ours and not p.requires_grad)
    return {"layers": len(layers), "quantized_parameters": held, "float_parameters": rest}


def fold(model: "PeftModel", start: Path, *, original: bool) -> "PreTrainedModel":
    """Load the start model plainly and put what was trained into it, layer by layer, in float32.

    The frozen weights come from the live layers, so that they are the ones that the adapters were trained on.

    Args:
        model: the trained model: adapters over quantised layers.
        start: the plain checkpoint that it was made from.
        original: keep the start's own weights under the adapters.
    """
    import torch

    from stages.model import load_plain

    plain = load_plain(start, torch.float32)
    layers = dict(plain.named_modules())
    with torch.no_grad():
        for name, frozen, adapter in quantised_layers(model):
            weight = as_linear(layers[name])
            if not original:
                weight.copy_(dequantise(frozen))
            if adapter is not None:
                weight.add_(adapter.get_delta_weight("default").to(device=weight.device, dtype=torch.float32))
    return plain


def quantised_layers(model: "PeftModel") -> list[tuple[str, "torch.nn.Module", Any]]:
    """The quantised layers of an adapted model: their names in the plain model, themselves, their adapters or None.

    Raises:
        InvalidInput: an adapter sits on a layer that is not quantised.
    """
    from peft.tuners.lora import LoraLayer

    found: list[tuple[str, torch.nn.Module, Any]] = []
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, LoraLayer):
            frozen = cast("torch.nn.Module", module.get_base_layer())
            if not is_quantised(frozen):
                raise InvalidInput(
                    f"target_modules: {name} is not a layer that can be quantised; name linear layers other than the "
                    "output head, or all-linear"
                )
            found.append((name, frozen, module))
        elif is_quantised(module) and not name.endswith(".base_layer"):
            found.append((name, module, None))
    return found


def as_linear(module: "torch.nn.Module", tensor: "torch.Tensor | None" = None) -> "torch.Tensor":
    """A view of a layer's weight, or of ``tensor`` in its shape, as (out, in): GPT-2's Conv1D keeps the transpose."""
    from transformers.pytorch_utils import Conv1D

    found = cast("torch.Tensor", module.weight).data if tensor is None else tensor
    return found.T if isinstance(module, Conv1D) else found


def _multiply_with(layer: Any) -> Any:
    """A forward pass for an 8-bit layer that rounds no inputs: what its training pass does on a CPU."""
    import torch

    def forward(x: "torch.Tensor") -> "torch.Tensor":
        return torch.nn.functional.linear(x, dequantise(layer).to(x.dtype), layer.bias)

    return forward
