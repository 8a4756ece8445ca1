"""A disk that fills up, wherever a step writes: it is told with the place and the amounts, and nothing half is used."""

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from one_stage import TRAIN, at_each_call, in_a_fork, only_job, reason, write_spec
from safetensors.torch import save_file
from tiny import write_data, write_model

from stages import checkpoint, evaluate, make
from stages.artifact import damage, read
from stages.errors import InvalidInput, StageFailed
from stages.faults import explain
from stages.pipeline import load_pipeline
from stages.plan import make_plan
from stages.run import import_ahead, run_job

pytestmark = [pytest.mark.model, pytest.mark.crash]

EVERY = f"{TRAIN}, checkpoint_every: 1"
METRIC = "metrics:\n  held: {kind: perplexity, data: {path: data/heldout.jsonl}, sequence_length: 64}\n"
REMEDY = (
    "What is published is whole. Free space (`trivium gc` shows what can go) or keep the artifacts on a larger disk "
    "(--root FOLDER), then run again"
)


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    import_ahead("stage")
    folder = tmp_path_factory.mktemp("project")
    write_model(folder / "base")
    write_data(folder)
    return folder


def largest_file(number: int) -> None:
    """Let no file of this process grow beyond ``number`` bytes: the kernel's way to a full disk without one."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (number, number))


def full_in(module, name: str, number: int):
    """A harm: from the named function on, writes end at ``number`` bytes."""
    return at_each_call(module, name, lambda: largest_file(number))


def leftovers(folder: Path) -> list[Path]:
    return list(folder.rglob("*.partial"))


@pytest.mark.parametrize(("number", "what"), [(100_000, "model.safetensors"), (200_000, "optimizer.pt")])
def test_a_checkpoint_that_cannot_be_written_is_not_taken_for_one(number, what, project, tmp_path):
    """safetensors leaves nothing, torch.save a part: neither is sealed."""
    job = only_job(write_spec(project, train=EVERY), tmp_path)
    told = reason(job, full_in(make, "fit", number))
    place = Path(job.work) / "checkpoints/checkpoint-1"
    assert told.startswith("stage only, train: ")
    assert f": {place} cannot be written (" in told
    assert f"B are free in {place}" in told
    assert told.endswith(f"{REMEDY}: it starts this step from its beginning")
    assert not (place / checkpoint.SEAL).exists()
    assert not Path(job.target).exists()
    assert run_job(job).manifest["record"]["training"]["resumed_at"] == 0


def test_the_checkpoints_before_stay_and_say_how_much_is_needed(project, tmp_path):
    job = only_job(write_spec(project, train=EVERY), tmp_path)

    def harm() -> None:
        seal = checkpoint.seal

        def seal_and_fill(folder):
            seal(folder)
            largest_file(100_000)

        checkpoint.seal = seal_and_fill

    told = reason(job, harm)
    first = Path(job.work) / "checkpoints/checkpoint-1"
    assert checkpoint.damage(first) is None
    size = sum(file.stat().st_size for file in first.rglob("*") if file.is_file())
    assert "checkpoint-2 cannot be written (" in told
    assert f", about {size / 1e3:.3g} kB are needed). " in told
    assert told.endswith(f"{REMEDY}: it resumes at step 1")
    assert run_job(job).manifest["record"]["training"]["resumed_at"] == 1


def test_a_merge_that_cannot_be_written_keeps_what_was_trained(project, tmp_path):
    job = only_job(write_spec(project, train=EVERY), tmp_path)
    told = reason(job, full_in(make, "hand_over", 100_000))
    assert told.startswith("stage only, merge: the file is larger than this process may write")
    assert f"{Path(job.work) / 'output'} cannot be written" in told
    assert told.endswith(f"{REMEDY}: it resumes at step 3")
    assert not Path(job.target).exists()
    assert run_job(job).manifest["record"]["training"]["resumed_at"] == 3


def test_a_manifest_that_cannot_be_written_publishes_nothing(project, tmp_path):
    job = only_job(write_spec(project, train=EVERY), tmp_path)
    told = reason(job, full_in(make, "publish", 500))
    assert "manifest.json cannot be written (" in told
    assert told.endswith(f"{REMEDY}: it resumes at step 3")
    assert not Path(job.target).exists()
    assert not leftovers(tmp_path)
    made = run_job(job)
    assert not damage(made)


def test_an_evaluation_that_cannot_be_written_is_measured_again_and_the_artifact_stays(project, tmp_path):
    spec = write_spec(project, train=EVERY, head=METRIC)
    pipeline, _ = load_pipeline(spec)
    first = make_plan(pipeline, project, tmp_path, until="only")
    run_job(first.job(first.steps[0]).model_copy(update={"measurements": ()}))
    second = make_plan(pipeline, project, tmp_path, until="only")
    job = second.job(second.steps[1])
    told = reason(job, full_in(evaluate, "save", 100))
    assert "stage only, evaluate: " in told
    assert f"{job.measurements[0].file} cannot be written" in told
    assert told.endswith(f"{REMEDY}: what is published is kept, only what was not measured is measured")
    artifact = read(Path(job.target))
    assert artifact is not None
    assert not damage(artifact)
    assert not leftovers(tmp_path)
    run_job(job)
    assert evaluate.load(Path(job.measurements[0].file)) is not None


def test_a_log_on_a_full_disk_ends_no_stage_and_is_told_once(project, tmp_path):
    job = only_job(write_spec(project, train=EVERY), tmp_path)
    Path(job.work).with_suffix(".log").symlink_to("/dev/full")
    code, events = in_a_fork(job, lambda: None)
    assert code == 0
    lost = [event["message"] for event in events if event["event"] == "info" and "log:" in event["message"]]
    assert lost == ["the log: cannot be written (No space left on device); the work goes on, its log is not whole"]
    assert events[-1]["event"] == "finished"


def test_a_log_on_a_full_disk_hides_no_reason(project, tmp_path):
    job = only_job(write_spec(project, train=EVERY), tmp_path)
    Path(job.work).with_suffix(".log").symlink_to("/dev/full")

    def harm() -> None:
        def broken(*_, **__):
            raise ZeroDivisionError("division by zero")

        make.fit = broken

    assert reason(job, harm) == "ZeroDivisionError: division by zero"


@pytest.mark.parametrize("name", ["job", "verdict"])
def test_the_command_that_runs_a_chain_says_which_file_it_could_not_write(name, project, tmp_path):
    """Both are written by the process of the flow; the steps themselves are made before, in this one."""
    gates = "    gates: [{metric: held, at_most: 1e9}]\n"
    spec = write_spec(project, train=TRAIN, head=METRIC)
    spec.write_text(spec.read_text() + gates)
    if name == "verdict":
        pipeline, _ = load_pipeline(spec)
        for number in (0, 1):
            plan = make_plan(pipeline, project, tmp_path, until="only")
            run_job(plan.job(plan.steps[number]))
    script = (
        "import resource, sys\n"
        "from flows import cli, engine\n"
        "def full(call):\n"
        "    def limited(*given, **named):\n"
        "        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        "        return call(*given, **named)\n"
        "    return limited\n"
        "setattr(engine, sys.argv[1], full(getattr(engine, sys.argv[1])))\n"
        "sys.exit(cli._run(sys.argv[2:]))\n"
    )
    function = {"job": "write_job", "verdict": "_judge"}[name]
    done = subprocess.run(
        [sys.executable, "-c", script, function, "run", spec, "--root", tmp_path, "--no-prefect", "--until", "only"],
        capture_output=True, text=True, check=False, timeout=120, env=os.environ | {"COLUMNS": "400"},
    )  # fmt: skip
    assert done.returncode == StageFailed.exit_code, done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("trivium: the file is larger than this process may write")
    assert {"job": "/.jobs/base-", "verdict": "/verdict.json"}[name] in last
    assert last.endswith(f"{REMEDY}")
    assert not leftovers(tmp_path)


def the_error(write) -> BaseException:
    with pytest.raises(Exception) as caught:  # noqa: PT011 - each library has its own
        write()
    return caught.value


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        OSError(errno.EFBIG, "File too large"),
        Exception("No space left on device (os error 28)"),
        RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),
    ],
)
def test_every_way_in_which_a_write_fails_is_known(error, project, tmp_path):
    job = only_job(write_spec(project), tmp_path)
    found = explain(error, job, "train")
    assert isinstance(found, StageFailed)
    assert f"{job.work}/checkpoints cannot be written" in str(found)


def test_what_the_libraries_really_raise_is_known(tmp_path):
    """The texts above, as safetensors and torch write them today."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    tensors = {"a": torch.zeros(10_000)}
    try:
        found = [
            the_error(lambda: save_file(tensors, tmp_path / "a.safetensors")),
            the_error(lambda: torch.save(tensors, tmp_path / "a.pt")),
        ]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert all(type(explain(error)) is StageFailed and "then run again" in str(explain(error)) for error in found)


