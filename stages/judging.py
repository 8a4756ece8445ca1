"""The judge of a metric, ready to be asked: loaded for as long as it is needed, or reached over the network."""

import gc
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from specs.base import fingerprint
from specs.metric import JudgeSpec
from specs.model import ModelSpec
from stages.base import plain_checkpoint
from stages.documents import make_folder
from stages.identity import Digests, model_digests
from stages.lock import exclusive
from stages.metrics.endpoint import endpoint_judge
from stages.metrics.judge import Ask
from stages.model import load_plain, load_tokenizer, training_device
from stages.remote_code import allowing
from stages.template import dated

if TYPE_CHECKING:
    import torch

KEPT = ".judges"
"""Beside the artifacts: judges that were converted or fetched, and the replies of those behind HTTP."""


@contextmanager
def judge_of(spec: JudgeSpec, label: str, folder: Path, store: Path) -> Iterator[Ask]:
    """A judge to ask; one that was loaded is let go afterwards.

    Args:
        spec: the metric as the spec has it.
        label: what the spec calls it.
        folder: what relative paths start from.
        store: the pipeline's folder of artifacts.

    Raises:
        InvalidInput: the model cannot be loaded, or the key of the endpoint is missing.
    """
    if spec.endpoint is not None:
        yield endpoint_judge(spec.endpoint, label, store / KEPT, os.environ)
        return
    from stages.metrics.local_judge import local_judge

    assert spec.model is not None  # noqa: S101 - the spec has one of both
    with allowing(spec.model.allow_remote_code), dated(spec.model.template_date):
        place = _place(spec.model, folder, store / KEPT)
        model = load_plain(place, _dtype(spec.model)).to(training_device()).eval()
        try:
            yield local_judge(spec, label, model, load_tokenizer(place))
        finally:
            del model
            gc.collect()


def _place(spec: ModelSpec, folder: Path, kept: Path) -> Path:
    """The judge's checkpoint; what has to be converted or fetched is, once, under what identifies it."""
    if spec.path is not None and spec.chat_template is None:
        return plain_checkpoint(spec, folder, folder)[0]
    name = fingerprint(model_digests(spec, folder, Digests(kept / "digests.json")))[:16]
    make_folder(kept)
    with exclusive(kept / f"{name}.lock", f"judge {name}"):
        place = kept / name
        if not place.is_dir():
            fresh = kept / f"{name}.new"
            shutil.rmtree(fresh, ignore_errors=True)
            plain_checkpoint(spec, folder, fresh)[0].rename(place)
    return place


def _dtype(spec: ModelSpec) -> "torch.dtype":
    import torch

    found: torch.dtype = getattr(torch, spec.dtype)
    return found
