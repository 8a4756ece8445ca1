"""A fixed batch whose logits say whether two models are the same one."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from stages.errors import StageFailed

if TYPE_CHECKING:
    import torch

FILE = "probe.safetensors"
ROWS, LENGTH = 2, 16
TOLERANCE = 1e-4
"""Largest difference in logits, at float32, between two loads of one checkpoint."""


def probe_ids(vocabulary: int) -> "torch.Tensor":
    """Token ids of shape (2, 16), the same for every model with this vocabulary."""
    import torch

    generator = torch.Generator().manual_seed(20)
    return torch.randint(0, vocabulary, (ROWS, LENGTH), generator=generator)


def logits(model: Any, ids: "torch.Tensor") -> "torch.Tensor":
    """The model's logits on ``ids`` in eval mode, shape (rows, length, vocabulary), float32 on the CPU."""
    import torch

    training = model.training
    model.eval()
    with torch.no_grad():
        found = model(input_ids=ids.to(next(model.parameters()).device), use_cache=False).logits
    model.train(training)
    return cast("torch.Tensor", found.float().cpu())


def record(folder: Path, ids: "torch.Tensor", found: "torch.Tensor") -> None:
    """Keep a model's answer to the probe: the ids, and the logits after the last token of each row."""
    from safetensors.torch import save_file

    save_file({"ids": ids, "logits": found[:, -1].contiguous()}, folder / FILE)


def check_start(model: Any, artifact: Path) -> float:
    """The largest difference between a loaded start model and what its artifact recorded.

    Raises:
        StageFailed: it is not the model that was published.
    """
    from safetensors.torch import load_file

    kept = load_file(artifact / FILE)
    difference = float((logits(model, kept["ids"])[:, -1] - kept["logits"]).abs().max())
    if not difference <= TOLERANCE:
        raise StageFailed(
            f"{artifact}: loads as another model than was published (logits differ by {difference:.2g}, allowed "
            f"{TOLERANCE:g}); run `trivium plan` to see what is damaged, move the folder away and run again"
        )
    return difference
