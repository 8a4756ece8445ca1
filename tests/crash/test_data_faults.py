"""Data that is empty is refused before a model is loaded; data that changes while it is used, before a publish."""

import json
import os
import shutil
from pathlib import Path

import pytest
from crashing import at_step, result
from one_stage import CPT, DPO, IFT, TRAIN, only_job, write_spec
from tiny import write_rows

from stages import checkpoint
from stages.errors import StageFailed, TriviumError
from stages.job import Job
from stages.pipeline import load_pipeline
from stages.plan import make_plan
from stages.run import run_job

pytestmark = [pytest.mark.model, pytest.mark.crash]

EVERY = f"{TRAIN.replace('max_steps: 3', 'max_steps: 5')}, checkpoint_every: 2"


@pytest.fixture
def refusal(monkeypatch):
    """A function: why a job is refused, with no model loaded and nothing published."""

    def refuse(job: Job) -> str:
        def load(*_, **__):
            raise AssertionError("a model was loaded")

        with monkeypatch.context() as patch:
            patch.setattr("stages.make.load_plain", load)
            with pytest.raises(TriviumError) as caught:
                run_job(job)
        assert not Path(job.target).exists()
        return str(caught.value)

    return refuse


# Nothing to learn from


@pytest.mark.parametrize("objective", [CPT, IFT, DPO])
def test_a_source_without_rows_is_refused_before_a_model_is_loaded(objective, project, refusal):
    name = objective.partition("path: ")[2].partition("}")[0]
    (project / name).write_text("\n")
    told = refusal(only_job(write_spec(project, objective), project / "runs"))
    assert told == f"{name}: no rows; {Path(name).name} is empty: put rows in, or remove the source"


@pytest.mark.parametrize(("objective", "rows"), [(IFT, 60), (DPO, 60)])
def test_rows_that_are_all_too_long_are_refused_with_what_was_read(objective, rows, project, refusal):
    """Every label is masked then: the question alone fills the sequence."""
    name = objective.partition("path: ")[2].partition("}")[0]
    told = refusal(only_job(write_spec(project, objective, train=TRAIN.replace("48", "4")), project / "runs"))
    assert told == (
        f"stage only: no token would be trained: {rows} of {rows} rows have nothing to learn within "
        f"train.sequence_length; raise it, or look at the rows (read: {name}: {rows} rows)"
    )


def test_what_was_left_out_is_counted_in_the_refusal(project, refusal):
    rows = [json.loads(line) for line in (project / "data/instructions.jsonl").read_text().splitlines()[:3]]
    write_rows(project / "data/instructions.jsonl", [*rows, {"text": "no conversation"}])
    objective = IFT.replace("jsonl}", "jsonl, on_bad_row: drop, max_bad_rows: 1}")
    told = refusal(only_job(write_spec(project, objective, train=TRAIN.replace("48", "4")), project / "runs"))
    assert "3 of 3 rows have nothing to learn" in told
    assert told.endswith("(read: data/instructions.jsonl: 4 rows, 1 of them cannot be used)")


def test_rows_that_are_all_bad_are_refused(project, refusal):
    write_rows(project / "data/corpus.jsonl", [{"text": ""}] * 3)
    objective = CPT.replace("jsonl}", "jsonl, on_bad_row: drop, max_bad_rows: 100%}")
    *rows, last = refusal(only_job(write_spec(project, objective), project / "runs")).splitlines()
    assert len(rows) == 3
    assert last == "data/corpus.jsonl: no rows are left: all 3 that were read cannot be used; correct them"


@pytest.mark.parametrize("packing", ["split", "wrapped", "none"])
def test_fewer_tokens_than_a_sequence_still_train(packing, project):
    write_rows(project / "data/corpus.jsonl", [{"text": "the cat"}])
    settings = TRAIN.replace("max_steps: 3", "max_steps: 1")
    job = only_job(write_spec(project, CPT, train=f"{settings}, packing: {packing}"), project / "runs")
    record = run_job(job).manifest["record"]
    assert record["training"]["sequences"] == 1
    assert record["training"]["steps"] == 1


def test_rows_that_were_left_out_are_in_the_manifest(project):
    rows = [json.loads(line) for line in (project / "data/corpus.jsonl").read_text().splitlines()]
    write_rows(project / "data/corpus.jsonl", [*rows[:2], {"text": None}, *rows[2:]])
    objective = CPT.replace("jsonl}", "jsonl, on_bad_row: drop, max_bad_rows: 1}")
    record = run_job(only_job(write_spec(project, objective), project / "runs")).manifest["record"]
    assert record["data"] == [
        {
            "source": "data/corpus.jsonl",
            "rows": len(rows) + 1,
            "dropped": 1,
            "first_dropped": ["data/corpus.jsonl:3: column 'text' holds nothing (null); expected text"],
        }
    ]
    assert record["masks"]["rows"] == len(rows)


# What changes while a stage runs


