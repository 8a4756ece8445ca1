"""How many parameters each stage trains, counted exactly on the meta device: no weight is read or held.

A plan is free of torch, so what is not known yet is counted in one child process (``python -m stages.count``) and
kept beside the artifacts under a key of everything that it depends on: a second plan starts no process.
"""

import json
import os
import subprocess
import sys
from collections.abc import Collection
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specs.base import fingerprint, identity_fields
from stages.artifact import sha256
from stages.child import ChildFailed, ask
from stages.documents import read_json, read_object, write_json
from stages.errors import InvalidInput
from stages.identity import TRAINING_LIBRARIES, versions
from stages.methods.base import MethodSpec, Start
from stages.model import load_config, without_weights
from stages.pipeline import Pipeline
from stages.plan import Plan
from stages.preemption import die_with
from stages.remote_code import allowing

if TYPE_CHECKING:
    from transformers import PreTrainedModel

COUNTS = ".counts.json"
"""The file of known counts, in the folder of all artifacts."""
LATER = "trainable parameters: known once the base is prepared"
TIMEOUT = 600.0
"""Seconds after which the counting process is given up."""


@dataclass(frozen=True, slots=True)
class Count:
    """What one stage trains, or why that is not known."""

    trainable: int | None = None
    """Parameters that train, tied ones once."""
    parameters: int | None = None
    """Parameters of the model that the stage starts from, tied ones once."""
    refused: bool = False
    """Whether the method cannot serve this model; `reason` says why."""
    reason: str = ""

    def __str__(self) -> str:
        """One line for the plan."""
        if self.trainable is None or not self.parameters:
            return f"trainable parameters: not counted ({self.reason})"
        share = 100 * self.trainable / self.parameters
        percent = f"{share:.1f}" if share >= 1 else f"{share:.2g}"
        return f"trains {self.trainable:,} parameters; its start has {self.parameters:,} ({percent} %)"


def base_folder(plan: Plan) -> Path | None:
    """The folder of the base as a plain checkpoint; None while a GGUF or hub base is not prepared yet."""
    prepared = plan.steps[0].artifact
    if prepared is not None:
        return prepared.model
    named = plan.pipeline.model.path
    return None if named is None else (plan.folder / named).resolve()


def stage_counts(plan: Plan, *, compute: bool = True) -> dict[str, Count]:
    """The counts of the plan's stages by name: those that are kept, and with ``compute`` the others too.

    Empty while the base is not on disk. Counts that had to be made are kept in `COUNTS` below the plan's root.
    """
    base = base_folder(plan)
    if base is None or not (base / "config.json").is_file():
        return {}
    keys = _keys(plan, base)
    file = plan.store.parent / COUNTS
    kept = _kept(file)
    found = {name: Count(**kept[key]) for name, key in keys.items() if key in kept}
    wanted = sorted(set(keys) - set(found))
    if wanted and compute:
        made, lasting = _in_a_child(plan.chosen, plan.folder, base, wanted)
        found |= made
        if lasting:
            with suppress(OSError):  # a cache: what cannot be kept is counted again
                write_json(file, kept | {keys[name]: asdict(count) for name, count in made.items()})
    return {name: found[name] for name in keys if name in found}


def stage_lines(plan: Plan, counts: dict[str, Count]) -> dict[str, list[str]]:
    """What the plan says of each stage beside its reason: what trains, and what its method has to say."""
    base = base_folder(plan)
    config_file = None if base is None else base / "config.json"
    known = config_file is not None and config_file.is_file()
    config = read_object(config_file) if config_file is not None and known else {}
    lines: dict[str, list[str]] = {}
    for step in plan.steps:
        if step.stage is not None:
            count = [str(counts[step.name])] if step.name in counts else [] if known else [LATER]
            lines[step.name] = count + (step.stage.method.notes(config) if known else [])
    return lines


def count_stages(pipeline: Pipeline, folder: Path, base: Path, wanted: Collection[str]) -> dict[str, Count]:
    """Count on the meta device, in order: settings that a method changes are in the config of later stages.

    Args:
        pipeline: the spec.
        folder: what paths in the spec start from.
        base: the folder of the base; only its config is read.
        wanted: the names of the stages to count.
    """
    counts: dict[str, Count] = {}
    changed: dict[str, Any] = {}
    for stage in pipeline.stages:
        method = stage.method
        if stage.name not in wanted and not method.config_changes:
            continue
        start = Start(
            base,
            spec_folder=folder,
            seed=pipeline.seed_of(stage),
            sequence_length=stage.train.sequence_length,
        )
        try:
            model = meta_model(base, changed)
            counts[stage.name], after = count_method(method, model, start)
        except Exception as error:  # a library's reason is worth more than a plan that ends with a traceback
            reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
            counts[stage.name] = Count(reason=reason[:300])
            continue
        changed |= {name: after[name] for name in method.config_changes if name in after}
    return {name: count for name, count in counts.items() if name in wanted}


