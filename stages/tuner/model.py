"""The model that PEFT wraps: puts updates beside its targets, ties them, and says what an adapter's file holds."""

import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from stages.errors import InvalidInput
from stages.tuner.config import UpdateConfig
from stages.tuner.layer import UpdatedLinear
from stages.tuner.registration import PREFIX
from stages.tuner.updates import Update

_LAYER = re.compile(r"\.\d+(?=\.)")

State = dict[str, torch.Tensor]


class UpdateModel(BaseTuner):  # type: ignore[misc]
    """A PEFT tuner; see PEFT's `BaseTuner` for what it inherits."""

    prefix = PREFIX
    tuner_layer_cls = UpdatedLinear
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}
    uses_shared_state = True

    def _create_and_replace(
        self,
        peft_config: UpdateConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, UpdatedLinear):
            target.add(adapter_name, peft_config)
            return
        layer = UpdatedLinear(target, current_key)
        layer.add(adapter_name, peft_config)
        layer.set_adapter(self.active_adapters)
        self._replace_module(parent, target_name, layer, target)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Put an adapter into ``model``; parameters that layers share become one."""
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        _tie(model, adapter_name)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        # The last thing that PEFT does after it has read an adapter: values were copied layer by layer, and on the
        # way from the meta device even into parameters of their own.
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        _tie(self.model, adapter_name)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        # Without this hook PEFT drops the argument and answers every row with the active adapter.
        if kwargs.get("adapter_names") is not None:
            raise InvalidInput(
                "these adapters cannot share a batch; ask one adapter at a time (set_adapter): that is exact"
            )
        yield

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: UpdateConfig,
        adapter_name: str,
        state_dict: State,
        unwanted_adapter_names: list[str],
    ) -> State:
        found: State = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        left_out = set(_copies(model, adapter_name))
        if not config.save_factors:
            left_out |= _factors(model, adapter_name)
        return {name: value for name, value in found.items() if name not in left_out}

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: UpdateConfig, adapter_name: str, state_dict: State
    ) -> State:
        found: State = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        for copy, source in _copies(model, adapter_name).items():
            if source in found:
                found.setdefault(copy, found[source])
        missing = _factors(model, adapter_name) - set(found)
        if missing:
            own = model.state_dict()
            found |= {name: own[name] for name in missing}
        return found


def _updates(model: nn.Module, adapter: str) -> list[tuple[str, Update]]:
    """The updates of one adapter, by the name of their module."""
    return [
        (f"{name}.trivium_update.{adapter}", layer.update_of(adapter))
        for name, layer in model.named_modules()
        if isinstance(layer, UpdatedLinear) and adapter in layer.trivium_update
    ]


def _groups(model: nn.Module, adapter: str) -> list[list[tuple[str, Update]]]:
    """Updates that share parameters: those of layers with the same name but for its number, and the same shape."""
    groups: dict[Any, list[tuple[str, Update]]] = defaultdict(list)
    for name, update in _updates(model, adapter):
        if update.tied:
            shapes = tuple(getattr(update, part).shape for part in update.tied)
            groups[_LAYER.sub("", name), shapes].append((name, update))
    return list(groups.values())


def _tie(model: nn.Module, adapter: str) -> None:
    for (_, first), *others in _groups(model, adapter):
        for _, update in others:
            for part in first.tied:
                setattr(update, part, getattr(first, part))


def _copies(model: nn.Module, adapter: str) -> dict[str, str]:
    """The names under which a shared parameter appears again, each with the name of its first appearance."""
    return {
        f"{name}.{part}": f"{first}.{part}"
        for (first, update), *others in _groups(model, adapter)
        for name, _ in others
        for part in update.tied
    }


def _factors(model: nn.Module, adapter: str) -> set[str]:
    """The names of the frozen buffers of an adapter."""
    return {f"{name}.{part}" for name, update in _updates(model, adapter) for part in update.frozen}
