"""What the bits of a training step depend on beside its inputs; kept in every checkpoint, so that a resume can tell."""

from pathlib import Path
from typing import Any

from stages.documents import read_json, write_json
from stages.errors import InvalidInput
from stages.log import info
from stages.objective import ObjectiveSpec

FILE = "conditions.json"
MEMORY_ONLY = ("micro_batch_size", "gradient_checkpointing")
"""Settings of `train` that trade memory for time: stages that differ only there go on from each other's checkpoints."""

Span = dict[str, Any]
"""The conditions of the steps from ``from_step`` on, until the next span's."""


def conditions(stage: ObjectiveSpec) -> dict[str, Any]:
    """What this process would train a stage under: the device, its threads, and how a batch is cut up."""
    import torch

    gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if gpu else f"CPU, {torch.backends.cpu.get_cpu_capability()}",
        "threads": None if gpu else torch.get_num_threads(),
        **{name: getattr(stage.train, name) for name in MEMORY_ONLY},
    }


def resumed(checkpoint: Path | None, step: int, now: dict[str, Any]) -> list[Span]:
    """The spans of a run that goes on at ``checkpoint``; where its conditions were others, the log says what follows.

    Args:
        checkpoint: a whole one, or None for a run from the beginning.
        step: the last step of the checkpoint.
        now: the conditions of the steps to come.
    """
    spans = [] if checkpoint is None else _kept(checkpoint)
    if changed := _changed(spans, now):
        info(
            f"resuming under other conditions ({changed}): the same rows and the same arithmetic, so the result is "
            "equal within rounding but not bit for bit, and dropout may draw other masks"
        )
    if spans and {"from_step": spans[-1].get("from_step"), **now} == spans[-1]:
        return spans
    return [*spans, {"from_step": step + 1, **now}]


def cut_up_otherwise(checkpoint: Path, stage: ObjectiveSpec) -> str:
    """Which of the settings that trade memory for time a checkpoint was trained with otherwise; empty where none."""
    return _changed(_kept(checkpoint), {name: getattr(stage.train, name) for name in MEMORY_ONLY})


def keep(spans: list[Span], checkpoint: Path) -> None:
    """Write the spans into a checkpoint, before it is sealed."""
    write_json(checkpoint / FILE, spans)


def _changed(spans: list[Span], now: dict[str, Any]) -> str:
    then = spans[-1] if spans else {}
    return ", ".join(f"{name} {then[name]} -> {now[name]}" for name in now if name in then and then[name] != now[name])


def _kept(checkpoint: Path) -> list[Span]:
    try:
        found = read_json(checkpoint / FILE)
    except InvalidInput:
        return []  # a checkpoint of before, or one that its seal will refuse
    return [span for span in found if isinstance(span, dict)] if isinstance(found, list) else []