def refuse_later_stages(pipeline: Pipeline, folder: Path, stage: str, start: Path) -> None:
    """Hold the methods of all stages after ``stage`` against the model that it starts from, before it trains.

    Some refusals need the model's modules, which `validate` does not see: a chain must not learn of them half-way.

    Args:
        pipeline: the spec.
        folder: what paths in the spec start from.
        stage: the name of the stage that is about to train.
        start: the checkpoint that it starts from; only its config is read.

    Raises:
        InvalidInput: a later stage's method cannot serve this model.
    """
    names = [one.name for one in pipeline.stages]
    number = names.index(stage)
    rest = pipeline.model_copy(update={"stages": pipeline.stages[number:]})
    for name, count in count_stages(rest, folder, start, names[number + 1 :]).items():
        if count.refused:
            raise InvalidInput(f"stage {name}: {count.reason}")


def count_method(method: MethodSpec, model: "PreTrainedModel", start: Start) -> tuple[Count, dict[str, Any]]:
    """What ``method`` trains of a model on the meta device, and the settings of the model's config afterwards."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    try:
        prepared = method.prepare(model, start)
    except InvalidInput as error:
        return Count(parameters=parameters, refused=True, reason=str(error)), {}
    trainable = sum(
        parameter.numel()
        for name, parameter in prepared.model.named_parameters()
        if parameter.requires_grad and name in prepared.trainable
    )
    config = getattr(prepared.model, "config", None)
    return Count(trainable, parameters), {} if config is None else config.to_dict()


def meta_model(base: Path, changed: dict[str, Any] | None = None) -> "PreTrainedModel":
    """The model that a config describes, with shapes and without weights.

    Args:
        base: the folder of a checkpoint; only its config is read.
        changed: settings in which the model differs from that config.
    """
    import torch

    config = load_config(base)
    for name, value in (changed or {}).items():
        setattr(config, name, value)
    return without_weights(config, dtype=torch.float32)


def _keys(plan: Plan, base: Path) -> dict[str, str]:
    """A key for each stage's count, of everything that it depends on."""
    shared = {"config": sha256(base / "config.json"), "versions": versions(TRAINING_LIBRARIES), "code": _code()}
    before: list[Any] = []
    keys = {}
    for step in plan.steps:
        if step.stage is None:
            continue
        method = step.stage.method
        own = identity_fields(method) | {"files": [sha256(plan.folder / name) for name in method.files()]}
        keys[step.name] = fingerprint({**shared, "before": before.copy(), "method": own})
        if method.config_changes:
            before.append(own)
    return keys


@cache
def _code() -> str:
    """A fingerprint of what counts: this file and the methods."""
    files = [Path(__file__), *sorted((Path(__file__).parent / "methods").glob("*.py"))]
    return fingerprint([[file.name, sha256(file)] for file in files])


def _kept(file: Path) -> dict[str, dict[str, Any]]:
    try:
        return {key: asdict(Count(**value)) for key, value in read_json(file).items()}
    except (InvalidInput, TypeError, AttributeError):
        return {}


def _in_a_child(pipeline: Pipeline, folder: Path, base: Path, wanted: list[str]) -> tuple[dict[str, Count], bool]:
    """The counts that a process of its own makes, and whether they would come out the same again."""
    request = {
        "pipeline": pipeline.model_dump(mode="json", exclude_unset=True),
        "folder": str(folder),
        "base": str(base),
        "stages": wanted,
    }
    try:
        found = ask("stages.count", request, {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}, TIMEOUT)
    except subprocess.TimeoutExpired:
        return dict.fromkeys(wanted, Count(reason=f"not done within {TIMEOUT:.0f} s")), False
    except ChildFailed as error:
        reason = f"the counting process ended with {error.code}: {error.complaint}"[:300]
        return dict.fromkeys(wanted, Count(reason=reason)), False
    return {name: Count(**value) for name, value in found.items()}, True


def main() -> int:
    """Count what a request on stdin asks for; the last line on stdout is the answer."""
    die_with(os.getppid())
    request = json.loads(sys.stdin.read())
    pipeline = Pipeline.model_validate_json(json.dumps(request["pipeline"]))
    with allowing(pipeline.model.allow_remote_code):
        counts = count_stages(pipeline, Path(request["folder"]), Path(request["base"]), request["stages"])
    print(json.dumps({name: asdict(count) for name, count in counts.items()}))  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
