"""What is lost around a run: its Prefect server, the database, the process itself. The results are not."""

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import tiny
from running import DEADLINE, SPEC, TRIVIUM, environment, is_gone, run, sealed, states, wait_for

pytestmark = pytest.mark.flow


IMPATIENT = """
from flows import cli, process
process.SILENCE = 25
cli.main()
"""
"""The command line with two beats and a half for the five minutes after which a stage is taken for hung."""


def stage_of(run: int) -> psutil.Process:
    [stage] = [one for one in psutil.Process(run).children() if "stages.run" in one.cmdline()]
    return stage


def server_of(run: int) -> psutil.Process:
    [server] = [one for one in psutil.Process(run).children() if "uvicorn" in one.cmdline()]
    return server


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_project(tmp_path_factory.mktemp("lost"), SPEC)


@pytest.fixture(scope="module")
def survivor(project: Path) -> tuple[Path, int, str]:
    """A run whose server is killed while its stage trains: the spec, the exit code, what it said."""
    command = [*TRIVIUM, "run", str(project)]
    with subprocess.Popen(
        command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as child:
        wait_for(lambda: sealed(project), "a first checkpoint")
        server_of(child.pid).kill()
        errors = child.communicate(timeout=DEADLINE)[1]
    return project, child.returncode, errors


def test_a_lost_server_costs_no_stage_and_one_line(survivor: tuple[Path, int, str]) -> None:
    spec, code, errors = survivor
    assert code == 0, errors
    assert (spec.parent / "artifacts/tiny/model/model.safetensors").is_file()
    assert f"trivium: the results are safe in {spec.parent}/artifacts; reporting to Prefect failed: " in errors
    assert "the Prefect server does not answer: release runs all the same" in errors
    for noise in ("Traceback", "Error logging to API", "EventsWorker"):
        assert noise not in errors


def test_without_prefect_all_of_it_is_kept(survivor: tuple[Path, int, str]) -> None:
    again = run(survivor[0], "--no-prefect")
    assert again.returncode == 0
    assert "Nothing changed: every step is published and every gate passes." in again.stdout


def test_a_damaged_database_is_named_and_does_not_stop_a_run_without_prefect(survivor: tuple[Path, int, str]) -> None:
    spec, _, _ = survivor
    hard = spec.with_name("hard.yaml")
    hard.write_text(SPEC.replace("improves_on: base, by: 1%", "improves_on: base, by: 90%"))
    database = spec.parent / "artifacts/.prefect/prefect.db"
    database.write_bytes(b"no database at all" * 100)
    for extra in database.parent.glob("prefect.db-*"):
        extra.unlink()
    refused = run(hard)
    assert refused.returncode == 2
    message = " ".join(refused.stderr.split())
    assert f"trivium: {database}: Prefect's database is damaged (file is not a database). " in message
    assert "your results are not in it and are untouched. " in message
    assert f"Move it away (mv {database} {database}.damaged) and run again, or use --no-prefect" in message
    assert "Traceback" not in refused.stderr
    assert run(hard, "--no-prefect").returncode == 3


def test_without_its_database_a_run_finds_everything_published(survivor: tuple[Path, int, str]) -> None:
    spec, _, _ = survivor
    shutil.rmtree(spec.parent / "artifacts/.prefect")
    hard = spec.with_name("hard.yaml")
    hard.write_text(SPEC.replace("improves_on: base, by: 1%", "improves_on: base, by: 80%"))
    judged = run(hard)
    assert judged.returncode == 3, judged.stderr
    assert "train" not in judged.stderr
    assert states(spec, "knowledge") == ["FAILED"]


def test_a_killed_run_leaves_no_process_and_the_next_one_marks_it_as_crashed(tmp_path: Path) -> None:
    spec = tiny.write_project(tmp_path, SPEC.replace("max_steps: 40", "max_steps: 500"))
    command = [*TRIVIUM, "run", str(spec), "--until", "knowledge"]
    with subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as child:
        wait_for(lambda: sealed(spec), "a first checkpoint")
        tree = psutil.Process(child.pid).children(recursive=True)
        child.kill()
    assert len(tree) >= 2  # its server and its stage
    wait_for(lambda: all(map(is_gone, tree)), "the whole tree to end")
    assert states(spec, "knowledge") == states(spec, f"run: {spec}") == ["RUNNING"]

    before = sealed(spec)
    with subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        wait_for(lambda: sealed(spec) - before, "a checkpoint of the second run")
        assert sorted(states(spec, "knowledge")) == ["CRASHED", "RUNNING"]
        assert len(list(spec.parent.glob("artifacts/.prefect/runs/*"))) == 1
        child.send_signal(signal.SIGTERM)
        output, errors = child.communicate(timeout=DEADLINE)
    assert child.returncode == 75
    assert "resumes at step" in output
    assert "stopping knowledge: it ends its step and saves a checkpoint" in errors
    assert "RUNNING" not in states(spec)
    assert "Traceback" not in errors


def test_a_run_that_is_told_to_stop_together_with_its_server_stops_and_starts_nothing_again(tmp_path: Path) -> None:
    spec = tiny.write_project(tmp_path, SPEC.replace("max_steps: 40", "max_steps: 20000"))
    command = [*TRIVIUM, "run", str(spec), "--until", "knowledge"]
    with subprocess.Popen(
        command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as child:
        wait_for(lambda: sealed(spec), "a first checkpoint")
        tree = psutil.Process(child.pid).children(recursive=True)
        for process in [*tree, child]:  # as systemd does it
            process.terminate()
        errors = child.communicate(timeout=DEADLINE)[1]
    assert child.returncode == 75, errors
    assert "trivium: stopped; run again to go on" in errors
    assert "resuming" not in errors
    assert "Traceback" not in errors
    wait_for(lambda: all(map(is_gone, tree)), "the whole tree to end")


def test_a_hung_stage_is_ended_crashed_in_prefect_and_gone_on_with(tmp_path: Path) -> None:
    spec = tiny.write_project(tmp_path, SPEC.replace("max_steps: 40", "max_steps: 20000"))
    command = [sys.executable, "-c", IMPATIENT, "run", str(spec), "--until", "knowledge"]
    with subprocess.Popen(
        command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as child:
        wait_for(lambda: sealed(spec), "a first checkpoint")
        stage = stage_of(child.pid)
        stage.suspend()
        errors = child.communicate(timeout=DEADLINE)[1]
    assert child.returncode == 4
    assert "knowledge: its process gave no sign of life for 25 s in phase train after step " in errors
    assert "Run again: it resumes at its last checkpoint" in errors
    assert "Traceback" not in errors
    assert is_gone(stage)
    assert states(spec, "knowledge") == states(spec, f"run: {spec}") == ["CRASHED"]
    plan = subprocess.run(
        [*TRIVIUM, "plan", str(spec)], capture_output=True, text=True, check=True, timeout=DEADLINE, env=environment()
    )
    assert "resumes at step" in plan.stdout
