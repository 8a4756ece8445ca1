"""Rank-stabilised LoRA (Kalajdzievski, arXiv 2312.03732): the update is scaled by alpha / sqrt(rank)."""

from typing import Annotated, Any, Literal

from pydantic import Field

from stages.methods.lora import LowRank


class RsLora(LowRank):
    """LoRA whose scale does not shrink with the rank, so that high ranks learn more than low ones."""

    kind: Literal["rslora"]
    alpha: Annotated[float, Field(gt=0)] | None = None
    """The update is scaled by alpha / sqrt(rank); twice the square root of the rank where it is not given."""

    @property
    def scaled_by(self) -> float:
        """The alpha in use; by default it makes the scale 2, as LoRA's default does."""
        return 2 * self.rank**0.5 if self.alpha is None else self.alpha

    def options(self) -> dict[str, Any]:
        """PEFT's own."""
        return {"use_rslora": True}
