"""The diagnostics of a stage: made when it is, or later for one that was published without."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from stages.artifact import Artifact, find, step_of
from stages.diagnostics.lineage import directions
from stages.diagnostics.update import FILE, FORMAT, Depth, diagnose, distance, nothing, selected_in
from stages.diagnostics.weights import Weights, of_checkpoint, of_model
from stages.documents import read_object, write_json
from stages.errors import InvalidInput
from stages.layout import read_layout
from stages.methods import Method
from stages.methods.base import MethodSpec

LATER = ".diagnostics"
"""Beside the artifacts: the diagnostics of those that were published without."""
_METHOD: TypeAdapter[MethodSpec] = TypeAdapter(Method)


def diagnose_stage(
    name: str, method: MethodSpec, method_record: Mapping[str, Any], parent: Artifact, model: Path, depth: Depth
) -> dict[str, Any]:
    """What a stage changed, and how that lies beside what the stages before it changed.

    Args:
        name: of the stage.
        method: how it adapted its start.
        method_record: what the method kept of its preparation: what it selected.
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
    found = diagnose(before, model, depth, selected_in(method_record))
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
    """The diagnostics of a published stage, wherever they are kept; None where nobody made them."""
    for file in (artifact.path / FILE, _later(artifact)):
        if file.is_file():
            try:
                found = read_object(file)
            except InvalidInput:
                continue
            if found.get("format") == FORMAT:
                return found
    return None


def diagnose_later(artifact: Artifact, depth: Depth = "spectra") -> dict[str, Any]:
    """The diagnostics of a stage that was published without; kept beside the artifacts.

    Raises:
        InvalidInput: what it started from is gone, or its method is one of another version.
    """
    inputs = artifact.manifest["inputs"]
    parent = find(artifact.path.parent, inputs["parent"])
    if parent is None:
        raise InvalidInput(f"{artifact.path}: what it started from is gone; `trivium run` on the spec makes it anew")
    try:
        method = _METHOD.validate_python(inputs["stage"]["method"], strict=False)
    except ValidationError as error:
        raise InvalidInput(f"{artifact.path}: was made by another version of its method: {error}") from error
    record = read_object(artifact.path / "training.json").get("method", {})
    found = diagnose_stage(str(step_of(artifact.path)), method, record, parent, artifact.model, depth)
    write_json(_later(artifact), found)
    return found


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
