"""A person decides where gates refuse: in the store, from a terminal, and in Prefect. Nothing is trained twice."""

import json
import os
import shutil
import signal
import subprocess
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import psutil
import pytest
import tiny
from running import SPEC, TRIVIUM, environment, run, server, serving, wait_for

from flows import cli
from flows.engine import Run
from stages.approval import Decision, Question, decide, decision_on, questions
from stages.errors import InvalidInput, TryAgain

pytestmark = pytest.mark.flow
POLICY = "by: 90%, confidence: null}]\n    on_gate_failure: approve"
ANSWERS = (
    "  said: {kind: generation, data: {path: data/instructions.heldout.jsonl}, limit: 3, max_new_tokens: 8}\nstages:"
)
ASKING = (
    SPEC.replace("max_steps: 40, checkpoint_every: 10", "max_steps: 2")
    .replace("by: 1%}]", POLICY)
    .replace("stages:", ANSWERS)
)
HOSTILE = "<img src=x onerror=alert(1)> | **bold** `code`"


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A project whose stage is published, measured and refused, and the run that ended there."""
    spec = tiny.write_project(tmp_path_factory.mktemp("asked"), ASKING)
    rows = [{"messages": [{"role": "user", "content": HOSTILE}, {"role": "assistant", "content": "no"}]}]
    tiny.write_rows(spec.parent / "data/instructions.heldout.jsonl", rows)
    return spec, run(spec, "--no-prefect")


@pytest.fixture
def spec(asked: tuple[Path, object], tmp_path: Path) -> Path:
    return copied(asked[0], tmp_path / "a project")


def copied(spec: Path, folder: Path) -> Path:
    """The project at another place, which the base of its store refers to."""
    shutil.copytree(spec.parent, folder, symlinks=True)
    text = (folder / spec.name).read_text().replace("path: base,", f"path: {spec.parent / 'base'},")
    (folder / spec.name).write_text(text)
    return folder / spec.name


def only_question(spec: Path) -> Question:
    (question,) = questions(Run(spec, spec.parent / "artifacts").plan())
    return question


def made(spec: Path) -> dict[str, str]:
    """What each published step was made at, by its manifest's bytes."""
    return {file.parent.name: file.read_text() for file in spec.parent.glob("artifacts/tiny/[0-9]*/manifest.json")}


def verdict(spec: Path) -> dict:
    (file,) = spec.parent.glob("artifacts/tiny/01-knowledge-*/verdict.json")
    return json.loads(file.read_text())["body"]


