"""AdaLoRA's budget while training: its schedule, its allocation after each step, its state over a crash."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

if TYPE_CHECKING:
    from stages.methods.adalora import Adalora

STATE = "rank_allocator.safetensors"
"""The running importance of every entry, beside a checkpoint's weights."""
_AVERAGES = ("exp_avg_ipt", "exp_avg_unc")


class Budget(TrainerCallback):  # type: ignore[misc]
    """Calls PEFT's rank allocator, which PEFT and the trainer leave to whoever writes the training loop."""

    def __init__(self, method: "Adalora", model: Any) -> None:
        """Hold on to the allocator of ``model``, an AdaLoRA model of PEFT."""
        self._method = method
        self._tuner = model.base_model
        self._config = model.peft_config["default"]
        self._pattern: dict[str, list[bool]] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Fix the schedule now that the steps are counted; on a resume, restore what was averaged so far."""
        self._config.total_step = state.max_steps
        self._config.tinit = int(self._method.warmup_share * state.max_steps)
        self._config.tfinal = max(1, int(self._method.final_share * state.max_steps))
        kept = Path(args.output_dir) / f"checkpoint-{state.global_step}" / STATE
        if state.global_step and kept.is_file():
            self._restore(load_file(kept, device=str(next(self._tuner.parameters()).device)))

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Update importance and set the entries beyond the budget to zero; gradients are still there."""
        self._config.rank_pattern = self._pattern
        self._tuner.update_and_allocate(state.global_step)
        # With a pattern in its settings PEFT cuts what it saves, and could not load that into a model of full rank.
        self._pattern, self._config.rank_pattern = self._config.rank_pattern, None

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Keep the averages and the pattern of ranks."""
        allocator = self._tuner.rankallocator
        tensors = {f"{kind}/{name}": tensor for kind in _AVERAGES for name, tensor in getattr(allocator, kind).items()}
        tensors |= {f"rank_pattern/{name}": torch.tensor(kept) for name, kept in (self._pattern or {}).items()}
        if tensors:
            save_file(tensors, Path(args.output_dir) / f"checkpoint-{state.global_step}" / STATE)

    def _restore(self, tensors: dict[str, torch.Tensor]) -> None:
        allocator = self._tuner.rankallocator
        pattern = {}
        for key, tensor in tensors.items():
            kind, _, name = key.partition("/")
            if kind == "rank_pattern":
                pattern[name] = tensor.tolist()
            else:
                getattr(allocator, kind)[name] = tensor
                allocator.ipt.setdefault(name, torch.zeros_like(tensor))
        self._pattern = pattern or None
