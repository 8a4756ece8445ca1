"""A frozen linear layer with updates beside it, one per adapter."""

from collections.abc import Callable
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn
from transformers.pytorch_utils import Conv1D

from stages.errors import InvalidInput
from stages.tuner.config import UpdateConfig
from stages.tuner.updates import Update, build


class UpdatedLinear(nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """y = W x + b + dW x, for `torch.nn.Linear` and for the Conv1D of transformers, which holds W transposed."""

    adapter_layer_names = ("trivium_update",)

    # Inherited from PEFT, which has no types.
    active_adapters: list[str]
    get_base_layer: Callable[[], Any]
    set_adapter: Callable[..., None]

    def __init__(self, base_layer: nn.Module, name: str) -> None:
        super().__init__()
        if not isinstance(base_layer, (nn.Linear, Conv1D)) or not base_layer.weight.is_floating_point():
            raise InvalidInput(
                f"target_modules: {name} is a {type(base_layer).__name__}; only linear layers in floating point can "
                "be adapted here. Take it out, or use target_modules: all-linear"
            )
        self.base_layer = base_layer
        self.trivium_update = nn.ModuleDict()
        self.transposed = isinstance(base_layer, Conv1D)
        self.merged_adapters: list[str] = []
        self._name = name

    def add(self, adapter: str, config: UpdateConfig) -> None:
        """Put an untrained update beside the layer."""
        weight = self._weight().data
        self.trivium_update[adapter] = build(config, weight.T if self.transposed else weight, self._name)

    def forward(self, inputs: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The layer's output (..., out), in the base layer's precision."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        result: torch.Tensor = self.base_layer(inputs, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        for update in self._active():
            precision = next(update.parameters()).dtype
            result = (result + update(inputs.to(precision))).to(result.dtype)
        return result

    def _active(self) -> list[Update]:
        return [self.update_of(name) for name in self.active_adapters if name in self.trivium_update]

    def update_of(self, adapter: str) -> Update:
        """An adapter's update of this layer."""
        return cast("Update", self.trivium_update[adapter])

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """An adapter's dW in the layout of the base layer's weight."""
        delta = self.update_of(adapter).delta()
        return delta.T if self.transposed else delta

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add updates to the base weight.

        Args:
            safe_merge: refuse, with the weight untouched, an update that holds inf or nan.
            adapter_names: which; all active ones by default.

        Raises:
            ValueError: the merged weight would not be finite.
        """
        for adapter in check_adapters_to_merge(self, adapter_names):
            if adapter not in self.trivium_update:
                continue
            weight = self._weight()
            delta = self.get_delta_weight(adapter).detach()
            merged = (weight.data.to(delta.dtype) + delta).to(weight.dtype)
            if safe_merge and not bool(torch.isfinite(merged).all()):
                raise ValueError(f"NaNs detected in the merged weights. The adapter {adapter} seems to be broken")
            weight.data = merged
            self.merged_adapters.append(adapter)

    def unmerge(self) -> None:
        """Take merged updates out of the base weight again, up to rounding."""
        while self.merged_adapters:
            weight = self._weight()
            delta = self.get_delta_weight(self.merged_adapters.pop()).detach()
            weight.data = (weight.data.to(delta.dtype) - delta).to(weight.dtype)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """An update is added to the weight, so PEFT can approximate it by a low-rank one."""
        return True

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT's own would also take over the base's precision, and round float32 updates to bfloat16.
        if adapter_name in self.trivium_update and not any(
            tensor.is_meta for tensor in self.trivium_update[adapter_name].state_dict().values()
        ):
            self.trivium_update[adapter_name].to(device or self._weight().device)

    def _weight(self) -> nn.Parameter:
        return cast("nn.Parameter", self.get_base_layer().weight)

    def __repr__(self) -> str:
        return f"trivium.{super().__repr__()}"
