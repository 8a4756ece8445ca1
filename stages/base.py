"""The first step of a chain: the base model as a plain checkpoint with a recorded probe."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specs.model import ModelSpec
from stages import probe
from stages.artifact import MODEL, MODEL_FILES
from stages.errors import InvalidInput
from stages.finite import not_finite
from stages.job import Job
from stages.model import convert_gguf, load_plain, load_tokenizer
from stages.origin import CARD, origin_of
from stages.pickles import PICKLES
from stages.template import check_template, folder_templates, read_template

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def prepare_base(job: Job, work: Path) -> tuple["PreTrainedModel", dict[str, Any]]:
    """Bring the base into ``work``: converted from GGUF, fetched from the hub, or referred to where it is.

    A folder is not copied unless a chat template is laid over it: the manifest then refers to it, and its
    content hashes are the artifact's identity.

    Returns:
        The model (float32, on the CPU) and the record for the manifest.

    Raises:
        InvalidInput: it is no causal language model, or the hub cannot be reached.
    """
    import torch

    spec = job.pipeline.model
    place, card = plain_checkpoint(spec, Path(job.folder), work / MODEL)
    model = load_plain(place, torch.float32)
    load_tokenizer(place)
    _refuse_quantised(model, place)
    if broken := not_finite(model):
        raise InvalidInput(f"{place}: the base holds inf or nan in {broken}; fetch or copy its files anew")
    ids = probe.probe_ids(model)
    probe.record(work, ids, probe.plain_logits(model, ids))
    record: dict[str, Any] = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "origin": origin_of(spec, Path(job.folder), card).as_record(),
    }
    if place.parent != work:
        record["model_path"] = str(place)
    return model, record


def plain_checkpoint(spec: ModelSpec, folder: Path, place: Path) -> tuple[Path, Path | None]:
    """A model as the spec names it: brought to ``place``, unless it is a folder and nothing is laid over.

    Returns:
        Its folder, and the card that came with it from the hub.

    Raises:
        InvalidInput: it cannot be read or fetched, or its chat template may not be used.
    """
    card = None
    if spec.gguf is not None:
        convert_gguf(folder / spec.gguf, place)
    elif spec.hub is not None:
        code = ["*.py"] if spec.allow_remote_code is not None else []
        snapshot = _snapshot(spec.hub, str(spec.revision), [CARD, *code])
        card = snapshot / CARD
        shutil.copytree(snapshot, place, dirs_exist_ok=True, ignore=shutil.ignore_patterns(CARD))
    elif spec.chat_template is not None:
        pickles = shutil.ignore_patterns(*(f"*{ending}" for ending in PICKLES))
        shutil.copytree(folder / str(spec.path), place, dirs_exist_ok=True, ignore=pickles)
    else:
        place = (folder / str(spec.path)).resolve()
    if spec.chat_template is not None:
        tokenizer = load_tokenizer(place)
        tokenizer.chat_template = read_template(folder / spec.chat_template)
        tokenizer.save_pretrained(place)
    for file, text in folder_templates(place):
        check_template(file, text, spec.template_date)
    return place, card


def _snapshot(hub: str, revision: str, beside: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub, revision=revision, allow_patterns=[*MODEL_FILES, *beside]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise InvalidInput(
            f"model.hub: {hub}@{revision[:8]} cannot be fetched ({error}); check the id and the revision, log in "
            "for a gated model (HF_TOKEN), or download it and name the folder by model.path"
        ) from error


def _refuse_quantised(model: Any, place: Path) -> None:
    if getattr(model.config, "quantization_config", None) is not None:
        raise InvalidInput(
            f"{place}: the base is quantised already; name the original weights (method qlora quantises by itself)"
        )