def say(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    code = cli._run([str(one) for one in arguments])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def test_a_run_that_waits_for_a_person_ends_and_says_what_to_do(
    asked: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    spec, ended = asked
    assert ended.returncode == 75
    told = ended.stderr.splitlines()[-1]
    assert told.startswith("trivium: stage knowledge waits for a person: 1 of 1 gates failed: domain")
    assert f'`trivium approve {spec} --why "..."` (or reject)' in told
    assert f"`trivium run {spec}`" in told
    assert "decision knowledge: waits for a person" in ended.stdout
    assert "decision" not in verdict(spec)


def test_after_an_approval_the_chain_goes_on_and_nothing_is_made_twice(
    spec: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_TOKEN", "very-secret-value")
    before = made(spec)
    code, told = say(capsys, "plan", spec)
    assert (code, "waits for a person" in told) == (0, True)
    why = "fits the\n\x1b[2Jproduct, very-secret-value, «ñ»"
    code, told = say(capsys, "approve", spec.parent, "--why", why, "--who", "Ada")
    assert (code, told.splitlines()[-1]) == (0, f"go on with: trivium run '{spec}'")
    kept = decision_on(only_question(spec))
    assert kept is not None
    assert (kept.answer, kept.who) == ("approve", "Ada")
    assert kept.why == "fits the \\x1b[2Jproduct, [redacted], «ñ»"
    assert verdict(spec)["decision"] == kept.as_record()
    code, told = say(capsys, "show", spec)
    assert f"decision knowledge: approved by Ada on {kept.when}: {kept.why}" in told
    code, told = say(capsys, "run", spec, "--no-prefect", "--until", "knowledge")
    assert code == 0
    assert "Nothing changed: every step is published, and every gate passes or a person approved." in told
    assert made(spec) == before
    code, told = say(capsys, "verify", spec.parent)
    assert (code, "1 decision" in told) == (0, True)


def test_after_a_rejection_the_run_ends_with_3_and_says_who_and_why(
    spec: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert say(capsys, "reject", spec, "--why", "it lost its manners", "--who", "Ada")[0] == 0
    code, told = say(capsys, "run", spec, "--no-prefect")
    assert code == 3
    assert "trivium: stage knowledge: rejected by Ada on 20" in told
    assert ": it lost its manners. 1 of 1 gates failed" in told
    code, told = say(capsys, "approve", spec, "--why", "on second thoughts", "--who", "Bob")
    assert code == 2
    assert "stage knowledge was decided already: rejected by Ada" in told


def test_another_verdict_asks_again_and_the_old_one_keeps_its_answer(
    spec: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert say(capsys, "approve", spec, "--why", "yes", "--who", "Ada")[0] == 0
    text = spec.read_text()
    spec.write_text(text.replace("by: 90%", "by: 91%"))
    assert say(capsys, "run", spec, "--no-prefect")[0] == 75
    spec.write_text(text.replace("by: 90%", "by: 0.00001%"))
    assert questions(Run(spec, spec.parent / "artifacts").plan()) == []
    code, told = say(capsys, "approve", spec, "--why", "yes")
    assert (code, "nothing waits for a decision: every gate passes" in told) == (2, True)
    spec.write_text(text)
    assert decision_on(only_question(spec)) is not None


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.write_text(file.read_text().replace("reject", "approve")),
        lambda file: file.write_text(""),
        lambda file: (file.rename(file.with_name("x")), file.symlink_to("x")),
        lambda file: file.write_text('{"sha256": "0", "body": NaN}'),
    ],
)
def test_a_decision_changed_by_hand_counts_as_none_and_is_told(
    spec: Path, capsys: pytest.CaptureFixture[str], damage
) -> None:
    assert say(capsys, "reject", spec, "--why", "no", "--who", "Ada")[0] == 0
    damage(only_question(spec).file)
    code, told = say(capsys, "run", spec, "--no-prefect")
    assert code == 75
    assert "it counts as none" in told
    code, told = say(capsys, "verify", spec.parent)
    assert (code, "decide again" in told) == (4, True)
    code, told = say(capsys, "approve", spec, "--why", "yes", "--who", "Bob")
    assert (code, "it counts as none" in told) == (0, True)
    kept = decision_on(only_question(spec))
    assert kept is not None
    assert kept.who == "Bob"


def test_of_two_decisions_at_once_the_first_counts(spec: Path) -> None:
    plan = Run(spec, spec.parent / "artifacts").plan()
    question = only_question(spec)
    came: list[Decision] = []
    gate = threading.Barrier(4)

    def answer(number: int) -> None:
        gate.wait()
        with suppress(TryAgain):
            came.append(decide(plan, question, "approve" if number % 2 else "reject", who=f"p{number}", why="so"))

    deciders = [threading.Thread(target=answer, args=(number,)) for number in range(4)]
    for one in deciders:
        one.start()
    for one in deciders:
        one.join()
    assert set(came) == {decision_on(question)}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["approve", "{spec}", "--why", " \n "], "why is empty"),
        (["approve", "{spec}", "--why", "x" * 2001], "why has 2,001 characters; at most 2,000 are kept"),
        (["reject", "{spec}", "--why", "x", "--who", ""], "who is empty"),
        (["approve", "{spec}", "--why", "x", "--stage", "wisdom"], "no such stage; stages: knowledge"),
        (["approve", "{spec}.yaml", "--why", "x"], "no such file; name a spec"),
        (["approve", "{spec}/none", "--why", "x"], "no such file; name a spec"),
        (["approve", "{tmp}", "--why", "x"], "spec.yaml: no such file"),
        (["approve", "quick-fox", "--why", "x"], "no Prefect server answers that could know a run of this name"),
        (["approve", "0" * 400, "--why", "x"], "no Prefect server answers"),
    ],
)
def test_what_cannot_be_decided_is_told(
    spec: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], told: str
) -> None:
    given = [one.format(spec=spec, tmp=tmp_path) for one in arguments]
    code, said = say(capsys, *given)
    assert (code, told in said) == (2, True), said
    assert decision_on(only_question(spec)) is None


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (("on_gate_failure: approve", "on_gate_failure: stop"), "on_gate_failure is not approve"),
        (("max_steps: 2", "max_steps: 3"), "knowledge has not run yet"),
    ],
)
def test_where_nothing_waits_it_is_told_why(
    spec: Path, capsys: pytest.CaptureFixture[str], edit: tuple[str, str], told: str
) -> None:
    spec.write_text(spec.read_text().replace(*edit))
    code, said = say(capsys, "reject", spec, "--why", "x")
    assert (code, told in said) == (2, True), said


