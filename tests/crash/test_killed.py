"""SIGKILL in every phase of a step: nothing half-made is used, nothing finished is made again, the result is one."""

import shutil
from pathlib import Path

import pytest
from crashing import Result, after, before, checkpoints, disturb, killed, photograph, published, result, stage_job
from tiny import write_data, write_model
from transformers import LlamaForCausalLM, Trainer, modeling_utils

from flows import engine, process
from flows.engine import Plain, Run, run_chain
from stages import base, checkpoint, evaluate, make, run
from stages.artifact import MANIFEST, VERDICT, Artifact, damage, read, set_aside
from stages.checkpoint import SEAL, by_step, resume_from
from stages.checkpoint import damage as damage_of_checkpoint
from stages.errors import GateRefused
from stages.job import Job
from stages.methods.lora import Lora
from stages.pipeline import load_pipeline
from stages.plan import Plan, make_plan
from stages.run import run_job

pytestmark = [pytest.mark.model, pytest.mark.crash]

STEPS, EVERY = 4, 2
STAGE = f"""
kind: ift
method: {{kind: lora, rank: 4, dropout: 0.1}}
data: [{{path: data/instructions.jsonl}}]
train: {{max_steps: {STEPS}, checkpoint_every: {EVERY}, batch_size: 2, learning_rate: 1e-2, schedule: constant,
        sequence_length: 64}}
"""
METRICS = "metrics: {it: {kind: perplexity, data: {path: data/instructions.heldout.jsonl}, sequence_length: 64}}\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    write_model(folder / "base")
    write_data(folder)
    return folder


@pytest.fixture(scope="module")
def prepared(folder) -> Path:
    """A root in which the base is published and measured. Read only."""
    stage_job(folder, folder / "prepared", STAGE, METRICS)
    return folder / "prepared"


@pytest.fixture
def job(folder, prepared, tmp_path) -> Job:
    """The stage's job in a root of its own."""
    return stage_job(folder, Path(shutil.copytree(prepared, tmp_path / "runs")), STAGE, METRICS)


@pytest.fixture(scope="module")
def wanted(folder, prepared) -> Result:
    """What the stage comes to when nobody disturbs it."""
    job = stage_job(folder, Path(shutil.copytree(prepared, folder / "whole")), STAGE, METRICS)
    run_job(job)
    disturb()
    return measured(job)


def measured(job: Job) -> Result:
    """A job's result, with what was measured of it in the record."""
    found = result(job)
    kept = [evaluate.load(Path(one.file)) for one in job.measurements]
    return found._replace(record=found.record | {"measures": [one.measures for one in kept]})


@pytest.fixture
def steps_taken(monkeypatch) -> list[int]:
    """A micro-batch each: what is trained while a test runs (not what its children trained)."""
    taken, step = [], Trainer.training_step
    monkeypatch.setattr(Trainer, "training_step", lambda *args, **named: (taken.append(1), step(*args, **named))[1])
    return taken


# Load


@pytest.mark.parametrize(
    "place",
    [before(make, "load_tokenizer"), before(make, "_prepare"), before(make, "load_plain"), after(make, "_prepare")],
    ids=["before anything", "before the model", "in the model", "after the adapter"],
)
def test_killed_while_a_stage_loads(place, job, wanted):
    killed(place, lambda: run_job(job))
    assert not published(job)
    assert not by_step(checkpoints(job))
    run_job(job)
    assert measured(job) == wanted


@pytest.mark.parametrize(
    "place",
    [before(make, "prepare_base"), after(base, "load_plain"), after(make, "prepare_base"), after(make, "publish")],
    ids=["before", "loaded", "prepared", "published"],
)
def test_killed_while_the_base_is_prepared(place, folder, prepared, tmp_path):
    spec = prepared / "spec.yaml"

    def base_step():
        return make_plan(load_pipeline(spec)[0], folder, tmp_path / "runs").steps[0]

    plan = make_plan(load_pipeline(spec)[0], folder, tmp_path / "runs")
    killed(place, lambda: run_job(plan.job(plan.steps[0])))
    step = base_step()
    assert (step.artifact is None) == (step.reason != "published")
    assert evaluate.load(Path(step.measurements[0].file)) is None
    plan = make_plan(load_pipeline(spec)[0], folder, tmp_path / "runs")
    found = run_job(plan.job(plan.steps[0]))
    other = read(next((prepared / "it").glob("00-base-*")))
    assert found.manifest["files"] == other.manifest["files"]
    assert base_step().missing == ()


