"""The real chain on a tiny model: processes, Prefect, the store. Nothing is mocked."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest
import tiny

from flows.server import project_server

pytestmark = pytest.mark.flow
TRIVIUM = [sys.executable, "-m", "flows.cli"]
DEADLINE = 240


def environment() -> dict[str, str]:
    return os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def run(spec: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [*TRIVIUM, "run", str(spec), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=DEADLINE, env=environment())


def identities(spec: Path) -> dict[str, str]:
    """Step name -> sha256 of its weights, from the manifests of what `trivium plan` keeps."""
    found = {}
    for manifest in sorted(spec.parent.glob("artifacts/tiny/[0-9]*/manifest.json")):
        name = manifest.parent.name[3:].rpartition("-")[0]
        found[name] = json.loads(manifest.read_text())["files"].get("model/model.safetensors", {}).get("sha256", "")
    return found


def wait_for(condition: Callable[[], object], what: str) -> object:
    """Poll until ``condition`` holds; a deadline, never a fixed wait."""
    end = time.monotonic() + DEADLINE
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError(f"timed out: {what}")


def stage_processes(run: int) -> set[int]:
    """The stage processes that a run started, still there when the run itself is gone; they name it as their parent."""
    found = set()
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        if "stages.run" in command and str(run) in command:
            found.add(process.pid)
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The whole chain, once, through Prefect with its embedded server."""
    spec = tiny.write_project(tmp_path_factory.mktemp("chain"))
    return spec, run(spec)


