"""The project's Prefect server: closed to strangers, scheduling, shared history, nothing left behind."""

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from flows import server

pytestmark = pytest.mark.flow
REPOSITORY = Path(__file__).parents[2]
START = f"""
import sys; sys.path.insert(0, {str(REPOSITORY)!r})
from pathlib import Path
from flows import server
"""
EMBEDDED_RUN = """
print(repr(server.use_project_server(Path(sys.argv[1]))))
ready = server.embed_server(Path(sys.argv[1]))
from prefect import flow, get_client, settings
ready()
@flow(name="embedded")
def embedded(): return 7
assert embedded() == 7
print(settings.PREFECT_HOME.value())
print(settings.get_current_settings().server.analytics_enabled)
print(settings.get_current_settings().client.max_retries)
import psutil
[own] = psutil.Process().children()
print(*{one.laddr.ip for one in own.net_connections("inet") if one.status == psutil.CONN_LISTEN})
import httpx
print(httpx.get(settings.PREFECT_API_URL.value() + "/admin/version", trust_env=False).status_code)
"""
SCHEDULED_FLOW = """
if __name__ == "__main__":
    server.use_project_server(Path(sys.argv[1]))
from prefect import flow
@flow(name="ticking")
def ticking(): pass
if __name__ == "__main__":
    ticking.serve(name="every-few-seconds", interval=5)
"""


@pytest.fixture(autouse=True)
def without_the_users_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("PREFECT_")]:
        monkeypatch.delenv(name)


def script(path: Path, body: str) -> Path:
    path.write_text(START + textwrap.dedent(body))
    return path