def finished(folder: Path, root: Path) -> tuple[Job, Artifact]:
    """The release's job after the stage was run."""
    spec = root / "spec.yaml"
    plan = make_plan(load_pipeline(spec)[0], folder, root)
    run_job(plan.job(plan.steps[1]))
    plan = make_plan(load_pipeline(spec)[0], folder, root)
    return plan.job(plan.steps[2]), plan.steps[1].artifact


@pytest.fixture(scope="module")
def before_release(folder, prepared) -> tuple[Path, Job]:
    root = Path(shutil.copytree(prepared, folder / "release"))
    job, _ = finished(folder, root)
    return root, job


@pytest.mark.parametrize(
    "place",
    [
        before(make, "save_plain"),
        after(modeling_utils, "safe_save_file"),
        before(make, "assemble"),
        before(make, "publish"),
    ],
    ids=["before", "first file", "written", "proved"],
)
def test_killed_while_the_release_is_written(place, before_release):
    _, job = before_release
    killed(place, lambda: run_job(job))
    assert not published(job)
    first = run_job(job)
    set_aside(first.path)
    again = run_job(job)
    assert again.manifest["files"] == first.manifest["files"]
    set_aside(again.path)


# Checkpoint


def test_a_checkpoint_with_any_of_its_files_missing_is_not_chosen(job):
    killed(after(checkpoint, "prune", 2), lambda: run_job(job))
    newest, older = by_step(checkpoints(job))
    names = sorted(str(path.relative_to(newest)) for path in newest.rglob("*") if path.is_file())
    assert {"adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} < {
        *names
    }
    for name in names:
        copy = Path(shutil.copytree(checkpoints(job), Path(job.work) / f"without-{names.index(name)}"))
        (copy / newest.name / name).unlink()
        assert resume_from(copy, EVERY).checkpoint == copy / older.name
        assert not (copy / newest.name).exists()


