"""A fixed batch whose logits say whether two models are the same one.

At float32 the arithmetic of a 30-layer model is itself uncertain by 1e-4 in logits: two orders of adding the
same numbers differ by as much as a wrong merge of a small update. So models are compared in float64 wherever
one fits into memory.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from stages.errors import StageFailed

if TYPE_CHECKING:
    import torch

FILE = "probe.safetensors"
ROWS, LENGTH = 2, 16
TOLERANCE = 1e-4
"""Largest difference in logits between two loads of one checkpoint, and between a start model and its adapted self."""
FLOAT32_NOISE = 1e-5
"""What float32 arithmetic adds to a difference, as a share of the largest logit (measured: 3e-6 on 30 layers)."""


def probe_ids(model: Any) -> "torch.Tensor":
    """Token ids of shape (2, 16), the same for every model with this vocabulary."""
    import torch

    generator = torch.Generator().manual_seed(20)
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    return torch.randint(0, vocabulary, (ROWS, LENGTH), generator=generator)


def comparison_dtype(model: Any) -> "torch.dtype":
    """float64 where the model fits into half of the free memory twice as large, else float32."""
    import psutil
    import torch

    needed = 8 * sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    return torch.float64 if needed < psutil.virtual_memory().available / 2 else torch.float32


def logits(model: Any, ids: "torch.Tensor", *, autocast: bool = False) -> "torch.Tensor":
    """The model's logits on ``ids`` in eval mode, in its own precision, on the CPU: (rows, length, vocabulary).

    Args:
        model: plain or adapted.
        ids: token ids of shape (rows, length).
        autocast: compute in bfloat16: float32 weights beside bfloat16 ones cannot be multiplied otherwise.
    """
    import torch

    device = next(model.parameters()).device
    training = model.training
    model.eval()
    with torch.no_grad(), _any_precision(model), torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
        found = model(input_ids=ids.to(device), use_cache=False).logits
    model.train(training)
    return cast("torch.Tensor", found.cpu())


@contextmanager
def _any_precision(model: Any) -> Iterator[None]:
    """Let the experts of a mixture compute one by one in float64: their grouped product ends at float32."""
    import torch

    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    switch = getattr(plain, "set_experts_implementation", None)
    if switch is None or next(plain.parameters()).dtype != torch.float64 or not plain._can_set_experts_implementation():
        yield
        return
    before = plain.get_experts_implementation()
    switch("eager")
    try:
        yield
    finally:
        switch(before)


def packing_leak(model: Any, *, autocast: bool = False) -> float:
    """How far the logits of one packed document move when the one before it changes; 0 where packing is sound.

    Two documents share a row as the trainer packs them: positions that start again, no mask, no cache. Whether
    the attention backend in use keeps them apart is its business, so it is asked.
    """
    import torch

    device = next(model.parameters()).device
    first, second, other = probe_ids(model)[:, : LENGTH // 2].repeat(2, 1)[:3].unbind()
    other = other.flip(0)
    positions = torch.arange(LENGTH // 2).repeat(2)[None].to(device)
    training = model.training
    model.eval()
    found = []
    for before in (first, other):
        ids = torch.cat([before, second])[None].to(device)
        with torch.no_grad(), torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
            packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        found.append(packed[0, LENGTH // 2 :].float())
    model.train(training)
    return float((found[0] - found[1]).abs().max())


def plain_logits(model: Any, ids: "torch.Tensor", dtype: "torch.dtype | None" = None) -> "torch.Tensor":
    """The logits of a plain float32 model, computed in ``dtype`` (by default the best that fits)."""
    import torch

    found = logits(model.to(comparison_dtype(model) if dtype is None else dtype), ids)
    model.to(torch.float32)
    return found


def distance(found: "torch.Tensor", wanted: "torch.Tensor", tolerance: float) -> tuple[float, float]:
    """The largest difference between two sets of logits, and the largest that is allowed.

    Args:
        found: logits of one model.
        wanted: logits of the other, in the same precision.
        tolerance: what is allowed beyond the noise of the precision that they were computed in.
    """
    import torch

    noise = 0.0 if wanted.dtype == torch.float64 else FLOAT32_NOISE * float(wanted.abs().max())
    return float((found - wanted).abs().max()), tolerance + noise


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
    found = plain_logits(model, kept["ids"], kept["logits"].dtype)[:, -1]
    difference, allowed = distance(found, kept["logits"], TOLERANCE)
    if not difference <= allowed:
        raise StageFailed(
            f"{artifact}: loads as another model than was published (logits differ by {difference:.2g}, allowed "
            f"{allowed:.2g}); move the folder away and run again: that step and those after it are made anew"
        )
    return difference
