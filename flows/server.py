"""A local Prefect server that is safe to leave running.

Prefect's defaults let any web page start runs: no password, no CSRF protection, every origin allowed.
Here every server, the embedded one too, listens on loopback, asks for a password and sends nothing out.

The server that a run starts for itself and the server of `trivium ui` share the database in `<root>/.prefect`, so
each shows the runs of the other. A url is the address of the API (`http://127.0.0.1:4200/api`).
"""

import atexit
import ctypes
import hashlib
import json
import os
import secrets
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
import webbrowser
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote
from urllib.request import getproxies_environment

import httpx

from flows import alive
from stages.errors import InvalidInput, TriviumError

HOST = "127.0.0.1"
DEFAULT_PORT = 4200
# What every run needs, whichever server it talks to.
RUN_SETTINGS = {
    "DO_NOT_TRACK": "1",
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
    "PREFECT_RESULTS_PERSIST_BY_DEFAULT": "false",  # the store is the truth, a second cache could disagree
    "PREFECT_TASKS_DEFAULT_NO_CACHE": "true",
    "PREFECT_WORKER_WEBSERVER_HOST": HOST,  # all interfaces, if somebody switches it on
}
_RETRIES = "PREFECT_CLIENT_MAX_RETRIES"
_WAITS = {_RETRIES: "7"}
"""A default, unlike the others: the waits double from 2 s, so 7 bridge about four minutes, Prefect's 5 only one."""
# Marks a run as crashed when its heartbeats stop. Prefect names the event of a state change by the state's
# name, not its type, so any event of the run must count: a list of the standard names crashes a paused run
# that is called `AwaitingApproval`. The window is six beats: marking a living 20-hour run as crashed costs
# more than marking a dead one late.
ZOMBIE_AUTOMATION: dict[str, Any] = {
    "name": "trivium: a run without heartbeat has crashed",
    "trigger": {
        "type": "event",
        "posture": "Proactive",
        "match": {"prefect.resource.id": "prefect.flow-run.*"},
        "for_each": ["prefect.resource.id"],
        "after": ["prefect.flow-run.heartbeat"],
        "expect": ["prefect.flow-run.*"],
        "threshold": 1,
        "within": 180,
    },
    "actions": [{"type": "change-flow-run-state", "state": "CRASHED", "message": "No heartbeat for 180 s"}],
}


_embedded: "list[subprocess.Popen[bytes]]" = []


class ServerError(TriviumError):
    """The Prefect server cannot be started or used; the message says what to do."""

    exit_code = InvalidInput.exit_code


def use_project_server(root: Path) -> str:
    """Point this process's Prefect at the project's own server. Call it before prefect is imported.

    A server named by PREFECT_API_URL is the user's own and is left alone, with its profile and login.

    Args:
        root: The project's folder.

    Returns:
        The url of the user's server or of a running `trivium ui`; empty when there is none: see `embed_server`.

    Raises:
        ServerError: The home cannot be used, or prefect was imported already and would ignore the settings.
    """
    if own := os.environ.get("PREFECT_API_URL"):
        os.environ.update(_run_settings())
        return own
    home = _home(root)
    if "prefect" in sys.modules and os.environ.get("PREFECT_HOME") != str(home):
        raise ServerError("prefect was imported before use_project_server(); call it first")
    os.environ.pop("PREFECT_API_URL", None)
    os.environ.update(_run_settings() | _server_settings(home, f"http://{HOST}"))
    record = _live_record(home)
    if record:
        os.environ["PREFECT_API_URL"] = record["url"]
    return record["url"] if record else ""


def embed_server(root: Path, *, ready_seconds: float = 120) -> Callable[[], None]:
    """Start a server for this process alone and point its Prefect at it. Call it before prefect is imported.

    Prefect would embed one by itself, in our process group and without a bond to us: Ctrl-C would take it away
    before the run could report, and a kill of the run would leave it behind.

    Returns:
        A function that waits until the server is ready; import prefect meanwhile.

    Raises:
        ServerError: By that function: the server does not start, or its database is damaged.
    """
    home = _home(root)
    _check_database(home)
    with socket.create_server((HOST, 0)) as free:
        port = free.getsockname()[1]
    url, log = f"http://{HOST}:{port}/api", home / "run.log"
    app = "prefect.server.api.server:create_app"
    command = [
        "uvicorn",
        "--factory",
        app,
        "--host",
        HOST,
        "--port",
        str(port),
        "--log-level",
        "error",
        "--lifespan",
        "on",
    ]
    own = {"PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1", "PREFECT_UI_ENABLED": "0"}
    child = _start(command, log, _server_settings(home, f"http://{HOST}") | own)
    _embedded.append(child)
    atexit.register(_stop, child)  # ours first, so it is called last: Prefect still sends what it kept
    os.environ["PREFECT_API_URL"] = url
    return lambda: _wait_until_ready(child, url, home, log, ready_seconds)


