"""OLoRA (Büyükakyüz, arXiv 2406.01775): start from an orthonormal basis of each weight."""

from typing import TYPE_CHECKING, Literal

from stages.methods.residual import ResidualLowRank

if TYPE_CHECKING:
    import torch


class Olora(ResidualLowRank):
    """LoRA that starts from the QR decomposition of each weight: the columns of B are orthogonal."""

    kind: Literal["olora"]

    def factors(self, weight: "torch.Tensor") -> tuple["torch.Tensor", "torch.Tensor"]:
        """The first ``rank`` columns of Q and rows of R."""
        import torch

        q, r = torch.linalg.qr(weight)
        return q[:, : self.rank], r[: self.rank]
