"""LoRA-XS: a small matrix between a weight's first singular vectors (Bałazy et al., arXiv 2405.17604)."""

from typing import Annotated, Any, Literal

from pydantic import Field

from stages.methods.update import Update


class LoraXs(Update):
    """Train R in dW = U_r S_r R V_r^T, r x r parameters per matrix, zero at the start.

    The authors draw R from a narrow normal distribution, which moves the start; and their gains hang on a larger
    learning rate than LoRA's.
    """

    kind: Literal["lora_xs"]
    rank: Annotated[int, Field(gt=0)] = 16
    """How many singular vectors of each matrix are used: r."""

    def options(self) -> dict[str, Any]:
        """The rank."""
        return {"rank": self.rank}
