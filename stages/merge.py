"""The verified hand-over: merge, write, reload as a plain model, compare with what was trained.

What no plain model can hold is handed over as an adapter, under the same proof: `keep_adapter`.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages import probe
from stages.adapter import save_adapter
from stages.artifact import ADAPTER, MODEL
from stages.errors import StageFailed
from stages.finite import not_finite
from stages.methods.base import MethodSpec, Start
from stages.model import load_config, load_plain, save_plain, set_stop_tokens, without_weights
from stages.serving import assemble

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_CONFIG_MAY_DIFFER = {
    "_name_or_path",
    "transformers_version",
    "dtype",
    "use_cache",
    "eos_token_id",
    "pad_token_id",
}


def hand_over(
    method: MethodSpec,
    trained: "torch.nn.Module",
    tokenizer: "PreTrainedTokenizerBase",
    start: Start,
    folder: Path,
) -> tuple["PreTrainedModel", dict[str, Any]]:
    """Merge a trained model, write it to ``folder`` and prove that what was written is what was trained.

    Args:
        method: how the model was adapted.
        trained: the live trained model.
        tokenizer: written beside the weights.
        start: what the method was prepared with.
        folder: gets ``model/`` and ``probe.safetensors``.

    Returns:
        The reloaded plain model (float32, on the CPU) and the record: the largest and the root mean square
        difference in logits from the trained model. A merge that is another model on purpose is compared with itself
        before it was written; its distance from the trained model is then kept beside.

    Raises:
        StageFailed: the reloaded model is not the trained one.
    """
    import torch

    live, dtype, ids, wanted = _trained(method, trained)
    merged = method.merge_record(live, start)
    plain = method.finish(live, start)
    set_stop_tokens(plain, tokenizer)
    expected = wanted if method.exact_merge else probe.plain_logits(plain, ids, dtype)
    expected_keys, expected_config = set(plain.state_dict()), _settings(plain.config)
    save_plain(plain, tokenizer, folder / MODEL, code_of=start.model)
    del plain, live
    reloaded = load_plain(folder / MODEL, torch.float32)
    found = probe.plain_logits(reloaded, ids, dtype)
    error, allowed = probe.distance(found, expected, method.merge_tolerance)
    problems = _differences(reloaded, expected_keys, expected_config, start.model, method)
    if not error <= allowed:
        problems.append(f"logits differ by {error:.2g}, allowed {allowed:.2g}")
    if problems:
        raise StageFailed(
            f"the merge of method {method.kind} is not the trained model: {'; '.join(problems)}. Nothing is "
            "published; the trained state is kept and a rerun merges again"
        )
    probe.record(folder, ids, found)
    record = _record(found, expected, allowed)
    if not method.exact_merge:
        record["distance_to_trained"] = float((found - wanted).abs().max())
    return reloaded, record | merged


def keep_adapter(
    method: MethodSpec,
    trained: "torch.nn.Module",
    start: Start,
    folder: Path,
) -> tuple["torch.nn.Module", dict[str, Any]]:
    """Write the adapter of an unmergeable method and prove that the start with it on is what was trained.

    Args:
        method: how the model was adapted.
        trained: the live trained model.
        start: what the method was prepared with; its model is the base.
        folder: gets ``adapter/`` and ``probe.safetensors``.

    Returns:
        The base with the reloaded adapter on (float32, on the CPU), and the record as `hand_over` gives it.

    Raises:
        StageFailed: the reloaded model is not the trained one.
    """
    import torch

    save_adapter(trained, folder / ADAPTER)
    _, dtype, ids, wanted = _trained(method, trained)
    reloaded, _ = assemble(start.model, folder / ADAPTER, torch.float32)
    found = probe.plain_logits(reloaded, ids, dtype)
    error, allowed = probe.distance(found, wanted, method.merge_tolerance)
    if not error <= allowed:
        raise StageFailed(
            f"the adapter of method {method.kind}, reloaded on its base, is not the trained model: logits differ by "
            f"{error:.2g}, allowed {allowed:.2g}. Nothing is published; the trained state is kept for a rerun"
        )
    probe.record(folder, ids, found)
    return reloaded, _record(found, wanted, allowed) | {"unmerged": True}


def _trained(
    method: MethodSpec, trained: "torch.nn.Module"
) -> tuple["torch.nn.Module", "torch.dtype", "torch.Tensor", "torch.Tensor"]:
    """The trained model as it is compared, the precision, the probe's ids and the logits that must be found again."""
    import torch

    broken = not_finite(trained)
    if broken:
        raise StageFailed(f"training left inf or nan in {broken}; lower train.learning_rate and run again")
    dtype = min(probe.comparison_dtype(trained), getattr(torch, method.widest), key=lambda one: one.itemsize)
    live = method.for_comparison(trained, dtype)
    ids = probe.probe_ids(live)
    return live, dtype, ids, probe.logits(live, ids)


def _record(found: "torch.Tensor", wanted: "torch.Tensor", allowed: float) -> dict[str, Any]:
    """What the manifest keeps of a comparison of logits."""
    difference = found - wanted
    return {
        "max_logit_error": float(difference.abs().max()),
        "rms_logit_error": float(difference.square().mean().sqrt()),
        "tolerance": allowed,
        "compared_in": str(wanted.dtype).removeprefix("torch."),
    }


def _differences(
    reloaded: "PreTrainedModel", keys: set[str], config: dict[str, Any], start: Path, method: MethodSpec
) -> list[str]:
    problems = []
    found = set(reloaded.state_dict())
    if found != keys:
        problems.append(f"other weights than written: {sorted(found ^ keys)[:3]}")
    start_config = load_config(start)
    before = set(without_weights(start_config).state_dict())
    strangers = sorted(name for name in found ^ before if not name.endswith(method.new_weights))
    if strangers:
        problems.append(f"other weights than the start has: {strangers[:3]}")
    original = _settings(start_config)
    changed = {key for key in config if key in original and original[key] != config[key]}
    changed -= _CONFIG_MAY_DIFFER | method.config_changes
    if changed:
        problems.append(f"the config changed in {', '.join(sorted(changed))}")
    if broken := not_finite(reloaded):
        problems.append(f"inf or nan in {broken}")
    return problems


def _settings(config: "PretrainedConfig") -> dict[str, Any]:
    """Every setting of a model's config, as JSON would hold it."""
    return dict(json.loads(config.to_json_string(use_diff=False)))
