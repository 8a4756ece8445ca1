"""PiSSA (Meng et al., arXiv 2404.02948): train the principal singular values and vectors."""

from typing import TYPE_CHECKING, Literal

from stages.methods.residual import ResidualLowRank

if TYPE_CHECKING:
    import torch


class Pissa(ResidualLowRank):
    """LoRA that starts as the largest part of each weight: converges faster, since it moves what matters most."""

    kind: Literal["pissa"]

    def factors(self, weight: "torch.Tensor") -> tuple["torch.Tensor", "torch.Tensor"]:
        """The first ``rank`` singular triples: B = U sqrt(S), A = sqrt(S) V^T (eq. 2 and 3)."""
        import torch

        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        root = s[: self.rank].sqrt()
        return u[:, : self.rank] * root, root[:, None] * v[: self.rank]