def python(script_path: Path, root: Path, **env: str) -> str:
    command = [sys.executable, script_path, root]
    done = subprocess.run(command, env=os.environ | env, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def eventually(check: Callable[[], Any], seconds: float) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := check():
            return found
        time.sleep(0.2)
    raise AssertionError(f"not within {seconds} s: {check}")


def login(root: Path) -> str:
    return (root / ".prefect" / "credentials").read_text()


@contextmanager
def client_of(root: Path, url: str) -> Iterator[httpx.Client]:
    """A client as a program has it: with the login and a CSRF token."""
    auth = httpx.BasicAuth(*login(root).split(":"))
    with httpx.Client(base_url=url, auth=auth, trust_env=False, timeout=30) as client:
        token = client.get("/csrf-token", params={"client": "test"}).raise_for_status().json()["token"]
        client.headers.update({"Prefect-Csrf-Client": "test", "Prefect-Csrf-Token": token})
        yield client


def listed(client: httpx.Client, what: str, **body: Any) -> list[dict[str, Any]]:
    answer = client.post(f"/{what}/filter", json=body)
    return [] if answer.status_code == 503 else answer.raise_for_status().json()  # 503: SQLite is locked


def posted(client: httpx.Client, path: str, body: Any) -> Any:
    def answer() -> list[Any] | None:
        found = client.post(path, json=body)
        return None if found.status_code == 503 else [found.raise_for_status().content and found.json()]

    return eventually(answer, 60)[0]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("project")


@pytest.fixture(scope="module")
def other_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second project: its tests start servers of their own, on one database, which is slow to create."""
    return tmp_path_factory.mktemp("other")


@pytest.fixture(scope="module")
def embedded_output(root: Path) -> str:
    """A run on the embedded server, before any other server used the root; the proxy must not be asked."""
    path = script(root / "embedded.py", EMBEDDED_RUN)
    own = {"PREFECT_PROFILE": "of-the-user", "PREFECT_CLIENT_MAX_RETRIES": "2"}
    return python(path, root, HTTP_PROXY="http://127.0.0.1:9", **own)


@pytest.fixture(scope="module")
def url(root: Path, embedded_output: str) -> Iterator[str]:
    with server.project_server(root) as url:
        yield url


@pytest.fixture(scope="module")
def client(root: Path, url: str) -> Iterator[httpx.Client]:
    with client_of(root, url) as client:
        yield client


def record(root: Path) -> dict[str, Any]:
    return json.loads((root / ".prefect" / "server.json").read_text())


def test_the_embedded_server_uses_the_project_home_on_loopback_with_a_login(root: Path, embedded_output: str) -> None:
    """And how long its client tries again is the user's to say."""
    assert embedded_output.split() == ["''", str(root / ".prefect"), "False", "2", "127.0.0.1", "401"]
    assert (root / ".prefect" / "prefect.db").exists()


def test_a_run_of_the_embedded_server_is_listed_later(client: httpx.Client) -> None:
    embedded = {"name": {"any_": ["embedded"]}}
    runs = eventually(lambda: listed(client, "flow_runs", flows=embedded), 20)
    assert [run["state_name"] for run in runs] == ["Completed"]


def test_strangers_get_health_and_nothing_else(url: str, client: httpx.Client) -> None:
    evil = {"Origin": "https://evil.example"}
    with httpx.Client(base_url=url, trust_env=False, headers=evil) as stranger:
        healthy = stranger.get("/health")
        assert healthy.status_code == 200
        assert "access-control-allow-origin" not in healthy.headers
        answer = stranger.post("/flow_runs/filter", json={})
        assert answer.status_code in {401, 403}  # CSRF protection answers before the login is asked for
        assert stranger.get("/admin/version").status_code == 401
        token = {
            "Prefect-Csrf-Client": "test",
            "Prefect-Csrf-Token": client.headers["Prefect-Csrf-Token"],
        }
        assert stranger.post("/flow_runs/filter", json={}, headers=token).status_code == 401
    without_token = httpx.post(f"{url}/flow_runs/filter", json={}, auth=client.auth, trust_env=False)
    assert without_token.status_code == 403
    assert client.post("/flow_runs/filter", json={}).status_code == 200


def test_it_listens_on_loopback_only(root: Path, url: str) -> None:
    listening = [
        connection.laddr.ip
        for connection in psutil.Process(record(root)["pid"]).net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert listening == ["127.0.0.1"]


def test_secrets_are_for_the_owner_only(root: Path, url: str) -> None:
    modes = {p: (root / p).stat().st_mode & 0o777 for p in (".prefect", ".prefect/credentials")}
    assert modes == {".prefect": 0o700, ".prefect/credentials": 0o600}
    assert login(root) not in (root / ".prefect" / "server.log").read_text()


def test_a_scheduled_run_fires(root: Path, client: httpx.Client) -> None:
    """Guards the pin of SQLAlchemy: with 2.1, schedules look active and no run is ever created."""
    path = script(root / "ticking.py", SCHEDULED_FLOW)
    log = root / "ticking.log"

    def fired() -> list[dict[str, Any]]:
        assert serving.poll() is None, log.read_text()
        runs = listed(client, "flow_runs", flow_runs={"state": {"type": {"any_": ["COMPLETED"]}}})
        return [run for run in runs if run["auto_scheduled"]]

    with log.open("wb") as output:
        serving = subprocess.Popen([sys.executable, path, root], stdout=output, stderr=output)
    try:
        assert eventually(fired, 90)[0]["state_name"] == "Completed"
    finally:
        serving.terminate()
        serving.wait(timeout=60)


def test_a_process_uses_the_running_server(
    root: Path, url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = script(tmp_path / "uses.py", "print(server.use_project_server(Path(sys.argv[1])))")
    assert python(path, root).strip() == url
    assert python(path, root, PREFECT_API_URL="http://other.example/api").strip() == "http://other.example/api"


def test_a_second_server_for_the_project_is_refused(root: Path, url: str) -> None:
    with pytest.raises(server.ServerError, match=f"already runs at {url.removesuffix('/api')}: use it"):
        server.serve_ui(root, open_browser=False)


def test_it_stops_restarts_and_keeps_one_automation(other_root: Path) -> None:
    for _ in range(2):
        with server.project_server(other_root) as url, client_of(other_root, url) as client:
            pid = record(other_root)["pid"]
            found = eventually(lambda client=client: listed(client, "automations"), 20)
            assert [automation["name"] for automation in found] == [server.ZOMBIE_AUTOMATION["name"]]
        assert not psutil.pid_exists(pid)
        assert not (other_root / ".prefect" / "server.json").exists()


@pytest.mark.parametrize("stale", ["dead pid", "port of somebody else", "not json", "wrong shape"])
def test_a_stale_record_is_not_believed(tmp_path: Path, root: Path, url: str, stale: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        free = listener.getsockname()[1]
    text = {
        "dead pid": json.dumps({"url": f"http://127.0.0.1:{free}/api", "pid": 2**22 + 1}),
        "port of somebody else": json.dumps({"url": url, "pid": os.getpid()}),  # another project's server
        "not json": "{",
        "wrong shape": "[1]",
    }[stale]
    (tmp_path / ".prefect").mkdir()
    (tmp_path / ".prefect" / "server.json").write_text(text)
    path = script(tmp_path / "uses.py", "print(repr(server.use_project_server(Path(sys.argv[1]))))")
    assert python(path, tmp_path).strip() == "''"


def test_the_ui_runs_until_sigterm(other_root: Path) -> None:
    path = script(other_root / "ui.py", "server.serve_ui(Path(sys.argv[1]), open_browser=False)")
    with subprocess.Popen([sys.executable, path, other_root], stdout=subprocess.PIPE, text=True) as ui:
        assert ui.stdout is not None
        line = ui.stdout.readline()
        pid = record(other_root)["pid"]
        assert login(other_root) in line
        assert record(other_root)["url"].removesuffix("/api") in line
        ui.send_signal(signal.SIGTERM)
        assert ui.wait(timeout=30) == 0
    assert not psutil.pid_exists(pid)
    assert not (other_root / ".prefect" / "server.json").exists()


def test_a_killed_ui_takes_its_server_along(other_root: Path) -> None:
    path = script(other_root / "ui.py", "server.serve_ui(Path(sys.argv[1]), open_browser=False)")
    with subprocess.Popen([sys.executable, path, other_root], stdout=subprocess.PIPE, text=True) as ui:
        assert ui.stdout is not None
        ui.stdout.readline()
        pid = record(other_root)["pid"]
        ui.kill()
    eventually(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE, 30)


def test_a_run_without_heartbeat_crashes_and_one_that_waits_for_a_person_does_not(
    other_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trigger = server.ZOMBIE_AUTOMATION["trigger"] | {"within": 10}
    monkeypatch.setattr(server, "ZOMBIE_AUTOMATION", server.ZOMBIE_AUTOMATION | {"trigger": trigger})
    with server.project_server(other_root) as url, client_of(other_root, url) as client:
        flow = posted(client, "/flows/", {"name": "left"})["id"]
        runs = []
        for _ in range(2):
            body = {"flow_id": flow, "state": {"type": "RUNNING"}}
            runs.append(posted(client, "/flow_runs/", body)["id"])
            beat = {
                "event": "prefect.flow-run.heartbeat",
                "resource": {"prefect.resource.id": f"prefect.flow-run.{runs[-1]}"},
                "occurred": datetime.now(UTC).isoformat(),
                "id": str(uuid.uuid4()),
            }
            posted(client, "/events", [beat])
        silent, waiting = runs
        paused = {"state": {"type": "PAUSED", "name": "AwaitingApproval"}, "force": True}
        posted(client, f"/flow_runs/{waiting}/set_state", paused)

        def state(run: str) -> dict[str, Any]:
            answer = client.get(f"/flow_runs/{run}")
            return answer.json()["state"] if answer.status_code == 200 else {"type": "503"}

        eventually(lambda: state(silent)["type"] == "CRASHED", 120)
        assert state(silent)["message"] == "No heartbeat for 180 s"
        assert state(waiting)["name"] == "AwaitingApproval"


def test_a_damaged_database_is_named(tmp_path: Path) -> None:
    (tmp_path / ".prefect").mkdir()
    (tmp_path / ".prefect/prefect.db").write_text("no database at all" * 100)
    with pytest.raises(
        server.ServerError, match=r"prefect\.db: Prefect's database is damaged .* use --no-prefect"
    ) as caught:
        server.serve_ui(tmp_path, open_browser=False)
    assert caught.value.exit_code == 2


def test_a_taken_port_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        taken = listener.getsockname()[1]
        with pytest.raises(server.ServerError, match=f"port {taken} is taken"):
            server.serve_ui(tmp_path, port=taken, open_browser=False)


def test_settings_that_come_too_late_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prefect", sys)
    with pytest.raises(server.ServerError, match="call it first"):
        server.use_project_server(tmp_path)
