"""Bottleneck adapters as a PEFT method of our own: h + U gelu(D h) behind a whole attention or MLP module.

PEFT has none, and the library that has (`adapters`) is tied to another transformers. As a PEFT method an
adapter is saved, loaded, switched off and switched over like any other.
"""

from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer

from stages.tuner.registration import peft_type, register

NAME = "BOTTLENECK"
"""The ``peft_type`` in the adapter_config.json of these adapters."""


@dataclass
class BottleneckConfig(PeftConfig):  # type: ignore[misc]
    """What an adapter's `adapter_config.json` holds."""

    size: int = 64
    """Width r of the bottleneck."""
    target_modules: list[str] | None = None
    """Last parts of the names of the attention and MLP modules whose output is adapted."""

    def __post_init__(self) -> None:
        """Say which method this is."""
        super().__post_init__()
        self.peft_type = peft_type(NAME)


class BottleneckLayer(torch.nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """A wrapped module, and the bottlenecks behind its output."""

    adapter_layer_names = ("bottleneck_down", "bottleneck_up")
    base_layer: Any
    bottleneck_down: Any
    """D by adapter: (d, r)."""
    bottleneck_up: Any
    """U by adapter: (r, d)."""

    def __init__(self, base_layer: torch.nn.Module, width: int) -> None:
        """Wrap ``base_layer``, whose output (or the first of its outputs) has ``width`` as its last dimension."""
        super().__init__()
        self.base_layer = base_layer
        self.width = width
        self.bottleneck_down = torch.nn.ModuleDict()
        self.bottleneck_up = torch.nn.ModuleDict()
        self._disable_adapters = False
        self.merged_adapters: list[str] = []

    def update_layer(self, name: str, config: BottleneckConfig) -> None:
        """Add a bottleneck: 2 d r + r + d parameters, U and its bias zero, so that it changes nothing yet."""
        device = next(self.base_layer.parameters()).device
        self.bottleneck_down[name] = torch.nn.Linear(self.width, config.size, device=device)
        self.bottleneck_up[name] = torch.nn.Linear(config.size, self.width, device=device)
        for parameter in self.bottleneck_up[name].parameters():
            torch.nn.init.zeros_(parameter)
        own: Any = self
        own.set_adapter(own.active_adapters, inference_mode=config.inference_mode)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the wrapped module gives, its hidden states adapted, whatever else it gives as it is."""
        own: Any = self
        found = self.base_layer(*args, **kwargs)
        if own.disable_adapters:
            return found
        hidden = found[0] if isinstance(found, tuple) else found
        change = sum(self._change(hidden, name) for name in own.active_adapters if name in self.bottleneck_down)
        return (hidden + change, *found[1:]) if isinstance(found, tuple) else hidden + change

    def _change(self, hidden: torch.Tensor, name: str) -> torch.Tensor:
        down, up = self.bottleneck_down[name], self.bottleneck_up[name]
        narrow = torch.nn.functional.gelu(down(hidden.to(down.weight.dtype)))
        return up(narrow).to(hidden.dtype)  # type: ignore[no-any-return]


class BottleneckModel(BaseTuner):  # type: ignore[misc]
    """A model with bottleneck adapters."""

    prefix: Any = "bottleneck_"
    tuner_layer_cls = BottleneckLayer
    target_module_mapping: dict[str, list[str]] = {}

    def _create_and_replace(
        self,
        config: BottleneckConfig,
        adapter_name: str,
        target: torch.nn.Module,
        target_name: str,
        parent: torch.nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        if isinstance(target, BottleneckLayer):
            target.update_layer(adapter_name, config)
            return
        layer = BottleneckLayer(target, self.model.config.get_text_config().hidden_size)
        layer._active_adapter = adapter_name  # type: ignore[assignment]
        layer.update_layer(adapter_name, config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)


register(BottleneckConfig, BottleneckModel, NAME, BottleneckModel.prefix)
