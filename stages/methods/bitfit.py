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
    checkpoints_whole = True

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
        """Add zeroed biases where the config can have them, and train every bias but the output head's."""
        switched = [name for name in _SWITCHES if getattr(model.config, name, None) is False]
        if switched:
            model = _with_biases(model, switched)
        head = getattr(model.get_output_embeddings(), "bias", None)
        names = frozenset(name for name, p in model.named_parameters() if name.endswith(".bias") and p is not head)
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

    config = copy.deepcopy(model.config)
    for name in switches:
        setattr(config, name, True)
    with torch.device("meta"):  # the weights are taken over, not copied
        rebuilt = type(model)._from_config(config, dtype=model.dtype)
    weights = dict(model.state_dict())
    for name, parameter in rebuilt.named_parameters():
        if name not in weights and name.endswith(".bias"):
            weights[name] = torch.zeros(parameter.shape, dtype=model.dtype, device=model.device)
    rebuilt.load_state_dict(weights, assign=True)
    _take_buffers(rebuilt, model)
    rebuilt.tie_weights()
    rebuilt.generation_config = model.generation_config
    return cast("PreTrainedModel", rebuilt)


def _take_buffers(rebuilt: "PreTrainedModel", model: "PreTrainedModel") -> None:
    """What no checkpoint holds: the rope's frequencies, computed when a model is made, in float32."""
    for name, buffer in model.named_buffers():
        owner, _, last = name.rpartition(".")
        setattr(rebuilt.get_submodule(owner), last, buffer)


def _refusal(kind: str) -> str:
    return f"method bitfit trains biases; {kind} has none, and no setting that we know adds them: use lora, svf or full"
