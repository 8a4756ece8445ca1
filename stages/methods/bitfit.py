"""BitFit (Zaken et al., arXiv 2106.10199): only the biases train."""

from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

from stages.errors import InvalidInput
from stages.methods.base import MethodSpec, Prepared, Start, train_only

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_SWITCHES = ("attention_bias", "mlp_bias")
"""Settings of a config by which an architecture that has no biases takes some."""
_NEVER = ("mistral", "mixtral", "phi3")
"""Architectures of transformers 5.23 that have no biases and no setting that adds them."""


class Bitfit(MethodSpec):
    """Train the biases of all layers: very few parameters; a model without biases gets zeroed ones first."""

    kind: Literal["bitfit"]

    config_changes: ClassVar[frozenset[str]] = frozenset(_SWITCHES)
    new_weights: ClassVar[tuple[str, ...]] = (".bias",)

    def unsupported(self, config: dict[str, Any]) -> str | None:
        """Architectures that can have no biases."""
        kind = config.get("model_type")
        return _refusal(str(kind)) if kind in _NEVER else None

    def notes(self, config: dict[str, Any]) -> list[str]:
        """Say that the model is rebuilt, and that whatever runs it later must know biases."""
        missing = [name for name in _SWITCHES if config.get(name) is False]
        if not missing:
            return []
        switched = ", ".join(f"{name}: true" for name in missing)
        return [f"bitfit rebuilds the model with zeroed biases ({switched}); whatever serves it must know them"]

    def prepare(self, model: "PreTrainedModel", start: Start) -> Prepared:
        """Add zeroed biases where the config can have them, and train every bias of a linear layer."""
        from stages.methods.targets import linear_modules

        switched = [name for name in _SWITCHES if getattr(model.config, name, None) is False]
        if switched:
            model = _with_biases(model, switched)
        names = frozenset(f"{name}.bias" for name, layer in linear_modules(model) if layer.bias is not None)
        if not names:
            raise InvalidInput(_refusal(model.config.model_type))
        train_only(model, names)
        return Prepared(model, names, {"biases_added": switched})

    def finish(self, model: "torch.nn.Module", start: Start) -> "PreTrainedModel":
        """Nothing to merge: the biases are the model's own."""
        return cast("PreTrainedModel", model.float())


def _with_biases(model: "PreTrainedModel", switches: list[str]) -> "PreTrainedModel":
    import copy

    import torch
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(model.config)
    for name in switches:
        setattr(config, name, True)
    with torch.device(model.device):
        # Not .to(dtype): that would round the rope's frequencies too.
        rebuilt = AutoModelForCausalLM.from_config(config, dtype=model.dtype, trust_remote_code=False)
    missing = rebuilt.load_state_dict(model.state_dict(), strict=False).missing_keys
    with torch.no_grad():
        for name in missing:
            rebuilt.get_parameter(name).zero_()
    rebuilt.generation_config = model.generation_config
    return cast("PreTrainedModel", rebuilt)


def _refusal(kind: str) -> str:
    return f"method bitfit trains biases; {kind} has none and no setting that adds them: use lora, svf or full"