def test_a_name_that_is_no_text_is_kept_as_text(spec: Path) -> None:
    plan = Run(spec, spec.parent / "artifacts").plan()
    kept = decide(plan, only_question(spec), "approve", who="Ad\udce9", why="so")
    assert kept.who == "Ad\\udce9"
    with pytest.raises(InvalidInput, match="why is empty"):
        decide(plan, only_question(spec), "approve", who="Ada", why="")


def api(client: httpx.Client, path: str, **body: Any) -> Any:
    answer = client.post(path, json=body) if body else client.get(path)
    return answer.raise_for_status().json()


def state(client: httpx.Client, run: str) -> dict[str, Any]:
    answer = client.get(f"/flow_runs/{run}")
    return answer.json()["state"] if answer.status_code == 200 else {"type": "unknown"}  # 503: SQLite is locked


def started(client: httpx.Client, spec: Path) -> str:
    wait_for(lambda: client.get("/deployments/name/trivium/served").status_code == 200, "the deployment", 0.5)
    deployment = api(client, "/deployments/name/trivium/served")["id"]
    parameters = {"spec": str(spec), "root": str(spec.parent / "artifacts")}
    body = {"parameters": parameters, "state": {"type": "SCHEDULED"}}
    return str(api(client, f"/deployments/{deployment}/create_flow_run", **body)["id"])


def waits(client: httpx.Client, runner: subprocess.Popen[bytes], run: str) -> None:
    """The run is suspended and its process has ended."""
    wait_for(lambda: state(client, run)["type"] in {"PAUSED", "FAILED", "CRASHED"}, "the run to wait", 0.5)
    assert state(client, run)["name"] == "Suspended", state(client, run)
    assert state(client, run)["state_details"]["pause_timeout"] is None
    wait_for(lambda: not flow_processes(runner), "its process to end")


def flow_processes(runner: subprocess.Popen[bytes]) -> list[psutil.Process]:
    return [one for one in psutil.Process(runner.pid).children(recursive=True) if "tracker" not in str(one.cmdline())]


def form(client: httpx.Client, run: str, part: str) -> Any:
    key = state(client, run)["state_details"]["run_input_keyset"][part]
    return api(client, f"/flow_runs/{run}/input/{key}")


def ended(client: httpx.Client, run: str) -> dict[str, Any]:
    wait_for(lambda: state(client, run)["type"] in {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}, "the end", 0.5)
    return state(client, run)


def stages(client: httpx.Client, run: str) -> list[tuple[str, str]]:
    found = client.post(
        "/flow_runs/filter", json={"flow_runs": {"parent_flow_run_id": {"any_": [run]}}, "sort": "START_TIME_ASC"}
    )
    return [(one["name"], one["state"]["name"]) for one in found.raise_for_status().json()]


