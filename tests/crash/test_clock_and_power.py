"""A clock that jumps decides nothing; what was said to be kept is still there when the power goes."""

import os
import shutil
import time
from pathlib import Path
from typing import NamedTuple

import pytest
from crashing import after, checkpoints, disturb, killed, result, stage_job
from tiny import write_data, write_model

from stages import checkpoint, evaluate, make
from stages.artifact import set_aside
from stages.checkpoint import SEAL, by_step, step_of
from stages.errors import TryAgain
from stages.job import Job
from stages.lock import exclusive
from stages.run import run_job

pytestmark = [pytest.mark.model, pytest.mark.crash]

TEN_YEARS = 10 * 365 * 86400.0
STAGE = """
kind: ift
method: {kind: lora, rank: 4, dropout: 0.1}
data: [{path: data/instructions.jsonl}]
train: {max_steps: 5, checkpoint_every: 1, batch_size: 2, learning_rate: 1e-2, schedule: constant, sequence_length: 64}
"""
METRICS = "metrics: {it: {kind: perplexity, data: {path: data/instructions.heldout.jsonl}, sequence_length: 64}}\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    write_model(folder / "base")
    write_data(folder)
    stage_job(folder, folder / "prepared", STAGE, METRICS)
    return folder


@pytest.fixture
def job(folder, tmp_path) -> Job:
    return stage_job(folder, Path(shutil.copytree(folder / "prepared", tmp_path / "runs")), STAGE, METRICS)


# The clock


def set_back(folder: Path) -> None:
    """Give everything below a time of change that says the opposite of the order in which it was made."""
    for number, path in enumerate(sorted(folder.rglob("*"), key=lambda path: path.stat().st_mtime_ns)):
        os.utime(path, (1e9 - number, 1e9 - number))


def jump(monkeypatch, seconds: float) -> None:
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + seconds)


@pytest.mark.parametrize("years", [1, -1])
def test_a_clock_that_jumps_ten_years_changes_nothing(years, job, monkeypatch):
    run_job(job)
    wanted = result(job)
    set_aside(Path(job.target))
    disturb()

    def tamper(here):
        seal = checkpoint.seal

        def seal_and_set_back(place):
            seal(place)
            set_back(checkpoints(job))

        checkpoint.seal = seal_and_set_back
        after(checkpoint, "prune", 4)(here)

    with monkeypatch.context() as patch:
        jump(patch, years * TEN_YEARS)
        killed(tamper, lambda: run_job(job))
    assert [step_of(path) for path in by_step(checkpoints(job))] == [4, 3]
    ages = [path.stat().st_mtime for path in by_step(checkpoints(job))]
    assert ages == sorted(ages)  # the newest looks oldest
    jump(monkeypatch, -years * TEN_YEARS)
    run_job(job)
    found = result(job)
    assert found.record == wanted.record | {"resumed_at": 4}
    assert found.weights == wanted.weights


@pytest.mark.parametrize("years", [1, -1])
def test_a_lock_knows_no_clock(years, tmp_path, monkeypatch):
    path = tmp_path / "a.lock"
    with exclusive(path):
        os.utime(path, (0, 0))
        jump(monkeypatch, years * TEN_YEARS)
        with pytest.raises(TryAgain, match=f"process {os.getpid()} on"), exclusive(path):
            pytest.fail("two holders of one lock")


# The power


class Change(NamedTuple):
    """One thing that happened to the disk."""

    kind: str
    path: Path


@pytest.fixture
def disk(monkeypatch) -> list[Change]:
    """Every folder that is made, every name that appears by a rename, and everything that is flushed, in order."""
    seen: list[Change] = []
    mkdir, rename, replace, fsync = os.mkdir, os.rename, os.replace, os.fsync

    def note(kind, real, which):
        def noted(*arguments, **named):
            found = real(*arguments, **named)
            seen.append(Change(kind, Path(arguments[which])))
            return found

        return noted

    def note_fsync(descriptor):
        fsync(descriptor)
        seen.append(Change("fsync", Path(f"/proc/self/fd/{descriptor}").readlink()))

    monkeypatch.setattr(os, "mkdir", note("new", mkdir, 0))
    monkeypatch.setattr(os, "rename", note("new", rename, 1))
    monkeypatch.setattr(os, "replace", note("new", replace, 1))
    monkeypatch.setattr(os, "fsync", note_fsync)
    return seen


def names_at_risk(path: Path, disk: list[Change]) -> list[Path]:
    """What a power cut at this moment could take of a path: names that appeared and whose folder was not flushed."""
    lost = []
    for one in (path, *path.parents):
        made = max((number for number, change in enumerate(disk) if change == Change("new", one)), default=None)
        if made is not None and Change("fsync", one.parent) not in disk[made:]:
            lost.append(one)
    return lost


def test_what_is_said_to_be_kept_survives_a_power_cut(job, disk, monkeypatch):
    looked_at = []

    def look_after(owner, name, kept):
        real = getattr(owner, name)

        def looking(*arguments, **named):
            found = real(*arguments, **named)
            path = kept(*arguments)
            assert path.exists()
            assert names_at_risk(path, disk) == []
            looked_at.append(name)
            return found

        monkeypatch.setattr(owner, name, looking)

    look_after(checkpoint, "seal", lambda place: place / SEAL)
    look_after(make, "publish", lambda work, target, **_: target)
    look_after(evaluate, "save", lambda evaluation, path, identity: path)
    run_job(job)
    assert looked_at == ["seal"] * 5 + ["publish", "save"]


def test_every_byte_of_a_checkpoint_is_on_the_disk_before_its_seal_has_its_name(job, disk, monkeypatch):
    sealed = []
    seal = checkpoint.seal

    def look(place):
        seal(place)
        named = disk.index(Change("new", place / SEAL))
        files = {path for path in place.rglob("*") if path.is_file() and path.name != SEAL}
        assert len(files) > 5
        assert {Change("fsync", path) for path in files} <= set(disk[:named])
        sealed.append(place.name)

    monkeypatch.setattr(checkpoint, "seal", look)
    run_job(job)
    assert sealed == [f"checkpoint-{step}" for step in range(1, 6)]
