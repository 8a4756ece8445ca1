"""Runs of the command line that tests interrupt, and what there is to see of them from outside."""

import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import httpx
import psutil
import tiny

from flows.server import project_server

TRIVIUM = [sys.executable, "-m", "flows.cli"]
DEADLINE = 200
REPOSITORY = Path(__file__).parents[1]
SERVE = f"""
import sys
sys.path.insert(0, {str(REPOSITORY)!r})
if __name__ == "__main__":
    from pathlib import Path
    from flows.server import use_project_server
    use_project_server(Path(sys.argv[1]))
    from flows.served import serve
    serve("served")
"""
ONE_STAGE = tiny.SPEC.partition("  - name: answers")[0].replace(
    "max_steps: 12, sequence_length: 64", "max_steps: 40, checkpoint_every: 10, sequence_length: 64"
)
"""One stage, without the metrics that take seconds."""
SPEC = "\n".join(line for line in ONE_STAGE.splitlines() if not line.startswith(("  qa:", "  pairs:", "  answers:")))


def environment(**settings: str) -> dict[str, str]:
    return os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "200"} | settings


def run(spec: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [*TRIVIUM, "run", str(spec), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=DEADLINE, env=environment())


def wait_for(condition: Callable[[], object], what: str, every: float = 0.05) -> None:
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end, f"timed out: {what}"
        time.sleep(every)


def is_gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def sealed(spec: Path) -> set[str]:
    return {file.parent.name for file in spec.parent.glob("artifacts/tiny/.work/*/checkpoints/*/seal.json")}


def states(spec: Path, name: str | None = None) -> list[str]:
    """The types of the states of all flow and task runs, or of those of one name, from the database itself."""
    with closing(sqlite3.connect(f"file:{spec.parent / 'artifacts/.prefect/prefect.db'}?mode=ro", uri=True)) as found:
        runs = found.execute("select name, state_type from flow_run union all select name, state_type from task_run")
        return [state for one, state in runs.fetchall() if name in (None, one)]


@contextmanager
def serving(spec: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A runner of the deployment `served`, killed at the end."""
    path, log = spec.with_name("serve.py"), spec.with_name("serve.log")
    path.write_text(SERVE)
    with log.open("ab") as output:
        runner = subprocess.Popen(
            [sys.executable, path, spec.parent / "artifacts"], env=environment(), stdout=output, stderr=output
        )
    try:
        yield runner
    finally:
        runner.kill()
        runner.wait()


@contextmanager
def server(spec: Path) -> Iterator[httpx.Client]:
    """The project's server, and a client that asks as the UI does."""
    root = spec.parent / "artifacts"
    with project_server(root) as url:
        login = (root / ".prefect/credentials").read_text().strip().split(":")
        with httpx.Client(base_url=url, auth=httpx.BasicAuth(*login), timeout=60) as client:
            token = client.get("/csrf-token", params={"client": "test"}).raise_for_status().json()["token"]
            client.headers.update({"Prefect-Csrf-Client": "test", "Prefect-Csrf-Token": token})
            yield client
