"""Add up what several stages learned on one base, where their method adds up: SVF, and SVFT with pattern plain.

Both change nothing but the strength of a base's singular directions, so the changes of several artifacts of one base
can be added with weights: W' = W + U diag(sum_i w_i S (z_i - 1)) V^T (Transformer², Sun et al., arXiv 2501.06252,
combines its expert vectors this way). Nothing is trained; the result is verified like a hand-over.
"""

import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages import probe
from stages.artifact import ADAPTER, Artifact, find, read, require_writable, short, verified
from stages.documents import write_json
from stages.errors import InvalidInput, StageFailed
from stages.model import load_plain, load_tokenizer, save_plain, set_stop_tokens

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

PROVENANCE = "combined.json"
"""The file beside the combined model that says what it was made of."""


def combine(
    artifacts: Sequence[Path], weights: Sequence[float], target: Path, dtype: str = "float32"
) -> dict[str, Any]:
    """Write a plain model that is a base plus the weighted changes of several of its stage artifacts.

    Args:
        artifacts: folders of published stages with method svf, or svft with pattern plain, all started from one model.
        weights: one factor per artifact; 1 takes its change as it is, a negative one takes it back.
        target: the folder to write; must not exist yet. It gets the model, the tokenizer and `combined.json`.
        dtype: precision of the written weights: float32, bfloat16 or float16.

    Returns:
        What `combined.json` holds: the parts with their identities and weights, the base, the error measured.

    Raises:
        InvalidInput: the artifacts cannot be added up; the message says why.
        StageFailed: an artifact is damaged, or what was written is not what was combined.
    """
    import torch

    _check_request(artifacts, weights, target, dtype)
    parts = [_part(folder) for folder in artifacts]
    parent = _common_start(parts)
    base = load_plain(parent.model, torch.float32)
    probe.check_start(base, parent.path)
    tokenizer = load_tokenizer(parent.model)
    merged, error = _added(base, parts, weights)
    set_stop_tokens(merged, tokenizer)
    record = {
        "base": parent.identity,
        "parts": [
            {"artifact": part.path.name, "identity": part.identity, "weight": weight}
            for part, weight in zip(parts, weights, strict=True)
        ],
        "dtype": dtype,
        "max_logit_error": error,
    }
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        cast = merged.to(getattr(torch, dtype))
        save_plain(cast, tokenizer, partial, code_of=parent.model)
        _check_written(cast, partial)
        write_json(partial / PROVENANCE, record)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return record


def _check_request(artifacts: Sequence[Path], weights: Sequence[float], target: Path, dtype: str) -> None:
    if not artifacts:
        raise InvalidInput("name at least one artifact to combine")
    if len(weights) != len(artifacts):
        raise InvalidInput(
            f"{len(artifacts)} artifacts and {len(weights)} weights: give one weight per artifact, in order"
        )
    bad = [weight for weight in weights if not math.isfinite(weight)]
    if bad:
        raise InvalidInput(f"a weight is {bad[0]}; weights are finite numbers")
    if dtype not in {"float32", "bfloat16", "float16"}:
        raise InvalidInput(f"dtype {dtype!r} is not one of float32, bfloat16, float16")
    if os.path.lexists(target):
        raise InvalidInput(f"{target}: exists already; name a new folder")
    if not target.parent.is_dir():
        raise InvalidInput(f"{target}: {target.parent} is no folder; make it first, or name another place")
    require_writable(target.parent)


def _part(folder: Path) -> Artifact:
    """A published stage whose change can be added to others."""
    artifact = read(folder)
    if artifact is None:
        raise InvalidInput(
            f"{folder}: not a published artifact; name the folder of a stage, such as artifacts/NAME/01-STAGE-1a2b3c4d"
        )
    stage = artifact.manifest["inputs"].get("stage")
    if not isinstance(stage, dict):
        raise InvalidInput(f"{folder}: a {artifact.manifest['inputs'].get('kind')}, not a stage; it holds no change")
    method = stage["method"]
    if method["kind"] != "svf" and (method["kind"], method.get("pattern")) != ("svft", "plain"):
        pattern = f" with pattern {method['pattern']}" if "pattern" in method else ""
        raise InvalidInput(
            f"{folder}: trained with method {method['kind']}{pattern}; only svf, and svft with pattern plain, add up: "
            "their changes share the base's singular directions"
        )
    return verified(artifact)


def _common_start(parts: Sequence[Artifact]) -> Artifact:
    """The artifact that all parts started from."""
    seen: dict[str, Artifact] = {}
    for part in parts:
        if part.identity in seen:
            raise InvalidInput(
                f"{part.path}: named twice (or the same result elsewhere); name it once, with the sum of the weights"
            )
        seen[part.identity] = part
    starts = {part.manifest["inputs"]["parent"]: part for part in parts}
    if len(starts) > 1:
        lines = [f"{part.path} started from {short(parent)}" for parent, part in starts.items()]
        raise InvalidInput(
            f"the artifacts did not start from one model: {'; '.join(lines)}. Their changes belong to different "
            "singular directions; train the stages on one base, each in a spec of its own"
        )
    identity = next(iter(starts))
    for part in parts:
        parent = find(part.path.parent, identity)
        if parent is not None:
            return verified(parent)
    raise InvalidInput(
        f"the model that the artifacts started from ({short(identity)}) is in none of their folders; run `trivium run` "
        "on one of the specs: it is made anew"
    )


def _added(
    base: "PreTrainedModel", parts: Sequence[Artifact], weights: Sequence[float]
) -> tuple["PreTrainedModel", float]:
    """The base with all weighted changes folded in (float32), and how far that moved the logits from the live sum."""
    import torch
    from peft import PeftModel

    import stages.tuner  # noqa: F401  PEFT learns of our adapters

    names = [f"part{number}" for number in range(len(parts))]
    model = PeftModel.from_pretrained(base, parts[0].path / ADAPTER, adapter_name=names[0])
    for part, name in zip(parts[1:], names[1:], strict=True):
        model.load_adapter(part.path / ADAPTER, adapter_name=name)
    scale = dict(zip(names, weights, strict=True))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            owner = next((part for part in parameter_name.split(".") if part in scale), None)
            if owner is not None:
                parameter.mul_(scale[owner])
    model.base_model.set_adapter(names, inference_mode=True)
    dtype = probe.comparison_dtype(model)
    ids = probe.probe_ids(model)
    wanted = probe.logits(model.to(dtype), ids)
    merged: PreTrainedModel = model.float().merge_and_unload(safe_merge=True, adapter_names=names)
    error, allowed = probe.distance(probe.plain_logits(merged, ids, dtype), wanted, probe.TOLERANCE)
    if not error <= allowed:
        raise StageFailed(f"the merged model is not the sum: logits differ by {error:.2g}, allowed {allowed:.2g}")
    return merged, error


def _check_written(model: "PreTrainedModel", folder: Path) -> None:
    """What any tool will load from ``folder`` is, weight by weight, what was to be written."""
    import torch

    wanted = model.state_dict()
    found = load_plain(folder, model.dtype).state_dict()
    different = [name for name in wanted.keys() | found.keys() if not _equal(wanted.get(name), found.get(name))]
    broken = [name for name, value in found.items() if not bool(torch.isfinite(value).all())]
    if different or broken:
        raise StageFailed(
            f"what was written is not the combined model: {', '.join(sorted(different or broken)[:3])} differ or are "
            "not finite; nothing is kept. In float16 large weights overflow: take bfloat16"
        )


def _equal(one: "torch.Tensor | None", other: "torch.Tensor | None") -> bool:
    import torch

    return one is not None and other is not None and torch.equal(one, other)
