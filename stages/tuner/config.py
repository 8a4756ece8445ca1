"""The settings of an adapter, as its adapter_config.json holds them."""

import copy
from dataclasses import dataclass
from typing import Any, Literal

from peft import PeftConfig

from stages.tuner.registration import peft_type

Form = Literal["svf", "svft", "lora_xs", "tied_lora", "multi_lora"]
Pattern = Literal["plain", "banded", "random", "top_k"]


@dataclass
class UpdateConfig(PeftConfig):  # type: ignore[misc]
    """Which layers are updated, and in which form; PEFT's own fields are inherited."""

    form: Form = "svf"
    """How the update of a weight is written; see `stages.tuner.updates`."""
    target_modules: list[str] | str | None = None
    """Endings of module names, as PEFT matches them."""
    exclude_modules: list[str] | str | None = None
    """Endings of module names that are left alone."""
    rank: int = 8
    """Rank of lora_xs, tied_lora and of each pair of multi_lora."""
    adapters: int = 3
    """Pairs of multi_lora that stand side by side."""
    pattern: Pattern = "plain"
    """Which entries of svft's matrix train."""
    width: int = 2
    """Off-diagonals on each side of svft's banded pattern; random and top_k train as many entries."""
    seed: int = 17
    """Draws svft's random pattern, another one for each layer."""
    save_factors: bool = True
    """Whether saved adapters hold the frozen singular vectors that their trained values belong to."""
    factors_from_file: bool = False
    """Set in saved adapters that hold them: loading then needs no decomposition."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft_type()

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write adapter_config.json, which says whether the weights beside it hold the singular vectors."""
        saved = copy.copy(self)
        saved.factors_from_file = self.save_factors
        PeftConfig.save_pretrained(saved, save_directory, **kwargs)
