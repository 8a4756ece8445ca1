"""What a library's exception means to a person: what ran out or broke, where, and what to do about it."""

import errno
import re
from collections.abc import Iterator
from pathlib import Path

from stages import checkpoint, disk
from stages.errors import StageFailed, TriviumError
from stages.job import STAGE, Job
from stages.objective import ObjectiveSpec

_FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file is larger than this process may write (ulimit -f, or a limit of the file system)",
}
_OS_ERROR = re.compile(r"\(os error (\d+)\)")
"""How Rust's libraries (safetensors, tokenizers) spell an errno."""
_TORN = re.compile(r"PytorchStreamWriter|inline_container\.cc.*unexpected pos", re.DOTALL)
"""What torch.save says when a write fails; it drops the reason."""
_MEMORY = re.compile(
    r"out of memory|can't allocate memory|cannot allocate memory|CUBLAS_STATUS_ALLOC_FAILED"
    r"|could not create a primitive",
    re.IGNORECASE,
)
"""The last one is oneDNN's on a CPU: a kernel for this shape finds no room for itself."""
_ASKED = re.compile(r"[Tt]ried to allocate ([\d.]+ ?\w+)")
_LONGEST = 2000


def explain(error: BaseException, job: Job | None = None, phase: str = "") -> TriviumError:
    """The error that ends a step, for people; one of ours is itself, unless memory or disk ran out beneath it.

    Args:
        error: what was raised.
        job: the step at work, as far as it was read.
        phase: what it was at: `load`, `train`, `merge`, `evaluate`, `release`.
    """
    for cause in _causes(error):
        if isinstance(cause, TriviumError):
            continue  # its words are not evidence: a stage's reason, and a row that is quoted, may speak of memory
        if (reason := _full(cause)) is not None:
            return StageFailed(_disk_message(cause, reason, job, phase))
        if _errno(cause) == errno.EROFS:
            return StageFailed(_read_only_message(cause, job, phase))
        if isinstance(cause, MemoryError) or _errno(cause) == errno.ENOMEM or _MEMORY.search(str(cause)):
            return StageFailed(_memory_message(cause, job, phase))
    if isinstance(error, TriviumError):
        return error
    return StageFailed(f"{type(error).__name__}: {error}"[:_LONGEST])


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and what it came from: loaders turn whatever happens to them into errors of ours."""
    one: BaseException | None = error
    seen: set[int] = set()
    while one is not None and id(one) not in seen:
        seen.add(id(one))
        yield one
        one = one.__cause__ or (None if one.__suppress_context__ else one.__context__)


def _errno(error: BaseException) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    found = _OS_ERROR.search(str(error))
    return None if found is None else int(found.group(1))


def _full(error: BaseException) -> str | None:
    """Why nothing more could be written; None where that is not what happened."""
    if isinstance(error, RuntimeError) and _TORN.search(str(error)):
        return "a write broke off, as on a full disk"
    number = _errno(error)
    return None if number is None else _FULL.get(number)


def _disk_message(error: BaseException, reason: str, job: Job | None, phase: str) -> str:
    named = getattr(error, "filename", None)
    place = Path(str(named)) if named else _being_written(job, phase)
    if place is None:
        return f"{reason} ({error}); free space, then run again"
    available, there = disk.free(place)
    needed = _about_needed(job, phase)
    room = f"{disk.size(available)} are free in {there}" + (f", about {disk.size(needed)} are needed" if needed else "")
    return (
        f"{_who(job, phase)}{reason}: {place} cannot be written ({room}). What is published is whole. Free space "
        "(`trivium gc` shows what can go) or keep the artifacts on a larger disk (--root FOLDER), then run "
        f"again{_goes_on(job)}"
    )


def _read_only_message(error: BaseException, job: Job | None, phase: str) -> str:
    named = getattr(error, "filename", None)
    place = named or _being_written(job, phase) or f"a file ({error})"
    return (
        f"{_who(job, phase)}{place} cannot be written: its file system is read-only. What is published is whole. Mount "
        f"it for writing, or keep the artifacts elsewhere (--root FOLDER), then run again{_goes_on(job)}"
    )


def _being_written(job: Job | None, phase: str) -> Path | None:
    if job is None:
        return None
    work = Path(job.work)
    if phase == "train":
        torn = [path for path in checkpoint.by_step(work / "checkpoints") if not (path / checkpoint.SEAL).is_file()]
        return torn[0] if torn else work / "checkpoints"
    return work / "output" if phase == "merge" else Path(job.target) if phase == "evaluate" else work


def _about_needed(job: Job | None, phase: str) -> int | None:
    """Bytes of what was being written: a checkpoint is as large as the last one, a merge as what it starts from."""
    if job is None or job.start is None:
        return None
    if phase == "train":
        newest = checkpoint.newest_sealed(Path(job.work) / "checkpoints")
        return None if newest is None else disk.bytes_below(newest)
    return disk.bytes_below(Path(job.start) / "model") or None if phase == "merge" else None


def _memory_message(error: BaseException, job: Job | None, phase: str) -> str:
    asked = _ASKED.search(str(error))
    tried = "" if asked is None else f" (it tried to allocate {_readable(asked.group(1))})"
    stage = _stage(job)
    train = (
        ""
        if stage is None or phase != "train"
        else (
            f", with {stage.train.micro_batch_size} sequence{'s'[: stage.train.micro_batch_size > 1]} of "
            f"{stage.train.sequence_length} tokens in a micro batch"
        )
    )
    remedies = "; ".join(f"({n}) {one}" for n, one in enumerate(_remedies(job, stage, phase), start=1))
    return (
        f"{_who(job, phase)}out of memory{train}{tried}. What helps, in this order: {remedies}. "
        f"Then run again{_goes_on(job)}"
    )


def _readable(amount: str) -> str:
    return disk.size(int(amount.split(maxsplit=1)[0])) if amount.endswith("bytes") else amount


def _remedies(job: Job | None, stage: ObjectiveSpec | None, phase: str) -> list[str]:
    """Three at most, the cheapest first; none is taken by itself, because most would change the result."""
    free_some = "end what else uses the memory of this machine, or take a larger one"
    if job is not None and phase == "evaluate":
        name = next((one.metric for one in job.measurements if not Path(one.file).exists()), None)
        metric = None if name is None else job.pipeline.metrics[name]
        if metric is None:
            return [free_some]
        return [
            f"lower metrics.{name}.batch_size (now {metric.batch_size})",
            f"lower metrics.{name}.sequence_length (now {metric.sequence_length}; the value depends on it)",
            free_some,
        ]
    if stage is None or phase not in ("train", "load"):
        return [free_some]
    train = stage.train
    found = []
    if phase == "train" and train.micro_batch_size > 1:
        found.append(
            f"lower train.micro_batch_size (now {train.micro_batch_size}; batch_size {train.batch_size} stays, so each "
            "step sees the same rows, and a rerun resumes)"
        )
    if phase == "train" and not train.gradient_checkpointing and stage.method.recomputes:
        found.append("set train.gradient_checkpointing: true (slower, the same result, and a rerun resumes)")
    if phase == "train":
        found.append(f"lower train.sequence_length (now {train.sequence_length}; the stage starts anew)")
    if train.weights_dtype == "float32" and stage.method.narrows and not stage.method.checkpoints_whole:
        found.append("set train.weights_dtype: bfloat16 (half of the frozen weights' memory; the stage starts anew)")
    if stage.method.narrows:
        found.append("use method qlora (a quarter of the weights' memory and less; the stage starts anew)")
    return [*found, free_some][:3]


def _stage(job: Job | None) -> ObjectiveSpec | None:
    return None if job is None or job.kind != STAGE else job.stage


def _who(job: Job | None, phase: str) -> str:
    if job is None:
        return ""
    kind = "stage " if job.kind == STAGE else ""
    return f"{kind}{job.name}{f', {phase}' if phase else ''}: "


def _goes_on(job: Job | None) -> str:
    """What a rerun keeps."""
    if job is None:
        return ""
    if Path(job.target).exists():
        return ": what is published is kept, only what was not measured is measured"
    step = checkpoint.newest_step(Path(job.work) / "checkpoints")
    return f": it resumes at step {step}" if step else ": it starts this step from its beginning"