def test_at_no_moment_is_anything_half_made_taken_for_whole(folder, job, wanted, tmp_path):
    """Every state of the disk between two changes of a file, from the first step to the last measurement."""
    root, album = tmp_path / "runs", tmp_path / "album"
    killed(lambda here: (photograph(root, album), after(run, "_measure")(here)), lambda: run_job(job))
    run_job(job)
    assert measured(job) == wanted
    moments = sorted(album.iterdir())
    reached, seen = 0, set()
    for moment in moments:
        work = moment / Path(job.work).relative_to(root)
        target = moment / Path(job.target).relative_to(root)
        if target.exists():
            assert damage(read(target)) == []
            seen.add("published")
            for one in job.measurements:
                file = moment / Path(one.file).relative_to(root)
                assert (evaluate.load(file) is not None) == file.exists()
            continue
        written = [checkpoint.step_of(path) for path in by_step(work / "checkpoints")]
        whole = [step for step in written if damage_of_checkpoint(work / f"checkpoints/checkpoint-{step}") is None]
        assert max(whole, default=0) >= reached
        reached = max(whole, default=0)
        assert max(written, default=0) - reached <= EVERY
        seen |= {f"writing {max(written, default=0)}"} if reached < max(written, default=0) else {f"kept {reached}"}
    assert seen == {"kept 0", "writing 2", "kept 2", "writing 4", "kept 4", "published"}
    assert len(moments) > 50
    for number in range(0, len(moments), len(moments) // 5):
        again = stage_job(folder, moments[number], STAGE, METRICS)
        if not published(again):
            run_job(again)
        assert result(again).weights == wanted.weights


@pytest.mark.parametrize(
    "place",
    [
        before(checkpoint, "seal", 2),
        before(checkpoint, "write_json", 2),
        after(checkpoint, "seal", 2),
        before(shutil, "rmtree"),
    ],
    ids=["unsealed", "seal not yet written", "sealed", "finished"],
)
def test_killed_while_the_last_checkpoint_is_written(place, job, wanted, steps_taken, capfd):
    killed(place, lambda: run_job(job))
    kept = STEPS if (checkpoints(job) / f"checkpoint-{STEPS}" / SEAL).exists() else STEPS - EVERY
    capfd.readouterr()
    run_job(job)
    told = capfd.readouterr().err
    assert ("checkpoint-4 is torn: the process ended before it was sealed" in told) == (kept < STEPS)
    again = "at most 2 steps are" if kept < STEPS else "no step is"
    assert f"resuming at step {kept} of {STEPS}: {again} trained again\n" in told
    assert len(steps_taken) == (STEPS - kept) * 2
    assert measured(job).weights == wanted.weights


# Merge and publish


@pytest.mark.parametrize(
    "place",
    [
        before(Lora, "keep"),
        after(Lora, "keep"),
        before(Lora, "finish"),
        after(modeling_utils, "safe_save_file"),
        after(make, "hand_over"),
        before(make, "publish"),
    ],
    ids=["before the adapter", "adapter kept", "before merging", "first file of the merge", "proved", "unpublished"],
)
def test_killed_in_the_merge_the_rerun_trains_no_step_and_comes_to_the_same(place, job, wanted, steps_taken):
    killed(place, lambda: run_job(job))
    assert not published(job)
    run_job(job)
    assert steps_taken == []
    found = measured(job)
    assert found.weights == wanted.weights
    assert found.record == wanted.record | {"resumed_at": STEPS}
    assert not Path(job.work).exists()


def test_killed_right_after_it_was_published_only_the_measurements_are_made(job, wanted, steps_taken):
    killed(after(make, "publish"), lambda: run_job(job))
    assert published(job)
    kept = read(Path(job.target)).manifest
    run_job(job)
    assert steps_taken == []
    assert read(Path(job.target)).manifest == kept
    assert measured(job) == wanted


# Evaluate


@pytest.mark.parametrize(
    "place",
    [
        before(run, "_measure"),
        before(LlamaForCausalLM, "forward", 2),
        before(evaluate, "save"),
        before(Path, "replace"),
        after(Path, "replace"),
    ],
    ids=["before", "between two batches", "measured", "written, not yet named", "kept"],
)
def test_killed_in_the_evaluation_there_are_all_measurements_or_none(place, folder, job, wanted, steps_taken):
    killed(before(run, "_measure"), lambda: run_job(job))
    root = Path(job.target).parents[1]
    job = stage_job(folder, root, STAGE, METRICS)
    assert job.make is False
    killed(place, lambda: run_job(job))
    [one] = job.measurements
    there = Path(one.file).exists()
    assert (evaluate.load(Path(one.file)) is not None) == there
    assert damage(read(Path(job.target))) == []
    plan = make_plan(load_pipeline(root / "spec.yaml")[0], folder, root, until="only")
    assert (plan.steps[1].missing == ()) == there
    run_job(job)
    assert steps_taken == []
    assert measured(job) == wanted


# Gate


GATED = f"""name: it
model: {{path: base, dtype: float32}}
seed: 5
{METRICS}stages:
  - name: only
    {STAGE.strip().replace(chr(10), chr(10) + "    ")}
    gates: [{{metric: it, GATE}}]
  - name: following
    {STAGE.strip().replace(chr(10), chr(10) + "    ")}
"""


@pytest.fixture
def gated(folder, prepared, tmp_path):
    """A function: the run of a two-stage chain whose first stage is made, measured and not yet judged."""

    def make_run(gate: str, until: str | None = None) -> Run:
        spec, root = folder / "gated.yaml", tmp_path / "runs"
        spec.write_text(GATED.replace("GATE", gate))
        if not root.exists():
            shutil.copytree(prepared, root)
            plan = make_plan(load_pipeline(spec)[0], folder, root)
            run_job(plan.job(plan.steps[1]))
        return Run(spec, root, until_stage=until)

    return make_run


def started(*_, **__):
    raise AssertionError("a process was started")


JUDGING = [
    before(Plan, "verdicts"),
    after(Plan, "verdicts"),
    before(Path, "replace"),
    after(engine, "_judge"),
]


@pytest.mark.parametrize("place", JUDGING, ids=["before", "computed", "written, not yet named", "kept"])
def test_killed_while_a_stage_is_judged_the_verdict_is_computed_anew(place, gated, monkeypatch):
    run = gated("at_most: 0.001", until="only")
    verdict = run.plan().steps[1].place / VERDICT
    killed(place, lambda: run_chain(run, Plain()))
    assert damage(run.plan().steps[1].artifact) == []
    there = verdict.read_text() if verdict.exists() else None
    monkeypatch.setattr(process, "start", started)
    whole = gated("at_most: 0.001")
    with pytest.raises(GateRefused, match="only: 1 of 1 gates failed"):
        run_chain(whole, Plain())
    assert there in (None, verdict.read_text())
    [base, only] = run_chain(gated("at_least: 0.001", until="only"), Plain())
    assert (base.kept, only.kept, only.passed) == (True, True, True)


def test_a_verdict_without_its_artifact_passes_nothing(gated, monkeypatch):
    run = gated("at_least: 0.001", until="only")
    run_chain(run, Plain())
    step = run.plan().steps[1]
    (step.place / MANIFEST).unlink()
    monkeypatch.setattr(process, "start", started)
    with pytest.raises(AssertionError, match="a process was started"):  # it is made anew, whatever the verdict says
        run_chain(run, Plain())
    assert not (step.place / VERDICT).exists()
