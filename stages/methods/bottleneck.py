"""Bottleneck adapters: a small network behind each sublayer (Houlsby et al., arXiv 1902.00751)."""

import re
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from stages.errors import InvalidInput
from stages.methods.unmerged import Unmerged

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig
    from transformers import PreTrainedModel

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.0$")
_ATTENTION = ("self_attn", "attn", "attention", "self_attention")
_MLP = ("mlp", "block_sparse_moe", "feed_forward", "ffn")


class Bottleneck(Unmerged):
    """Train h + U gelu(D h) behind sublayers, before their residual; last stage only, the result is base + adapter.

    The non-linearity is what keeps it from being folded into the weights.
    """

    kind: Literal["bottleneck"]
    size: Annotated[int, Field(gt=0)] = 64
    """Width r of the bottleneck: 2 d r + r + d parameters each, d being the model's hidden size."""
    placement: Literal["houlsby", "pfeiffer"] = "houlsby"
    """houlsby: behind attention and behind the MLP; pfeiffer: behind the MLP only (arXiv 2005.00247), half the
    parameters."""

    trained: ClassVar[str] = ".bottleneck_"

    def adapter_config(self, model: "PreTrainedModel") -> "PeftConfig":
        """Our own PEFT method, on this model's names."""
        from stages.tuner.bottleneck import BottleneckConfig

        wanted = (_ATTENTION, _MLP) if self.placement == "houlsby" else (_MLP,)
        names = [_sublayer(model, known) for known in wanted]
        return BottleneckConfig(size=self.size, target_modules=names, task_type="CAUSAL_LM")


def _sublayer(model: "torch.nn.Module", known: tuple[str, ...]) -> str:
    """The name that a layer's sublayer goes by in this model.

    Raises:
        InvalidInput: there is none, or it adds the residual itself, so that nothing comes between the two.
    """
    import inspect

    layer = next((module for name, module in model.named_modules() if _LAYER.search(name)), None)
    children = {} if layer is None else dict(layer.named_children())
    name = next((name for name in known if name in children), None)
    if name is None:
        raise InvalidInput(
            f"method bottleneck finds no {known[0]} in the layers of {type(model).__name__} (known names: "
            f"{', '.join(known)}; a layer has: {', '.join(children) or 'no parts that were found'}); use prefix_tuning"
        )
    if "residual" in inspect.signature(children[name].forward).parameters:
        raise InvalidInput(
            f"method bottleneck comes before the residual, and {type(model).__name__} adds it inside {name}; "
            "use prefix_tuning"
        )
    return name