def test_one_spec_takes_a_model_through_three_stages(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    spec, done = finished
    assert done.returncode == 0, done.stderr
    for text in ("domain · bits_per_byte", "pairs · reward_margin", "hand-over error", "peak memory"):
        assert text in done.stdout
    assert done.stdout.count("gate passed") == 3
    assert f"model:  {spec.parent}/artifacts/tiny/model" in done.stdout
    for stage in ("knowledge", "answers", "manner"):
        for phase in ("load", "train", "merge", "evaluate"):
            assert f"{stage}: {phase}" in done.stderr
        assert f"hand-over of {stage}: logits differ by" in done.stderr


def test_the_model_loads_with_plain_transformers(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    model = finished[0].parent / "artifacts/tiny/model"
    script = (
        "import sys; from transformers import AutoModelForCausalLM, AutoTokenizer; "
        "m = AutoModelForCausalLM.from_pretrained(sys.argv[1]); t = AutoTokenizer.from_pretrained(sys.argv[1]); "
        "stops = t.convert_tokens_to_ids(['<|im_end|>', '<|endoftext|>']); "
        "assert t.chat_template and set(m.generation_config.eos_token_id) == set(stops); "
        "assert not any('lora' in name or 'modules' in name for name, _ in m.named_parameters())"
    )
    subprocess.run([sys.executable, "-c", script, str(model)], check=True, env=environment(), timeout=DEADLINE)


def test_prefect_shows_a_subflow_per_stage_and_a_task_per_phase(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    database = finished[0].parent / "artifacts/.prefect/prefect.db"
    with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as connection:
        flows = dict(connection.execute("select name, state_name from flow_run").fetchall())
        tasks = connection.execute(
            "select f.name, t.name, t.state_type from task_run t join flow_run f on t.flow_run_id = f.id"
        ).fetchall()
        artifacts = dict(connection.execute("select key, type from artifact where key is not null").fetchall())
        parameters = " ".join(row[0] for row in connection.execute("select parameters from flow_run"))
    stages = {"base": "Passed", "knowledge": "Passed", "answers": "Passed", "manner": "Passed", "release": "Passed"}
    assert stages.items() <= flows.items()
    [parent] = [name for name in flows if name.endswith("spec.yaml")]
    assert flows[parent] == "Passed"
    for stage in ("knowledge", "answers", "manner"):
        phases = {name for flow, name, state in tasks if flow == stage and state == "COMPLETED"}
        assert phases >= {"load", "train", "merge", "evaluate", "gate"}
        assert artifacts[f"tiny-{stage}-gates"] == "table"
        assert artifacts[f"tiny-{stage}-loss"] == "markdown"
        assert artifacts[f"tiny-{stage}-progress"] == "progress"
    assert artifacts["tiny-knowledge-spectrum"] == "markdown"
    assert artifacts["tiny-report"] == "markdown"
    assert "learning_rate" not in parameters  # a path and a hash, never the spec


def test_what_is_published_is_kept(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    spec, _ = finished
    before = identities(spec)
    again = run(spec)
    assert again.returncode == 0
    assert "Nothing changed: every step is published and every gate passes." in again.stdout
    assert identities(spec) == before


def test_an_edited_gate_is_judged_again_without_training(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    spec, _ = finished
    before = identities(spec)
    hard = spec.with_name("hard.yaml")
    hard.write_text(tiny.SPEC.replace("improves_on: base, by: 1%", "improves_on: base, by: 90%"))
    refused = run(hard, "--no-prefect")
    assert refused.returncode == 3
    assert "trivium: stage knowledge: 1 of 1 gates failed: domain" in refused.stderr
    assert "train" not in refused.stderr
    warned = spec.with_name("warned.yaml")
    warned.write_text(hard.read_text().replace("by: 90%}]", "by: 90%}]\n    on_gate_failure: warn"))
    assert run(warned, "--no-prefect").returncode == 0
    assert identities(spec) == before


def test_a_release_that_is_refused_in_full_is_let_out_once_the_threshold_is_lowered(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    spec, _ = finished
    link = spec.parent / "artifacts/tiny/model"
    assert link.is_symlink()
    full = spec.with_name("full.yaml")
    gates = "{metric: domain, improves_on: base}, {metric: pairs.reward_margin, at_least: 900}"
    full.write_text(tiny.SPEC + f"release:\n  gates: [{gates}]\n")
    refused = run(full)
    assert refused.returncode == 3, refused.stderr
    assert "trivium: the release is made and not let out: 1 of 2 gates failed: pairs.reward_margin" in refused.stderr
    assert "release: evaluate" in refused.stderr
    assert "train" not in refused.stderr
    assert "gate passed release: domain" in refused.stdout
    assert not link.is_symlink()  # it led to what is refused now
    database = spec.parent / "artifacts/.prefect/prefect.db"
    with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as connection:
        states = connection.execute("select state_name from flow_run where name = 'release'").fetchall()
    assert ("GateFailed",) in states
    full.write_text(full.read_text().replace("at_least: 900", "at_least: 0"))
    let_out = run(full, "--no-prefect")
    assert let_out.returncode == 0, let_out.stderr
    assert "evaluate" not in let_out.stderr
    assert link.is_symlink()


def test_a_refused_stage_is_made_again_with_a_change_and_prefect_shows_both_attempts(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    spec, _ = finished
    before = identities(spec)
    tried = spec.with_name("tried.yaml")
    retry = "by: 4%, confidence: null}]\n    on_gate_failure: {retry: [train: {max_steps: x3}, seed: 4]}"
    tried.write_text(tiny.SPEC.replace("by: 1%}]", retry))
    done = run(tried, "--until", "knowledge")
    assert done.returncode == 0, done.stderr
    first, second = "knowledge (attempt 1 of 3: as written)", "knowledge (attempt 2 of 3: max_steps 36)"
    assert f"run      1 {second} (cpt, spectrum): attempt 2 of 3: max_steps 36" in done.stdout
    assert "attempt 1 of 3 (as written): refused by its gates" in done.stdout
    assert "attempt 3 of 3 (seed 4): only if the gates refuse those before it" in done.stdout
    assert f"gate failed {first}: domain" in done.stdout
    assert f"gate passed {second}: domain" in done.stdout
    assert f"{second}: train" in done.stderr
    database = spec.parent / "artifacts/.prefect/prefect.db"
    with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as connection:
        flows = dict(connection.execute("select name, state_name from flow_run").fetchall())
        kept = dict(connection.execute("select key, type from artifact where key is not null").fetchall())
    assert (flows[second], flows["run: " + str(tried)]) == ("Passed", "Passed")
    assert kept["tiny-knowledge-attempt-2-gates"] == "table"
    assert len(list(spec.parent.glob("artifacts/tiny/01-knowledge-*"))) == 2
    harder = tried.with_name("harder.yaml")
    harder.write_text(tried.read_text().replace("by: 4%", "by: 90%").replace(", seed: 4", ""))
    refused = run(harder, "--no-prefect", "--until", "knowledge")
    assert refused.returncode == 3
    best = "stage knowledge (attempt 2 of 2: max_steps 36): all 2 attempts were refused, and this is the best: 1 of 1"
    assert best in refused.stderr
    assert identities(spec).keys() == before.keys()


def test_an_edited_stage_reruns_with_those_after_it(tmp_path: Path) -> None:
    spec = tiny.write_project(tmp_path)
    assert run(spec, "--no-prefect", "--until", "answers").returncode == 0
    before = identities(spec)
    assert set(before) == {"base", "knowledge", "answers"}
    spec.write_text(tiny.SPEC.replace("learning_rate: 1e-2, max_steps: 12", "learning_rate: 8e-3, max_steps: 12"))
    done = run(spec, "--no-prefect", "--until", "answers")
    assert done.returncode == 0, done.stderr
    assert "keep     1 knowledge" in done.stdout
    assert "changed: train.learning_rate: 0.01 -> 0.008" in done.stdout
    assert "knowledge: train" not in done.stderr
    after = identities(spec)
    assert (after["base"], after["knowledge"]) == (before["base"], before["knowledge"])
    forced = run(spec, "--no-prefect", "--from", "answers", "--until", "answers")
    assert forced.returncode == 0
    assert "forced by --from answers" in forced.stdout
    assert "answers: train" in forced.stderr
    assert identities(spec)["answers"] == after["answers"]  # trained anew, to the same bytes


@pytest.fixture
def slow_project(tmp_path: Path) -> Path:
    """A first stage long enough to be interrupted, with a checkpoint at every tenth step."""
    text = tiny.SPEC.replace(
        "max_steps: 12, sequence_length: 64", "max_steps: 500, checkpoint_every: 10, sequence_length: 64"
    )
    return tiny.write_project(
        tmp_path, text.replace("pairs: {kind", "unused: {kind").replace("metric: pairs", "metric: qa")
    )


def until_first_checkpoint(spec: Path) -> None:
    wait_for(lambda: list(spec.parent.glob("artifacts/tiny/.work/*/checkpoints/*/seal.json")), "a first checkpoint")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_killed_anywhere_it_goes_on_and_leaves_nothing_behind(slow_project: Path, number: signal.Signals) -> None:
    command = [*TRIVIUM, "run", str(slow_project), "--no-prefect", "--until", "knowledge"]
    with subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as child:
        until_first_checkpoint(slow_project)
        assert stage_processes(child.pid)
        child.send_signal(number)
        code = child.wait(DEADLINE)
    assert code == (-9 if number == signal.SIGKILL else 75)
    wait_for(lambda: not stage_processes(child.pid), "the stage's processes to end")
    assert "knowledge" not in identities(slow_project)
    resumed = run(slow_project, "--no-prefect", "--until", "knowledge")
    assert resumed.returncode == 0, resumed.stderr
    assert "resumes at step" in resumed.stdout
    assert "resuming at step" in resumed.stderr


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, httpx.Client]]:
    root = tmp_path_factory.mktemp("served") / "artifacts"
    with project_server(root) as url:
        name, _, password = (root / ".prefect/credentials").read_text().strip().partition(":")
        with httpx.Client(base_url=url, auth=(name, password), timeout=30) as client:
            yield root, client


def test_a_run_that_is_cancelled_in_the_ui_ends_with_its_whole_tree(
    slow_project: Path, server: tuple[Path, httpx.Client]
) -> None:
    root, client = server
    command = [*TRIVIUM, "run", str(slow_project), "--root", str(root), "--until", "knowledge"]
    with subprocess.Popen(
        command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as child:
        wait_for(lambda: list(root.glob("tiny/.work/*/checkpoints/*/seal.json")), "a first checkpoint")
        token = client.get("/csrf-token", params={"client": "test"}).json()["token"]
        headers = {"Prefect-Csrf-Token": token, "Prefect-Csrf-Client": "test"}
        runs = client.post("/flow_runs/filter", json={}, headers=headers).json()
        [parent] = [one for one in runs if one["parent_task_run_id"] is None]
        body = {"state": {"type": "CANCELLING", "name": "Cancelling"}, "force": True}
        client.post(f"/flow_runs/{parent['id']}/set_state", json=body, headers=headers).raise_for_status()
        errors = child.communicate(timeout=DEADLINE)[1]
    assert child.returncode == 75
    assert "trivium: cancelled; run again to go on from the last checkpoint" in errors
    assert not stage_processes(child.pid)
    state = client.get(f"/flow_runs/{parent['id']}").json()["state"]
    assert state["type"] == "CANCELLED"


def test_two_runs_of_one_spec_do_not_meet(slow_project: Path) -> None:
    command = [*TRIVIUM, "run", str(slow_project), "--no-prefect", "--until", "knowledge"]
    with subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as first:
        until_first_checkpoint(slow_project)
        [job] = slow_project.parent.glob("artifacts/tiny/.jobs/knowledge-*.json")
        before = job.stat()
        second = run(slow_project, "--no-prefect", "--until", "knowledge")
        after = job.stat()
        first.send_signal(signal.SIGTERM)
        first.wait(DEADLINE)
    assert second.returncode == 75
    assert "is being worked on by process" in second.stderr
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_chat_answers_and_leaves(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    command = [*TRIVIUM, "chat", str(finished[0].parent), "say the", "--max-tokens", "5"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=DEADLINE, env=environment())
    assert (done.returncode, bool(done.stdout.strip())) == (0, True), done.stderr