def rewrite(file: Path) -> bytes:
    """Another content of the same size, with the same time of change; returns what was there."""
    before, status = file.read_bytes(), file.stat()
    file.write_bytes(before.replace(b"cat", b"dog"))
    assert file.read_bytes() != before
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    return before


def test_a_data_file_that_changes_during_a_run_fails_the_stage_and_old_and_new_are_never_mixed(project, monkeypatch):
    spec, file = write_spec(project, train=EVERY), project / "data/corpus.jsonl"
    undisturbed = only_job(spec, project / "undisturbed")
    run_job(undisturbed)
    wanted = result(undisturbed).weights
    job = only_job(spec, project / "runs")
    kept: list[bytes] = []
    with monkeypatch.context() as patch:
        at_step(patch, 3, lambda: kept.append(rewrite(file)))
        with pytest.raises(StageFailed) as caught:
            run_job(job)
    assert str(caught.value) == (
        f"only: changed since this run was planned: {file}. Nothing is published; put back what was there, or run "
        "again: the step is then made from what is there now"
    )
    assert not Path(job.target).exists()

    changed = only_job(spec, project / "runs")
    assert changed.work != job.work
    run_job(changed)
    made = result(changed)
    assert made.record["resumed_at"] == 0
    assert made.weights != wanted

    file.write_bytes(kept[0])
    again = only_job(spec, project / "runs")
    assert again.work == job.work
    run_job(again)
    made = result(again)
    assert made.record["resumed_at"] == 5
    assert made.weights == wanted


def test_a_data_file_that_changed_before_it_was_read_trains_no_step(project, refusal):
    job = only_job(write_spec(project, train=EVERY), project / "runs")
    rewrite(project / "data/corpus.jsonl")
    assert "data/corpus.jsonl. Nothing is published" in refusal(job)
    assert not checkpoint.by_step(Path(job.work) / "checkpoints")


def test_a_data_file_that_went_during_a_run_is_named(project, monkeypatch):
    file = project / "data/corpus.jsonl"
    job = only_job(write_spec(project, train=EVERY), project / "runs")
    at_step(monkeypatch, 3, file.unlink)
    with pytest.raises(StageFailed, match=r"corpus\.jsonl: no such file\. Nothing is published"):
        run_job(job)
    assert not Path(job.target).exists()


def test_a_base_that_changes_during_a_run_fails_the_stage_that_started_from_it(project, monkeypatch):
    file = project / "base/model.safetensors"
    job = only_job(write_spec(project, train=EVERY), project / "runs")
    at_step(monkeypatch, 3, lambda: file.write_bytes(file.read_bytes()[:-1] + b"\x7f"))
    with pytest.raises(StageFailed, match=r"base.*model\.safetensors"):
        run_job(job)
    assert not Path(job.target).exists()


@pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning")  # peft's, at the checkpoint after it
@pytest.mark.parametrize("harmed", ["the artifact", "the folder that it refers to"])
def test_a_start_that_goes_during_a_run_is_named_with_what_to_do(harmed, project, monkeypatch):
    """The merge loads it again, and what libraries say of a folder that is not there helps nobody."""
    job = only_job(write_spec(project, train=EVERY, method="lora"), project / "runs")
    start = Path(str(job.start))
    gone = start if harmed == "the artifact" else project / "base"
    at_step(monkeypatch, 3, lambda: shutil.rmtree(gone))
    with pytest.raises(StageFailed, match=r"damaged since it was published: .*[Rr]un `?trivium run") as caught:
        run_job(job)
    assert str(caught.value).startswith(f"{start}: ")
    assert not Path(job.target).exists()
    assert checkpoint.newest_step(Path(job.work) / "checkpoints") > 0


def harm(file: Path) -> None:
    """Another last byte: the same size, and still a number."""
    file.write_bytes(file.read_bytes()[:-1] + b"\x3e")


@pytest.mark.parametrize("harmed", ["the artifact", "the folder that it refers to"])
def test_a_start_that_was_damaged_since_the_plan_is_refused_before_it_is_loaded(harmed, project, refusal):
    job = only_job(write_spec(project, train=EVERY), project / "runs")
    start = Path(str(job.start))
    file = start / "probe.safetensors" if harmed == "the artifact" else project / "base/model.safetensors"
    harm(file)
    told = refusal(job)
    assert told.startswith(f"{start}: damaged since it was published: ")
    assert f"{file.name} was changed" in told
    assert "un `trivium run` on the spec" in told


def test_a_base_that_changed_since_the_plan_is_not_published(project):
    pipeline, _ = load_pipeline(write_spec(project))
    job = (plan := make_plan(pipeline, project, project / "runs", until="only")).job(plan.steps[0])
    harm(file := project / "base/model.safetensors")
    with pytest.raises(StageFailed, match="base: changed since this run was planned: ") as caught:
        run_job(job)
    assert str(file) in str(caught.value)
    assert not Path(job.target).exists()
