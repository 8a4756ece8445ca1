"""LongLoRA (Chen et al., arXiv 2309.12307): a longer context for the price of short attention.

While training, attention is computed within groups of tokens, shifted by half a group in half of the heads. The
authors' code rolls the sequence, which lets the last tokens be seen by the first; here the shifted groups do not
wrap, so nothing leaks from the future. Evaluation and the merged model use full attention.
"""

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, cast

from pydantic import Field

from stages.methods.base import Prepared, Start
from stages.methods.lora import LowRank, only_training
from stages.methods.targets import Targets

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_STRETCHED = ("default", "linear")
"""Rope types whose positions can be interpolated further by one factor."""
_SERVED = ("llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "phi3")
"""Architectures with rotary positions of one kind and attention that can be replaced by name."""


class Longlora(LowRank):
    """LoRA on attention with trained embeddings and norms, shifted sparse attention and a stretched rope."""

    kind: Literal["longlora"]
    target_modules: Targets = "attention"
    """Modules that get an adapter: all-linear, attention, query-value, or names such as q_proj."""
    context_length: Annotated[int, Field(gt=0)] | None = None
    """Tokens that the model is to read; beyond what it has, positions are interpolated (rope type linear)."""
    group_size: Annotated[int, Field(gt=1)] | None = None
    """Tokens that attend to one another while training; a quarter of the stage's sequence length where it is not
    given."""

    starts_exactly: ClassVar[bool] = False
    objectives: ClassVar[tuple[str, ...]] = ("cpt", "ift")
    config_changes: ClassVar[frozenset[str]] = frozenset({"rope_parameters", "max_position_embeddings"})

    def unsupported(self, config: dict[str, Any]) -> str | None:
        """Architectures without rotary positions, or with several kinds of them."""
        kind = config.get("model_type")
        if kind not in _SERVED:
            return f"method longlora cannot serve {kind}; it serves {', '.join(_SERVED)}. Use lora"
        if self.context_length is None:
            return None
        limit, rope = int(config.get("max_position_embeddings", 0)), _rope(config)
        if self.context_length <= limit:
            return (
                f"method longlora: context_length {self.context_length} is not beyond the {limit} positions of this "
                "model and changes nothing; remove it, or raise it"
            )
        scaling = rope.get("rope_type", rope.get("type", "default"))
        if scaling not in _STRETCHED or kind == "phi3":
            found = f"a rope of type {scaling}" if scaling not in _STRETCHED else "phi3, whose rope takes no factor"
            return (
                f"method longlora stretches ropes of type {' or '.join(_STRETCHED)}, and this model has {found}; "
                "remove context_length to train within the context that it has"
            )
        return None

    def prepare(self, model: "PreTrainedModel", start: Start) -> Prepared:
        """Stretch the rope, switch attention to groups, add adapters, and train embeddings and norms beside them."""
        from peft import get_peft_model

        from stages.methods.shifted_attention import NAME, register

        factor = _stretch(model, self.context_length)
        length = start.sequence_length or model.config.max_position_embeddings
        group = self.group_size or max(2, length // 4)
        register(group)
        settings = self.adapter_config(model, start)
        settings.modules_to_save = _whole(model)
        settings.ensure_weight_tying = bool(model.config.tie_word_embeddings)
        adapted = get_peft_model(model, settings)
        model.config._attn_implementation = NAME
        prepared = only_training(adapted, self.trained, ".modules_to_save.")
        return prepared._replace(record={"rope_factor": factor, "group_size": group})

    def finish(self, model: "torch.nn.Module", start: Start) -> "PreTrainedModel":
        """Fold in the adapters; the config keeps the rope, and goes back to ordinary attention."""
        plain = super().finish(model, start)
        plain.config._attn_implementation = "sdpa"
        return plain


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """How a config scales its rope: in today's key or the one of older checkpoints."""
    return dict(config.get("rope_parameters") or config.get("rope_scaling") or {})


def _stretch(model: "PreTrainedModel", context_length: int | None) -> float:
    """Interpolate positions so that ``context_length`` of them fall into the trained range (arXiv 2306.15595).

    Returns:
        The factor by which positions are divided, over all stages that stretched them.
    """
    config = cast("Any", model.config)
    rope = _rope(config.to_dict())
    before = float(rope.get("factor") or 1.0)
    if context_length is None:
        return before
    factor = before * context_length / int(config.max_position_embeddings)
    config.rope_parameters = dict(config.rope_parameters) | {"rope_type": "linear", "factor": factor}
    config.max_position_embeddings = context_length
    backbone = cast("Any", model).base_model
    backbone.rotary_emb = type(backbone.rotary_emb)(config).to(backbone.rotary_emb.inv_freq.device)
    return factor


def _whole(model: "PreTrainedModel") -> list[str]:
    """Names of the embedding and of every norm."""
    embedding = model.get_input_embeddings()
    return sorted(
        {
            name.rpartition(".")[2]
            for name, module in model.named_modules()
            if module is embedding or type(module).__name__.endswith("Norm")
        }
    )
