"""Resumable checkpoints inside a stage: one counts only when it is sealed and every byte is as sealed."""

import json
import re
import shutil
from pathlib import Path

from stages.artifact import files_below, set_aside, sha256, sync, write_json
from stages.errors import StageFailed
from stages.log import info

SEAL = "seal.json"
_NAME = re.compile(r"checkpoint-(\d+)$")


def seal(checkpoint: Path) -> None:
    """Mark a checkpoint as whole: its files on the disk, their hashes in the seal, the seal last."""
    files = {}
    for folder in [path for path in checkpoint.rglob("*") if path.is_dir()]:
        sync(folder)
    for path in files_below(checkpoint):
        name = str(path.relative_to(checkpoint))
        if name != SEAL:
            sync(path)
            files[name] = sha256(path)
    write_json(checkpoint / SEAL, files)


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint is sealed and undamaged."""
    try:
        files = json.loads((checkpoint / SEAL).read_text(encoding="utf-8"))
        present = {str(path.relative_to(checkpoint)) for path in files_below(checkpoint)} - {SEAL}
    except (OSError, ValueError, StageFailed):
        return False
    if not isinstance(files, dict):
        return False
    return present == set(files) and all(sha256(checkpoint / name) == sha for name, sha in files.items())


def step_of(checkpoint: Path) -> int:
    """The optimizer step that a checkpoint was written at."""
    match = _NAME.search(checkpoint.name)
    return int(match.group(1)) if match else -1


def by_step(folder: Path) -> list[Path]:
    """The checkpoints in ``folder``, the newest step first, whole or not. Clocks play no part."""
    found = [path for path in folder.glob("checkpoint-*") if _NAME.search(path.name)]
    return sorted(found, key=step_of, reverse=True)


def newest_whole(folder: Path) -> Path | None:
    """The checkpoint to resume from; torn and damaged ones are set aside and named in the log."""
    for checkpoint in by_step(folder):
        if is_whole(checkpoint):
            return checkpoint
        info(f"checkpoint {checkpoint.name} is torn or damaged; set aside as {set_aside(checkpoint)}")
    return None


def newest_step(folder: Path) -> int:
    """The step that a resume would start from, by the seals' presence alone; 0 where there is none."""
    return max((step_of(path) for path in by_step(folder) if (path / SEAL).is_file()), default=0)


def prune(folder: Path, keep: int) -> None:
    """Delete all but the ``keep`` newest sealed checkpoints."""
    sealed = [path for path in by_step(folder) if (path / SEAL).is_file()]
    for checkpoint in sealed[keep:]:
        # The seal goes first: what a crash leaves of a half-deleted checkpoint must not look whole.
        (checkpoint / SEAL).unlink()
        shutil.rmtree(checkpoint)
