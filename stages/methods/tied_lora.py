"""Tied-LoRA: LoRA whose matrices all layers share (Renduchintala et al., arXiv 2311.09578)."""

from typing import Annotated, Any, Literal

from pydantic import Field

from stages.methods.update import Update


class TiedLora(Update):
    """Train dW_l = diag(v_l) B diag(u_l) A: A and B shared by all layers, the vectors each layer's own.

    The paper ties across a fused query-key-value projection; with grouped queries these have no common shape, so
    modules of one type and shape share. All four are trained, as in the paper's variant vBuA.
    """

    kind: Literal["tied_lora"]
    rank: Annotated[int, Field(gt=0)] = 16
    """Rank of the shared matrices."""

    def options(self) -> dict[str, Any]:
        """The rank."""
        return {"rank": self.rank}