def embedded_died() -> bool:
    """Whether this process's own server has ended: it will not come back."""
    return any(child.poll() is not None for child in _embedded)


def serve_ui(root: Path, *, port: int = DEFAULT_PORT, open_browser: bool = True) -> None:
    """Serve the Prefect UI of a project until Ctrl-C or SIGTERM.

    Args:
        root: The project's folder.
        port: The port; when the default one is taken, the next free one is used.
        open_browser: Open the page, if there is a desktop to open it on.

    Raises:
        ServerError: The port is taken, a server already runs, or the server does not start or dies.
    """
    if port == DEFAULT_PORT:
        port = next((p for p in range(port, port + 20) if _is_free(p)), port)
    previous = {number: signal.signal(number, _interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with suppress(KeyboardInterrupt), _serving(root, port, 120) as (url, child):
            page = url.removesuffix("/api")
            sys.stdout.write(f"Prefect UI: {page}  login: {_credentials(_home(root))}  (Ctrl-C stops it)\n")
            sys.stdout.flush()
            # Without a desktop, webbrowser would take over the terminal with a text browser.
            if open_browser and (sys.platform == "darwin" or "DISPLAY" in os.environ):
                webbrowser.open(page)
            child.wait()
            raise ServerError(f"the Prefect server stopped by itself; see {_home(root) / 'server.log'}")
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def project_server(root: Path, *, port: int | None = None, ready_seconds: float = 120) -> Iterator[str]:
    """Start the project's server (on a free port if None), yield its url when it is ready, then stop it.

    Log in with the text of `<root>/.prefect/credentials`. The first start also creates the database.

    Raises:
        ServerError: The port is taken, a server already runs, or the server does not start.
    """
    with _serving(root, port, ready_seconds) as (url, _):
        yield url


@contextmanager
def _serving(root: Path, port: int | None, seconds: float) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    home = _home(root)
    if record := _live_record(home):
        page, pid = record["url"].removesuffix("/api"), record["pid"]
        raise ServerError(f"this project's server already runs at {page}: use it, or stop it with `kill {pid}`")
    if port is None:
        with socket.create_server((HOST, 0)) as free:
            port = free.getsockname()[1]
    elif not _is_free(port):
        raise ServerError(f"port {port} is taken or not allowed; choose another one")
    _check_database(home)
    url, log = f"http://{HOST}:{port}/api", home / "server.log"
    # The user's own PREFECT_API_URL would send our UI to somebody else's server.
    own = {"PREFECT_API_URL": url, "PREFECT_SERVER_UI_API_URL": url}
    settings = _server_settings(home, url.removesuffix("/api")) | own
    child = _start(["prefect", "server", "start", "--host", HOST, "--port", str(port)], log, settings)
    try:
        _wait_until_ready(child, url, home, log, seconds)
        with _client(url, _credentials(home), 10) as client:
            _put_automation(client)
        if alive.dead(root):
            with log.open("ab") as output:
                subprocess.run(  # noqa: S603 - our own module; prefect is not imported here
                    [sys.executable, "-m", "flows.alive", str(root)],
                    env=os.environ | _run_settings() | settings,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    check=False,  # the server serves all the same, and the next one tries again
                )
        _write(home / "server.json", json.dumps({"url": url, "pid": child.pid}), os.replace)
        yield url, child
    finally:
        (home / "server.json").unlink(missing_ok=True)
        _stop(child)


def _home(root: Path) -> Path:
    home = root.resolve() / ".prefect"
    try:
        home.mkdir(parents=True, exist_ok=True)
        home.chmod(0o700)  # the database holds the key to its own secrets
    except OSError as error:
        raise ServerError(f"{home}: {error.strerror}; choose a folder that you own") from error
    return home


def _server_settings(home: Path, origin: str) -> dict[str, str]:
    login = _credentials(home)
    return {
        "PREFECT_HOME": str(home),
        "PREFECT_PROFILE": "ephemeral",  # a profile of the user's is not in this home
        "PREFECT_API_AUTH_STRING": login,
        "PREFECT_SERVER_API_AUTH_STRING": login,
        "PREFECT_SERVER_API_CSRF_PROTECTION_ENABLED": "true",
        "PREFECT_SERVER_API_CORS_ALLOWED_ORIGINS": origin,
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        "PREFECT_SERVER_EPHEMERAL_ENABLED": "true",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
        "PREFECT_SERVER_LOGGING_LEVEL": "ERROR",
        # A proxy for the outside world must not get the requests to our own loopback.
        "no_proxy": ",".join({*getproxies_environment().get("no", HOST).split(","), HOST}),
    }


def _credentials(home: Path) -> str:
    path = home / "credentials"
    if not path.exists():
        with suppress(FileExistsError):  # another process was first: its login holds
            _write(path, f"trivium:{secrets.token_urlsafe(18)}", os.link)
    return path.read_text(encoding="utf-8")


def _write(path: Path, text: str, publish: Callable[[str, Path], None]) -> None:
    """Write a file, mode 600, that readers see whole or not at all."""
    descriptor, name = tempfile.mkstemp(dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        publish(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def _live_record(home: Path) -> dict[str, Any] | None:
    """Read server.json, and believe it only if its server answers to this project's login."""
    try:
        record: dict[str, Any] = json.loads((home / "server.json").read_text(encoding="utf-8"))
        os.kill(record["pid"], 0)
        with _client(record["url"], _credentials(home), 3) as client:
            # Not /health: that one answers anybody, and the port may be another project's by now.
            client.get("/admin/version").raise_for_status()
    except (OSError, ValueError, LookupError, TypeError, OverflowError, httpx.HTTPError, httpx.InvalidURL):
        return None
    return record


def _client(url: str, login: str, seconds: float) -> httpx.Client:
    return httpx.Client(base_url=url, auth=httpx.BasicAuth(*login.split(":")), trust_env=False, timeout=seconds)


def _is_free(port: int) -> bool:
    with socket.socket() as probe, suppress(OSError, OverflowError):
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does: TIME_WAIT is free
        probe.bind((HOST, port))
        return True
    return False


def _run_settings() -> dict[str, str]:
    return _WAITS | {name: os.environ[name] for name in _WAITS if name in os.environ} | RUN_SETTINGS


def _check_database(home: Path) -> None:
    """Name a database that is none: the server would only fail to start."""
    file = home / "prefect.db"
    try:
        with closing(sqlite3.connect(f"file:{quote(str(file))}?mode=ro", uri=True)) as database:
            database.execute("select count(*) from sqlite_master").fetchone()
    except sqlite3.OperationalError:
        return  # not there yet, or in use
    except sqlite3.DatabaseError as error:
        raise ServerError(
            f"{file}: Prefect's database is damaged ({error}). It holds the history that the UI shows; your results "
            f"are not in it and are untouched. Move it away "
            f"(mv {file} {file}.damaged) and run again, or use --no-prefect"
        ) from error


def _start(module: list[str], log: Path, settings: dict[str, str]) -> subprocess.Popen[bytes]:
    with log.open("wb") as output:
        return subprocess.Popen(  # noqa: S603 - our own interpreter and fixed arguments
            [sys.executable, "-m", *module],
            env=os.environ | _run_settings() | settings,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches us alone, and we stop the server in order
            preexec_fn=_die_with_parent,  # noqa: PLW1509 - a kill -9 of ours must not leave the server
        )


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # 1 is PR_SET_PDEATHSIG


def _wait_until_ready(child: subprocess.Popen[bytes], url: str, home: Path, log: Path, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    with _client(url, _credentials(home), 10) as client:
        while child.poll() is None and time.monotonic() < deadline:
            with suppress(httpx.HTTPError):  # not up yet, or 503 while its own start keeps SQLite locked
                if client.get("/health").status_code == 200:
                    return
            time.sleep(0.1)
    end = " | ".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-3:])
    what = f"was not ready in {seconds:g} s" if child.poll() is None else f"exited with {child.returncode}"
    raise ServerError(f"the Prefect server {what}; --no-prefect does without it. {log} ends with: {end}")


def _put_automation(client: httpx.Client) -> None:
    """Create the automation, or update it when our definition changed; a user's switch stays as it is."""
    digest = hashlib.sha256(json.dumps(ZOMBIE_AUTOMATION).encode()).hexdigest()[:8]
    wanted = ZOMBIE_AUTOMATION | {"description": f"Set up by `trivium ui`, definition {digest}."}
    caller = secrets.token_hex()
    token = client.get("/csrf-token", params={"client": caller}).raise_for_status().json()["token"]
    client.headers.update({"Prefect-Csrf-Client": caller, "Prefect-Csrf-Token": token})
    named = {"automations": {"name": {"any_": [wanted["name"]]}}}
    found = client.post("/automations/filter", json=named).raise_for_status().json()
    if not found:
        client.post("/automations/", json=wanted).raise_for_status()
    elif found[0]["description"] != wanted["description"]:
        changed = wanted | {"enabled": found[0]["enabled"]}
        client.put(f"/automations/{found[0]['id']}", json=changed).raise_for_status()


def _interrupt(*_: object) -> None:
    # The stop that follows takes seconds; a second Ctrl-C must not leave it half done.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def _stop(child: subprocess.Popen[bytes]) -> None:
    for number, seconds in ((signal.SIGTERM, 10), (signal.SIGKILL, 10)):
        if child.poll() is None:
            os.killpg(child.pid, number)
            with suppress(subprocess.TimeoutExpired):
                child.wait(timeout=seconds)
