"""Resumable checkpoints inside a stage: one counts only when it is sealed and every byte is as sealed."""

import re
import shutil
from pathlib import Path
from typing import NamedTuple

from stages.artifact import files_below, set_aside, sha256
from stages.documents import read_json, sync, write_json
from stages.errors import InvalidInput, StageFailed
from stages.log import info

SEAL = "seal.json"
_NAME = re.compile(r"checkpoint-(\d+)$")


class Resume(NamedTuple):
    """Where a run goes on, and how far the one before it may have come."""

    checkpoint: Path | None
    """The newest whole checkpoint; None where the run starts at its beginning."""
    reached: int
    """No step after this one had been taken."""

    @property
    def step(self) -> int:
        """The last step that is not trained again."""
        return 0 if self.checkpoint is None else step_of(self.checkpoint)

    def line(self, total: int) -> str:
        """What a resume costs, for people; empty where nothing was there to lose.

        Args:
            total: the optimizer steps of the whole run.
        """
        again = min(self.reached, total) - self.step
        if self.checkpoint is None:
            return f"starting over at step 1 of {total}: no whole checkpoint is left" if self.reached else ""
        if again <= 0:
            return f"resuming at step {self.step} of {total}: no step is trained again"
        steps = "1 step is" if again == 1 else f"{again} steps are"
        return f"resuming at step {self.step} of {total}: at most {steps} trained again"


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
    sync(checkpoint.parent)
    write_json(checkpoint / SEAL, files)


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, or None where it is sealed and every byte is as sealed."""
    if not (checkpoint / SEAL).is_file():
        return "torn: the process ended before it was sealed"
    try:
        files = read_json(checkpoint / SEAL, strict=True)
        present = {str(path.relative_to(checkpoint)) for path in files_below(checkpoint)} - {SEAL}
    except InvalidInput:
        files = None
    except (OSError, StageFailed) as error:
        return f"damaged: {error}"
    if not isinstance(files, dict):
        return f"damaged: {SEAL} is no seal"
    for name in sorted(present ^ set(files)):
        return f"damaged: {name} {'is missing' if name in files else 'does not belong there'}"
    for name, sha in files.items():
        if sha256(checkpoint / name) != sha:
            return f"damaged: {name} was changed since it was sealed"
    return None


def step_of(checkpoint: Path) -> int:
    """The optimizer step that a checkpoint was written at."""
    match = _NAME.search(checkpoint.name)
    return int(match.group(1)) if match else -1


def by_step(folder: Path) -> list[Path]:
    """The checkpoints in ``folder``, the newest step first, whole or not. Clocks play no part."""
    found = [path for path in folder.glob("checkpoint-*") if _NAME.search(path.name)]
    return sorted(found, key=step_of, reverse=True)


def resume_from(folder: Path, every: int) -> Resume:
    """The checkpoint to resume from; torn and damaged ones are set aside, and the log says why.

    Args:
        folder: where a stage's checkpoints are; it need not exist.
        every: the steps between two checkpoints.
    """
    reached = 0
    for checkpoint in by_step(folder):
        if not reached:  # the newest: no step is taken while it is written; once it is sealed, up to `every` more
            reached = step_of(checkpoint) + (every if (checkpoint / SEAL).is_file() else 0)
        wrong = damage(checkpoint)
        if wrong is None:
            return Resume(checkpoint, reached)
        info(f"checkpoint {checkpoint.name} is {wrong}; set aside as {set_aside(checkpoint)}")
    return Resume(None, reached)


def newest_sealed(folder: Path) -> Path | None:
    """The checkpoint that a resume would start from, by the seals' presence alone."""
    return next((path for path in by_step(folder) if (path / SEAL).is_file()), None)


def newest_step(folder: Path) -> int:
    """The step of `newest_sealed`; 0 where there is none."""
    newest = newest_sealed(folder)
    return 0 if newest is None else step_of(newest)


def prune(folder: Path, keep: int) -> None:
    """Delete all but the ``keep`` newest sealed checkpoints."""
    sealed = [path for path in by_step(folder) if (path / SEAL).is_file()]
    for checkpoint in sealed[keep:]:
        # The seal goes first: what a crash leaves of a half-deleted checkpoint must not look whole.
        (checkpoint / SEAL).unlink()
        shutil.rmtree(checkpoint)
