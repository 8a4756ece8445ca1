"""VeRA (Kopiczko et al., arXiv 2310.11454): one random pair of matrices for all layers, scaled per layer."""

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from stages.methods.base import Start
from stages.methods.lora import Adapter
from stages.methods.targets import adapter_targets, is_transposed

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel


class Vera(Adapter):
    """Train two vectors per layer around shared random matrices: a hundredth of LoRA's parameters.

    It hardly moves at LoRA's learning rates; take one that is ten to a hundred times as large.
    """

    kind: Literal["vera"]
    trained: ClassVar[str] = ".vera_lambda_"
    rank_is_bounded: ClassVar[bool] = False  # the paper's are wider than the models they serve

    rank: Annotated[int, Field(gt=0)] = 256
    """Rank of the shared random matrices; it costs one trained number per layer and rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapters' input while training (DPO switches it off)."""
    initial_scale: Annotated[float, Field(gt=0)] = 0.1
    """What the vector between the random matrices starts from; the other starts at zero."""

    def adapter_config(self, model: "PreTrainedModel", start: Start) -> "PeftConfig":
        """The settings in PEFT's terms; the random matrices follow from the stage's seed and are kept."""
        from peft import VeraConfig

        targets = adapter_targets(model, self.target_modules)
        return VeraConfig(
            r=self.rank,
            vera_dropout=self.dropout,
            d_initial=self.initial_scale,
            projection_prng_key=start.seed,
            save_projection=True,
            target_modules=targets,
            fan_in_fan_out=is_transposed(model, targets),
            task_type="CAUSAL_LM",
        )
