"""PiSSA (Meng et al., arXiv 2404.02948): train the principal singular values and vectors."""

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from stages.methods.residual import ResidualLowRank

if TYPE_CHECKING:
    import torch


class Pissa(ResidualLowRank):
    """LoRA that starts as the largest part of each weight: converges faster, since it moves what matters most."""

    kind: Literal["pissa"]
    svd_iterations: Annotated[int, Field(gt=0)] | None = None
    """Approximate the decomposition by so many subspace iterations, minutes instead of hours on a large model; the
    model starts exactly either way. Left out, the decomposition is exact."""

    def factors(self, weight: "torch.Tensor") -> tuple["torch.Tensor", "torch.Tensor"]:
        """The first ``rank`` singular triples: B = U sqrt(S), A = sqrt(S) V^T (eq. 2 and 3)."""
        import torch

        from stages.tuner.factors import singular_factors

        if self.svd_iterations is None:
            u, s, v = singular_factors(weight)
        else:
            u, s, columns = torch.svd_lowrank(weight, self.rank, niter=self.svd_iterations)
            v = columns.T
        root = s[: self.rank].sqrt()
        return u[:, : self.rank] * root, root[:, None] * v[: self.rank]
