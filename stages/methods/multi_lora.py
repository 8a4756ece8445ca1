"""MultiLoRA: several scaled LoRA pairs side by side (Wang et al., arXiv 2311.11501)."""

from typing import Annotated, Any, Literal

from pydantic import Field

from stages.methods.update import Update


class MultiLora(Update):
    """Train dW = sum_i diag(s_i) B_i A_i: A and B drawn, the scales zero at the start.

    Meant for mixtures of tasks: the weight of the update spreads over more directions than one LoRA's of equal size.
    """

    kind: Literal["multi_lora"]
    adapters: Annotated[int, Field(gt=1)] = 3
    """Pairs side by side."""
    rank: Annotated[int, Field(gt=0)] = 8
    """Rank of each pair."""

    def options(self) -> dict[str, Any]:
        """Number of pairs and their rank."""
        return {"adapters": self.adapters, "rank": self.rank}