def test_a_served_run_waits_through_the_death_of_server_and_runner_and_goes_on_where_it_was(spec: Path) -> None:
    spec.write_text(spec.read_text().replace("name: knowledge", "name: its_knowledge"))
    before = made(spec)
    with server(spec) as client, serving(spec) as runner:
        run = started(client, spec)
        waits(client, runner, run)
        shown = form(client, run, "description")
        runner.send_signal(signal.SIGKILL)
        os.kill(json.loads((spec.parent / "artifacts/.prefect/server.json").read_text())["pid"], signal.SIGKILL)
    assert "| domain improves on base by 90\\%\\, by its value alone | **failed** |" in shown
    assert "\\<img src\\=x onerror\\=alert\\(1\\)\\> \\| \\*\\*bold\\*\\*" in shown
    assert "| prompt | base | its\\_knowledge |" in shown
    with server(spec) as client, serving(spec):
        assert state(client, run)["name"] == "Suspended"
        for wrong in (
            {"decision": "maybe", "reviewer": "Ada", "why": "x"},
            {"decision": "approve", "reviewer": " ", "why": "x"},
            {},
        ):
            assert api(client, f"/flow_runs/{run}/resume", run_input=wrong)["status"] == "REJECT"
        given = {"decision": "approve", "reviewer": "Ada", "why": "it knows enough"}
        assert api(client, f"/flow_runs/{run}/resume", run_input=given)["status"] == "ACCEPT"
        assert (ended(client, run)["type"], state(client, run)["name"]) == ("COMPLETED", "Passed")
        assert stages(client, run)[-3:] == [("base", "Cached"), ("its_knowledge", "Approved"), ("release", "Passed")]
        kept = verdict(spec)["decision"]
        assert (kept["answer"], kept["who"], kept["why"]) == ("approve", "Ada", "it knows enough")
        assert {name: text for name, text in made(spec).items() if name in before} == before
        assert "Released" in next(spec.parent.glob("artifacts/*/report.html")).read_text()  # nobody sat at a terminal
        decided_from_a_terminal(client, spec)


def decided_from_a_terminal(client: httpx.Client, spec: Path) -> None:
    """Another verdict asks again; the release is there, so nothing is made."""
    before = made(spec)
    spec.write_text(spec.read_text().replace("by: 90%", "by: 91%"))
    run = started(client, spec)
    wait_for(lambda: state(client, run)["type"] == "PAUSED", "the run to wait", 0.5)
    command = [*TRIVIUM, "reject", run, "--why", "not enough", "--who", "Bob"]
    told = subprocess.run(command, capture_output=True, text=True, check=False, env=environment(), cwd=spec.parent)
    assert told.returncode == 0, told.stderr
    assert "stage its_knowledge: rejected by Bob on 20" in told.stdout
    assert f"({run}) was resumed" in told.stdout
    assert (ended(client, run)["type"], state(client, run)["name"]) == ("FAILED", "GateFailed")
    assert "rejected by Bob" in state(client, run)["message"]
    decision = decision_on(only_question(spec))
    assert decision is not None
    assert decision.who == "Bob"
    assert made(spec) == before


def test_a_run_that_a_person_let_go_on_makes_nothing_anew_that_was_forced(spec: Path) -> None:
    from prefect.client.schemas.objects import FlowRun

    from flows.pipeline import _PrefectHooks

    hooks = _PrefectHooks(None)
    forced = Run(spec, spec.parent / "artifacts", from_stage="knowledge")
    for keys, expected in (([], "knowledge"), (["0"], "knowledge"), (["approval-0123456789abcdef-knowledge-0"], None)):
        hooks._run = FlowRun(flow_id=uuid4(), empirical_policy={"pause_keys": set(keys)})
        assert hooks.resumed(forced).from_stage == expected
