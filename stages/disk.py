"""How much disk the pending steps need at their peak, and how much there is: asked before anything starts.

What a stage writes was measured (a test holds the estimate against it). While it trains, its checkpoints: what trains
in float32 and its optimizer's states, and the whole model where no adapter of its own holds what trains. At its end
the newest checkpoints are still there beside the merged model in float32, which stays.
"""

import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from stages.artifact import model_files
from stages.count import Count, base_folder
from stages.errors import StageFailed
from stages.layout import read_layout
from stages.objective import ObjectiveSpec
from stages.plan import RELEASE, Plan, Step

FLOAT32 = 4
STATE_BYTES = {"adamw": 8, "paged_adamw": 8, "adamw_8bit": 2, "paged_adamw_8bit": 2, "adafactor": 0, "sgd": 0}
"""Bytes that an optimizer keeps per trained parameter; adafactor's rows and columns are too few to count."""
SMALL_FILES = 50_000
"""Bytes of what is small in a checkpoint (generators, arguments, log) or in a base's or the release's artifact."""
BESIDE_WEIGHTS = 80_000
"""Bytes of what is small in a stage's artifact: plots, probe, manifest, data report, diagnostics."""
ENOUGH = 1.05
"""Headers, logs and file systems take a little more than the bytes of the weights."""
_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


@dataclass(frozen=True, slots=True)
class Model:
    """What of the base decides the size of everything that is made from it."""

    parameters: int
    beside: int
    """Bytes of tokenizer, config and chat template."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """What the pending steps need, beyond what they have written already."""

    needed: int
    """Bytes at the peak."""
    free: int
    """Bytes that are free on the file system of ``place``."""
    place: Path
    parts: tuple[str, ...]
    """The arithmetic, a line per step."""
    complete: bool
    """Whether all that trains is counted; if not, more is needed than this."""

    @property
    def fits(self) -> bool:
        """Whether there is room."""
        return self.needed <= self.free

    def __str__(self) -> str:
        """The line of a plan."""
        about = "about" if self.complete else "at least"
        return f"disk: {about} {size(self.needed)} needed at the peak, {size(self.free)} free in {self.place}"


def size(number: float) -> str:
    """Bytes as people read them: 3.2 GB."""
    for unit, name in _UNITS:
        if number >= unit:
            return f"{number / unit:.3g} {name}"
    return f"{int(number)} bytes"


def free(place: Path) -> tuple[int, Path]:
    """The bytes that are free where ``place`` is or will be, and the nearest folder above it that exists."""
    there = next(folder for folder in (place, *place.parents) if folder.exists())
    return shutil.disk_usage(there).free, there


def checkpoint_size(stage: ObjectiveSpec, model: Model, trained: int) -> int:
    """Bytes of one resumable checkpoint.

    Args:
        stage: as the spec has it.
        model: what it starts from.
        trained: parameters that train.
    """
    weights = FLOAT32 * trained
    if stage.method.checkpoints_whole:
        held = 2 if stage.train.weights_dtype == "bfloat16" else FLOAT32 if stage.method.narrows else 1
        weights += held * (model.parameters - trained)
    return weights + STATE_BYTES[stage.train.optimizer] * trained + model.beside + SMALL_FILES


def stage_sizes(stage: ObjectiveSpec, model: Model, trained: int) -> tuple[int, int]:
    """Bytes of a stage at its peak, and of what stays of it.

    While a checkpoint is written, those that it will replace are still there.
    """
    train = stage.train
    written = math.inf if train.max_steps is None else math.ceil(train.max_steps / train.checkpoint_every)
    adapter = 0 if stage.method.checkpoints_whole else FLOAT32 * trained
    kept = BESIDE_WEIGHTS + adapter
    if stage.method.mergeable:
        kept += FLOAT32 * model.parameters + model.beside
    one = checkpoint_size(stage, model, trained)
    training = one * int(min(written, train.keep_checkpoints + 1))
    merging = one * int(min(written, train.keep_checkpoints)) + kept
    return max(training, merging), kept


def estimate(plan: Plan, counts: Mapping[str, Count]) -> Estimate | None:
    """What the pending steps of a plan need at their peak; None while the base is not there to be measured.

    Args:
        plan: what is published and what is not.
        counts: what each stage trains, as far as it is counted.
    """
    base = base_folder(plan)
    if base is None or not (base / "config.json").is_file():
        return None
    model = Model(
        parameters=sum(math.prod(tensor.shape) for tensor in read_layout(base).tensors),
        beside=sum(file.stat().st_size for file in model_files(base) if file.suffix != ".safetensors"),
    )
    peak, stays, parts, complete = 0, 0, [], True
    for step in plan.steps:
        if step.artifact is not None:
            continue
        trained = _trained(step, model, counts)
        complete = complete and trained is not None
        most, kept = _step_sizes(plan, step, model, trained or 0)
        there = bytes_below(step.work)
        peak = max(peak, stays + max(0, most - there))
        parts.append(f"  {step.name}: {size(most)} while it works, {size(kept)} of it stay" + _already(there))
        stays += kept
    available, place = free(plan.store)
    return Estimate(int(ENOUGH * peak), available, place, tuple(parts), complete)


def bytes_below(folder: Path) -> int:
    """The bytes of all files in a folder and its folders; 0 where it is not there."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def refuse_if_full(found: Estimate | None) -> None:
    """Refuse to start what cannot end.

    Raises:
        StageFailed: the pending steps need more disk than there is; with the arithmetic.
    """
    if found is not None and not found.fits:
        arithmetic = "\n".join(found.parts)
        raise StageFailed(
            f"{found}: not enough, so nothing is started\n{arithmetic}\nFree {size(found.needed - found.free)} "
            "(`trivium gc` shows what can go), lower train.keep_checkpoints, or keep the artifacts on a larger disk "
            "(--root FOLDER)"
        )


def _trained(step: Step, model: Model, counts: Mapping[str, Count]) -> int | None:
    """The parameters that a step trains; None where that is not counted yet."""
    if step.stage is None:
        return 0
    count = counts.get(step.name)
    if count is not None and count.trainable is not None:
        return count.trainable
    return model.parameters if step.stage.method.kind == "full" else None


def _step_sizes(plan: Plan, step: Step, model: Model, trained: int) -> tuple[int, int]:
    if step.stage is not None:
        return stage_sizes(step.stage, model, trained)
    if step.name == RELEASE:
        whole = (FLOAT32 if plan.pipeline.model.dtype == "float32" else 2) * model.parameters + model.beside
        return (whole + SMALL_FILES,) * 2
    copied = sum(file.stat().st_size for file in model_files(base_folder(plan) or Path())) if _is_copied(plan) else 0
    return (copied + SMALL_FILES,) * 2


def _is_copied(plan: Plan) -> bool:
    """Whether the base step writes a model of its own: a folder is only referred to, unless a template is laid over."""
    return plan.pipeline.model.path is None or plan.pipeline.model.chat_template is not None


def _already(there: int) -> str:
    return f" ({size(there)} are there already)" if there else ""
