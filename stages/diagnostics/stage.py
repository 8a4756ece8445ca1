"""The diagnostics of a stage: made when it is, or later for one that was published without."""

from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from stages.artifact import Artifact, find, step_of
from stages.diagnostics.lineage import directions
from stages.diagnostics.planned import Planned, planned_of, selected_in
from stages.diagnostics.update import FILE, FORMAT, Depth, diagnose, distance, nothing
from stages.diagnostics.weights import Weights, of_checkpoint, of_model
from stages.documents import read_object, read_sealed, write_sealed
from stages.errors import InvalidInput
from stages.layout import read_layout
from stages.methods.base import MethodSpec
from stages.serving import method_of

LATER = ".diagnostics"
"""Beside the artifacts: the diagnostics of those that were published without."""
TRAINABLE = "trainable"
"""The entry of ``training.json`` with the names of the parameters that trained; the oldest have none."""


class Preparation(NamedTuple):
    """What is known of how a method prepared its model."""

    trainable: Collection[str]
    """Names of the parameters that trained; empty where they were not kept."""
    record: Mapping[str, Any]
    """What the method kept: Spectrum, what it selected."""


def diagnose_stage(
    name: str, method: MethodSpec, preparation: Preparation, parent: Artifact, model: Path, depth: Depth
) -> dict[str, Any]:
    """What a stage changed, and how that lies beside what the stages before it changed.

    Args:
        name: of the stage.
        method: how it adapted its start.
        preparation: what is known of what was to train.
        parent: what it started from.
        model: the plain checkpoint that came of it.
        depth: whether decompositions are made.

    Returns:
        The document that `stages.diagnostics` describes.
    """
    if not method.mergeable:
        return nothing(f"method {method.kind} changes no weights of the model: what it trained stays beside it", depth)
    before = dequantised = _dequantised(method, parent.model)
    if before is None:
        before = of_checkpoint(parent.model)
    # Where what quantising changed is in the numbers, it is everywhere, planned or not.
    comparable = method.starts_exactly or dequantised is not None
    found = diagnose(before, model, depth, _planned(preparation, model) if comparable else None)
    if dequantised is not None:
        found["against"] = "dequantised start"
        found["rounding"] = distance(of_checkpoint(parent.model), dequantised)
    elif not method.starts_exactly and method.beneath:
        found["against"] = "start, so what quantising it changed is in the numbers"
    stages = _line(parent)
    names = [str(step_of(one.path)) for one in stages[1:]]
    found["lineage"] = directions([*names, name], [*(one.model for one in stages), model])
    return found


def diagnostics_of(artifact: Artifact) -> dict[str, Any] | None:
    """The diagnostics of a published stage, wherever they are kept; None where nobody made them.

    What is kept beside the artifact, by `diagnose_later`, goes first where it is whole: it was asked for.
    """
    for read, file in ((read_sealed, _later(artifact)), (read_object, artifact.path / FILE)):
        if file.is_file():
            with suppress(InvalidInput):  # torn, or changed by hand: it is made anew
                found = read(file)
                if isinstance(found, dict) and found.get("format") == FORMAT:
                    return found
    return None


def diagnose_later(artifact: Artifact, depth: Depth = "spectra") -> dict[str, Any]:
    """The diagnostics of a stage that was published without; kept beside the artifacts.

    Raises:
        InvalidInput: what it started from is gone, or its method is one of another version.
    """
    parent = find(artifact.path.parent, artifact.manifest["inputs"]["parent"])
    if parent is None:
        raise InvalidInput(f"{artifact.path}: what it started from is gone; `trivium run` on the spec makes it anew")
    method = method_of(artifact)
    kept = read_object(artifact.path / "training.json")
    preparation = Preparation(kept.get(TRAINABLE, ()), kept.get("method", {}))
    found = diagnose_stage(str(step_of(artifact.path)), method, preparation, parent, artifact.model, depth)
    write_sealed(_later(artifact), found)
    return found


def _planned(preparation: Preparation, model: Path) -> Planned | None:
    if not preparation.trainable and selected_in(preparation.record) is None:
        return None
    return planned_of(preparation.trainable, preparation.record, of_checkpoint(model))


def _later(artifact: Artifact) -> Path:
    return artifact.path.parent / LATER / f"{artifact.identity[:16]}.json"


def _dequantised(method: MethodSpec, start: Path) -> Weights | None:
    """The start as a quantised method saw it, where that is no part of what it trained; None for all others."""
    import torch

    if method.starts_exactly or not method.beneath or not method.kept_for_start:
        return None
    return of_model(method.load_beneath(start, torch.float32), read_layout(start))


def _line(artifact: Artifact) -> list[Artifact]:
    """The artifact and all that it came from, the base first."""
    found = [artifact]
    while (parent := found[0].manifest["inputs"].get("parent")) is not None:
        above = find(artifact.path.parent, parent)
        if above is None:
            break
        found.insert(0, above)
    return found
