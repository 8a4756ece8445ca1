"""MiLoRA (Wang et al., arXiv 2406.09044): train the minor singular values and vectors."""

from typing import TYPE_CHECKING, Literal

from stages.methods.residual import ResidualLowRank

if TYPE_CHECKING:
    import torch


class Milora(ResidualLowRank):
    """LoRA that starts as the smallest part of each weight: leaves alone what the model knows best."""

    kind: Literal["milora"]

    def factors(self, weight: "torch.Tensor") -> tuple["torch.Tensor", "torch.Tensor"]:
        """The last ``rank`` singular triples: B = U sqrt(S), A = sqrt(S) V^T."""
        from stages.tuner.factors import singular_factors

        u, s, v = singular_factors(weight)
        root = s[-self.rank :].sqrt()
        return u[:, -self.rank :] * root, root[:, None] * v[-self.rank :]
