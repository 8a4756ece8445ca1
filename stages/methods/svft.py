"""SVFT: sparse updates between a weight's own singular vectors (Lingam et al., arXiv 2405.19597)."""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from stages.methods.update import Update

_WIDTH = 2


class Svft(Update):
    """Train a sparse M in W' = U (S + M) V^T, M zero at the start.

    The singular vectors of every target are held in memory, more than the weights themselves.
    """

    kind: Literal["svft"]
    decomposes: ClassVar[bool] = True
    pattern: Literal["plain", "banded", "random", "top_k"] = "plain"
    """Which entries of M train: the diagonal; a band around it; as many at random, without replacement; or as many
    where left and right singular vectors overlap most."""
    width: Annotated[int, Field(gt=0)] | None = None
    """Off-diagonals on each side of the diagonal (2 where it is not given); random and top_k train as many entries
    as the band of this width has."""

    @model_validator(mode="after")
    def _width_means_something(self) -> Self:
        if self.pattern == "plain" and self.width is not None:
            raise ValueError("width has no meaning for pattern plain, a diagonal; take it out, or use pattern banded")
        return self

    def options(self) -> dict[str, Any]:
        """Pattern and width."""
        return {"pattern": self.pattern, "width": self.width or _WIDTH}
