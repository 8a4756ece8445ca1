"""DoRA (Liu et al., arXiv 2402.09353): a matrix is trained as magnitude times direction, the direction by LoRA."""

from typing import Any, Literal

from stages.methods.lora import LowRank


class Dora(LowRank):
    """LoRA that also trains the length of each output's weight vector; nearer to full training, twice the memory."""

    kind: Literal["dora"]

    def options(self) -> dict[str, Any]:
        """PEFT's own."""
        return {"use_dora": True}
