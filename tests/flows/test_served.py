"""Runs that a runner starts: cancelled, their runner told to stop, their runner killed. Nothing keeps running."""

import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import tiny
from running import SPEC, is_gone, sealed, server, serving, wait_for

pytestmark = pytest.mark.flow


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_project(tmp_path_factory.mktemp("served"), SPEC.replace("max_steps: 40", "max_steps: 20000"))


@pytest.fixture(scope="module")
def client(spec: Path) -> Iterator[httpx.Client]:
    with server(spec) as client:
        yield client


def started(client: httpx.Client, runner: subprocess.Popen[bytes], spec: Path) -> tuple[str, list[psutil.Process]]:
    """Start a run through the API; its id and the processes of its tree once it has sealed a new checkpoint."""
    before = sealed(spec)

    def deployment() -> dict[str, Any] | None:
        answer = client.get("/deployments/name/trivium/served")
        return answer.json() if answer.status_code == 200 and runner.poll() is None else None

    wait_for(deployment, "the deployment")
    parameters = {"spec": str(spec), "root": str(spec.parent / "artifacts"), "until_stage": "knowledge"}
    body = {"parameters": parameters, "state": {"type": "SCHEDULED"}}
    one = client.post(f"/deployments/{deployment()['id']}/create_flow_run", json=body).raise_for_status().json()
    wait_for(lambda: sealed(spec) - before, "a checkpoint")
    below = psutil.Process(runner.pid).children(recursive=True)
    flow = next(one.parent() for one in below if "stages.run" in one.cmdline())
    assert flow is not None
    return one["id"], [flow, *flow.children(recursive=True)]


def state(client: httpx.Client, run: str) -> str:
    answer = client.get(f"/flow_runs/{run}")
    return answer.json()["state"]["type"] if answer.status_code == 200 else "unknown"  # 503: SQLite is locked


def test_a_run_cancelled_under_its_runner_saves_ends_with_its_tree_and_is_cancelled(
    spec: Path, client: httpx.Client
) -> None:
    with serving(spec) as runner:
        one, tree = started(client, runner, spec)
        before = sealed(spec)
        body = {"state": {"type": "CANCELLING", "name": "Cancelling"}, "force": True}
        client.post(f"/flow_runs/{one}/set_state", json=body).raise_for_status()
        wait_for(lambda: all(map(is_gone, tree)), "the whole tree to end")
        wait_for(lambda: state(client, one) == "CANCELLED", "the state")
    assert sealed(spec) - before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_runner_that_ends_takes_its_runs_along(spec: Path, client: httpx.Client, number: signal.Signals) -> None:
    with serving(spec) as runner:
        one, tree = started(client, runner, spec)
        before = sealed(spec)
        runner.send_signal(number)
        wait_for(lambda: all(map(is_gone, tree)), "the whole tree to end")
        wait_for(lambda: state(client, one) in {"CRASHED", "CANCELLED"}, "the state")
    assert sealed(spec) - before