def test_a_full_disk_beneath_an_error_of_ours_is_told_as_what_it_is():
    ours = InvalidInput("hub: cannot be fetched")
    ours.__cause__ = OSError(errno.ENOSPC, "No space left on device", "/nowhere/models/blob")
    assert str(explain(ours)).startswith("the disk is full: /nowhere/models/blob cannot be written (")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EROFS, "Read-only file system", "/nowhere/model.safetensors"),
        Exception("Read-only file system (os error 30)"),
    ],
)
def test_a_disk_that_may_not_be_written_to_is_told_with_what_to_do(error, project, tmp_path):
    job = only_job(write_spec(project), tmp_path)
    place = getattr(error, "filename", None) or f"{job.work}/checkpoints"
    found = explain(error, job, "train")
    assert isinstance(found, StageFailed)
    assert str(found) == (
        f"stage only, train: {place} cannot be written: its file system is read-only. What is published is whole. "
        "Mount it for writing, or keep the artifacts elsewhere (--root FOLDER), then run again: it starts this "
        "step from its beginning"
    )


def test_a_full_disk_is_told_at_once_without_reading_the_checkpoints_again(project, tmp_path, monkeypatch):
    job = only_job(write_spec(project), tmp_path)
    place = Path(job.work) / "checkpoints/checkpoint-1"
    place.mkdir(parents=True)
    (place / "model.safetensors").write_bytes(bytes(5000))
    checkpoint.seal(place)
    monkeypatch.setattr(checkpoint, "sha256", lambda _file: pytest.fail("hashed, which takes minutes at full size"))
    told = str(explain(OSError(errno.ENOSPC, "No space left on device"), job, "train"))
    assert ", about 5." in told
    assert told.endswith(f"{REMEDY}: it resumes at step 1")
