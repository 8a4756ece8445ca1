"""PEFT adapters in and out: kept without a machine's paths, put on a base so that it behaves as it trained."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.documents import read_object
from stages.errors import InvalidInput

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_IMPORTS = ("megatron_config", "tokenizer_kwargs")
"""Settings by which PEFT imports a module that is named beside them, or loads a tokenizer; none of ours has them."""


def save_adapter(model: Any, folder: Path) -> None:
    """Write the adapter of a PEFT model to ``folder``: its weights and settings, nothing about this machine.

    PEFT notes the path that the base was loaded from, here and in a generated model card; elsewhere that path
    leads nowhere, or to another model. What the base was is in the artifact's manifest.
    """
    model.save_pretrained(folder, selected_adapters=["default"])
    (folder / "README.md").unlink(missing_ok=True)
    change_settings(folder, base_model_name_or_path=None)


def change_settings(folder: Path, **changes: Any) -> None:
    """Write other settings into a kept adapter's file."""
    settings = adapter_settings(folder) | changes
    (folder / CONFIG).write_text(json.dumps(settings, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def adapter_settings(folder: Path) -> dict[str, Any]:
    """The settings of a kept adapter, as PEFT wrote them.

    Raises:
        InvalidInput: the folder holds no adapter.
    """
    try:
        return read_object(folder / CONFIG)
    except InvalidInput as error:
        raise InvalidInput(f"{folder}: holds no adapter: {CONFIG} cannot be read") from error


def _check_kept(folder: Path) -> None:
    """Refuse an adapter that is not as `save_adapter` writes it, where that could run code.

    Raises:
        InvalidInput: its weights are in a pickle, or its settings would import something.
    """
    settings = adapter_settings(folder)
    if not (folder / WEIGHTS).is_file():
        raise InvalidInput(
            f"{folder}: no {WEIGHTS}, and adapters are read from safetensors only (a pickle such as adapter_model.bin "
            "can run code when it is opened); save it again with safe_serialization=True"
        )
    if found := [name for name in _IMPORTS if settings.get(name)]:
        raise InvalidInput(f"{folder / CONFIG}: {found[0]} would import code; remove it, or train the adapter again")


def attach(base: "torch.nn.Module", folder: Path, name: str = "default") -> "PeftModel":
    """The base with the adapter in ``folder`` on it, in eval mode, nothing trainable.

    Args:
        base: the plain model that the adapter belongs on; it is changed.
        folder: what `save_adapter` wrote.
        name: what the adapter is called from now on.

    Raises:
        InvalidInput: it could run code.
    """
    from peft import PeftModel

    _check_kept(folder)
    know_own_types()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        found = PeftModel.from_pretrained(base, folder, adapter_name=name)
    return ready(found).requires_grad_(False).eval()  # PEFT leaves virtual tokens trainable


def load_beside(model: "PeftModel", folder: Path, name: str) -> None:
    """Put one more adapter, of the same type, beside those that a model has; the active one stays.

    Raises:
        InvalidInput: it could run code.
    """
    _check_kept(folder)
    model.load_adapter(folder, name)


def know_own_types() -> None:
    """Let PEFT know the adapters that it does not have itself."""
    import stages.tuner.bottleneck  # noqa: F401 - it registers itself, and the package the other one


def ready(model: "PeftModel") -> "PeftModel":
    """The model itself, with habits of PEFT 0.21 corrected that would be wrong everywhere.

    - With virtual tokens in front, a model answers with more positions than it was asked about. Whoever scores
      text (probes, metrics, the evaluation harness) counts from the first token of the text. And it warns at every
      generated token that positions, which it derives itself, are ignored.
    - `AdaptionPromptModel` remembers the base's ``forward`` as it was found. TRL replaces that method later, to
      score without materialising logits, and would be called around: `no attribute 'log_probs'`.
    """
    from peft import PeftType

    kinds = {config.peft_type for config in model.peft_config.values()}
    if kinds & {PeftType.PROMPT_TUNING}:
        model.register_forward_hook(_real_positions, with_kwargs=True)
        model.generate = _without_position_warning(model.generate)
    if kinds & {PeftType.ADAPTION_PROMPT}:
        _follow_forward(model.base_model)
    return model


def _follow_forward(tuner: Any) -> None:
    def forward(*args: Any, **kwargs: Any) -> Any:
        return tuner.model.forward(*args, **kwargs)  # looked up anew at each call

    tuner.forward = forward


def _without_position_warning(generate: Callable[..., Any]) -> Callable[..., Any]:
    def quiet(*args: Any, **kwargs: Any) -> Any:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Position ids are not supported")
            return generate(*args, **kwargs)

    return quiet


def _real_positions(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    asked = kwargs.get("input_ids", args[0] if args else None)
    logits = getattr(output, "logits", None)
    if asked is not None and logits is not None and logits.shape[1] > asked.shape[1]:
        output.logits = logits[:, -asked.shape[1] :]
    return output
