"""SVF: singular value fine-tuning (Sun et al., arXiv 2206.06122; on language models Sun et al., arXiv 2501.06252)."""

from typing import ClassVar, Literal

from stages.methods.update import Update


class Svf(Update):
    """Train one factor per singular value of each matrix: W' = U diag(s z) V^T, z = 1 at the start.

    Very few parameters, so it wants a larger learning rate than LoRA. Trained on one base, several results add up:
    see `trivium combine`. The singular vectors of every target are held in memory, more than the weights themselves.
    """

    kind: Literal["svf"]
    decomposes: ClassVar[bool] = True
