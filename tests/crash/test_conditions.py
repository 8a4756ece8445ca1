"""A run that goes on under other conditions, smaller micro-batches above all: the same rows, the same sums, said."""

from pathlib import Path

import pytest
import torch
from crashing import before, checkpoints, disturb, killed, result, stage_job
from tiny import write_data, write_model
from transformers import Trainer

from stages import checkpoint, conditions, make
from stages.artifact import set_aside
from stages.errors import TryAgain
from stages.job import Job
from stages.lock import exclusive
from stages.plan import make_plan
from stages.run import run_job

pytestmark = [pytest.mark.model, pytest.mark.crash]

STEPS = 5
STAGES = {
    "cpt": ("kind: full", "data/corpus.jsonl, weight: 0.6", "sequence_length: 48"),
    "ift": ("kind: lora, rank: 4", "data/instructions.jsonl, weight: 0.25", "sequence_length: 64, packing: false"),
    "dpo": ("kind: lora, rank: 4", "data/pairs.jsonl, weight: 0.25", "sequence_length: 64"),
}
"""Rows that fill no whole number of batches, passed more than once; in IFT of different lengths."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    write_model(folder / "base")
    write_data(folder)
    return folder


@pytest.fixture
def job(folder, tmp_path):
    """A function: the job of an objective's stage, cut into micro-batches of a size."""

    def make(objective: str, micro: int, more: str = "") -> Job:
        method, data, train = STAGES[objective]
        return stage_job(
            folder,
            tmp_path / "runs",
            f"""
kind: {objective}
method: {{{method}}}
data: [{{path: {data}}}]
train: {{max_steps: {STEPS}, batch_size: 4, micro_batch_size: {micro}, checkpoint_every: 2, learning_rate: 5e-3,
        precision: float32, {train}{more}}}
""",
        )

    return make


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    """A fifth of such a run went into drawing its loss."""
    monkeypatch.setattr(make, "_draw", lambda *_: None)


def killed_in_step(step: int, job: Job, micro_batches: int) -> None:
    killed(before(Trainer, "training_step", (step - 1) * micro_batches + 1), lambda: run_job(job))
    disturb()


def planned(job: Job) -> str:
    root = Path(job.target).parents[1]
    return make_plan(job.pipeline, Path(job.folder), root, until="only").steps[1].reason


@pytest.mark.parametrize("objective", STAGES)
@pytest.mark.parametrize(("first", "then"), [(4, 1), (1, 2)])
def test_a_rerun_with_other_micro_batches_goes_on_with_the_same_rows(objective, first, then, job, capfd):
    whole = job(objective, first)
    run_job(whole)
    wanted = result(whole)
    set_aside(Path(whole.target))
    killed_in_step(4, job(objective, first), 4 // first)
    rerun = job(objective, then)
    assert rerun.target != whole.target
    assert planned(rerun) == (
        f"never run; resumes at step 2 (micro_batch_size {first} -> {then}: equal within rounding, not bit for bit)"
    )
    capfd.readouterr()
    run_job(rerun)
    found = result(rerun)
    assert found.record["resumed_at"] == 2
    losses = [[entry["loss"] for entry in one.curve] for one in (wanted, found)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert found.record["conditions"] == [
        wanted.record["conditions"][0],
        wanted.record["conditions"][0] | {"from_step": 3, "micro_batch_size": then},
    ]
    told = capfd.readouterr().err
    assert f"resuming under other conditions (micro_batch_size {first} -> {then}): the same rows" in told
    assert "equal within rounding but not bit for bit" in told
    assert "at most 2 steps are trained again" in told


def test_micro_batches_that_change_twice_are_each_recorded_where_they_began(job):
    whole = job("ift", 4)
    run_job(whole)
    wanted = result(whole)
    set_aside(Path(whole.target))
    killed_in_step(4, job("ift", 4), 1)
    killed_in_step(3, job("ift", 2), 2)  # its third step: it resumed at step 2
    rerun = job("ift", 1)
    run_job(rerun)
    found = result(rerun)
    first = wanted.record["conditions"][0]
    assert found.record["conditions"] == [
        first,
        first | {"from_step": 3, "micro_batch_size": 2},
        first | {"from_step": 5, "micro_batch_size": 1},
    ]
    losses = [[entry["loss"] for entry in one.curve] for one in (wanted, found)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


def test_a_rerun_that_recomputes_goes_on_and_says_so(job, capfd):
    killed_in_step(4, job("cpt", 2), 2)
    rerun = job("cpt", 1, ", gradient_checkpointing: true")
    run_job(rerun)
    record = result(rerun).record
    assert record["resumed_at"] == 2
    assert [span["gradient_checkpointing"] for span in record["conditions"]] == [False, True]
    told = capfd.readouterr().err
    assert "(micro_batch_size 2 -> 1, gradient_checkpointing False -> True)" in told


def test_another_number_of_threads_is_said_and_recorded(job, capfd):
    one = job("ift", 2)
    killed_in_step(4, one, 2)
    torch.set_num_threads(2)
    run_job(one)
    record = result(one).record
    assert [(span["from_step"], span["threads"]) for span in record["conditions"]] == [(1, 1), (3, 2)]
    assert "resuming under other conditions (threads 1 -> 2)" in capfd.readouterr().err


@pytest.mark.parametrize("kept", ["", "{", "[]", "[1]", '{"micro_batch_size": 1}', '[{"threads": [1]}]'])
def test_conditions_that_are_none_stop_neither_plan_nor_resume(kept, job):
    """A seal says that it was us who wrote them; a plan reads them before it is looked at."""
    one = job("ift", 2)
    place = checkpoints(one) / "checkpoint-2"
    place.mkdir(parents=True)
    (place / conditions.FILE).write_text(kept)
    checkpoint.seal(place)
    assert planned(one) == "never run; resumes at step 2"
    assert conditions.resumed(place, 2, {"threads": 2})[-1] == {"from_step": 3, "threads": 2}


def test_under_the_same_conditions_nothing_is_said(job, capfd):
    one = job("ift", 2)
    killed_in_step(4, one, 2)
    assert planned(one) == "never run; resumes at step 2"
    run_job(one)
    assert len(result(one).record["conditions"]) == 1
    assert "other conditions" not in capfd.readouterr().err


def test_stages_that_share_their_checkpoints_do_not_run_at_once(job):
    one, other = job("ift", 2), job("ift", 1)
    assert one.work == other.work
    assert one.target != other.target
    with exclusive(one.lock), pytest.raises(TryAgain, match=f"{Path(other.target).name} is being worked on by process"):
        run_job(other)
    assert not checkpoints(other).exists()


@pytest.mark.parametrize("more", [", seed: 6", ", learning_rate: 4e-3", ", weight_decay: 0.1", ", packing: true"])
def test_any_other_change_starts_from_the_beginning(more, folder, tmp_path, job):
    """A checkpoint of another run must never be gone on with."""
    before = job("ift", 2)
    text = (tmp_path / "runs/spec.yaml").read_text()
    key, value = more.strip(", ").split(": ")
    stage = text.partition("- name: only\n")[2].replace("\n    ", "\n").strip()
    lines = {
        "learning_rate": ("learning_rate: 5e-3", f"learning_rate: {value}"),
        "seed": ("kind: ift", f"kind: ift\nseed: {value}"),
        "packing": ("packing: false", f"packing: {value}"),
    }
    old, new = lines.get(key, ("precision: float32", f"precision: float32, {key}: {value}"))
    assert stage.count(old) == 1
    assert stage_job(folder, tmp_path / "runs", stage.replace(old, new)).work != before.work
