"""A step's process and its parent, for real: hung, stopped, asked, killed. Only the work itself is small."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from tiny import SPEC

from flows import process
from flows.process import Event, StageProcess
from stages import heartbeat
from stages.errors import StageFailed, StageSilent, TryAgain
from stages.job import Job, write_job
from stages.pipeline import load_pipeline

pytestmark = pytest.mark.crash

DEADLINE = 60
FOREVER = [sys.executable, "-c", "import signal; signal.pause()"]
STEP = """
import os, signal, subprocess, sys, threading
from pathlib import Path
from stages import heartbeat, run
from stages.errors import TryAgain
from stages.log import event, phase

BEAT, ORPHANED = 0.05, 300.0
start = heartbeat.start
heartbeat.start = lambda parent: start(parent, beat=BEAT, orphaned=ORPHANED)
run.import_ahead = lambda kind: None

def child():
    event("child", pid=subprocess.Popen({forever!r}).pid)

{body}

run.run_job = work
sys.exit(run.main(sys.argv[1:]))
"""
TRAINING = """
def work(job, preemption):
    preemption.training = True
    with phase("train", {}):
        event("progress", step=1, total=9)
        event("progress", step=2, total=9)
        child()
        while not preemption.asked:
            pass
        event("saving", step=3)
        raise TryAgain("told to stop; kept step 3 of 9")
"""
LONG_STEP = """
def work(job, preemption):
    preemption.training = True
    with phase("train", {}):
        child()
        event("progress", step=1, total=9)
        while not preemption.asked:
            pass
        event("asked")
        while True:
            pass
"""


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """A job file that can be read; what is done with it is the test's."""
    spec = tmp_path / "spec.yaml"
    spec.write_text(SPEC)
    pipeline, _ = load_pipeline(spec)
    file = tmp_path / "jobs/knowledge-1234.json"
    one = Job(
        kind="stage",
        pipeline=pipeline,
        folder=str(tmp_path),
        name="knowledge",
        identity={},
        target=str(tmp_path / "target"),
        work=str(tmp_path / "work"),
        start=None,
        make=True,
        measurements=(),
    )
    write_job(one, file)
    return file


def script(folder: Path, body: str) -> list[str]:
    path = folder / "step.py"
    path.write_text(STEP.replace("{forever!r}", repr(FOREVER)).replace("{body}", textwrap.dedent(body)))
    return [sys.executable, str(path)]


@pytest.fixture
def working(tmp_path: Path, job: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], StageProcess]]:
    """A function: a real process of a step, at work on the job; its work is a piece of Python."""
    monkeypatch.setenv("PYTHONPATH", str(Path(process.__file__).parents[1]))
    started = []

    def start(body: str) -> StageProcess:
        monkeypatch.setattr(process, "_COMMAND", script(tmp_path, body))
        started.append(StageProcess("stage", offline=True))
        started[-1].begin(job, "knowledge")
        return started[-1]

    yield start
    for one in started:
        one._kill()


def until(events: Iterator[Event], kind: str) -> Event:
    return next(event for event in events if event["event"] == kind)


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_until_gone(*pids: int) -> None:
    end = time.monotonic() + DEADLINE
    while not all(map(is_gone, pids)):
        assert time.monotonic() < end, f"still there: {pids}"
        time.sleep(0.02)


# Hung


def test_a_stopped_process_is_taken_for_hung_and_ended(working: Callable[[str], StageProcess]) -> None:
    child = working(TRAINING)
    events = child.events()
    first = until(events, "started")
    os.kill(first["pid"], signal.SIGSTOP)
    child.silence = 0.5
    with pytest.raises(StageSilent, match=r"knowledge: its process gave no sign of life for 0\.5 s") as caught:
        list(events)
    assert caught.value.exit_code == 4
    wait_until_gone(first["pid"])


def test_a_deadlock_goes_silent_though_its_heartbeat_lives(working: Callable[[str], StageProcess], job: Path) -> None:
    child = working("""
        def work(job, preemption):
            lock = threading.Lock()
            with phase("train", {}):
                event("progress", step=7, total=9)
                child()
                lock.acquire()
                lock.acquire()
    """)
    events = child.events()
    grandchild = until(events, "child")["pid"]
    child.silence = 0.5
    with pytest.raises(StageSilent) as caught:
        list(events)
    assert str(caught.value) == (
        "knowledge: its process gave no sign of life for 0.5 s in phase train after step 7, and was ended. "
        f"Its log: {job.with_suffix('.log')}. Run again: it resumes at its last checkpoint"
    )
    wait_until_gone(grandchild)


def compute() -> None:
    sum(number * number for number in range(300_000))


def read_and_write() -> None:
    with Path("/dev/zero").open("rb") as source, Path(os.devnull).open("wb") as sink:
        sink.write(source.read(1 << 20))


@pytest.mark.parametrize("work", [compute, read_and_write])
def test_computing_reading_and_writing_are_signs_of_life(work: Callable[[], None]) -> None:
    life = heartbeat.Life()
    worker = threading.Thread(target=work)  # what the thread that looks does itself is left out
    worker.start()
    worker.join()
    assert life.moves(seconds=0.5)


def test_what_a_child_computes_is_a_sign_of_life() -> None:
    """Compilers and data workers do the work of a process that waits for them."""
    life = heartbeat.Life()
    busy = "import sys\nwhile True: print(sum(n * n for n in range(10**6)), flush=True)"
    with subprocess.Popen([sys.executable, "-S", "-c", busy], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert life.moves(seconds=0.5)
        child.kill()


def test_looking_for_signs_of_life_is_none() -> None:
    life = heartbeat.Life()
    assert not any(life.moves(seconds=heartbeat.BEAT) for _ in range(20))


def test_a_hung_stage_is_shown_as_crashed_with_the_reason() -> None:
    from flows.pipeline import _failed

    state = _failed(StageSilent("knowledge: its process gave no sign of life for 300 s"))
    assert (state.is_crashed(), state.message) == (True, "knowledge: its process gave no sign of life for 300 s")


def test_a_process_is_offline_where_its_spec_is_whatever_the_environment_says(
    working: Callable[[str], StageProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    child = working("""
        def work(job, preemption):
            event("told", offline=os.environ["HF_HUB_OFFLINE"])
    """)
    assert until(child.events(), "told")["offline"] == "1"


# Asked to stop


def test_a_process_that_is_asked_saves_and_ends_and_its_children_are_gone(
    working: Callable[[str], StageProcess],
) -> None:
    child, said = working(TRAINING), []
    events = child.events(say=said.append)
    grandchild = until(events, "child")["pid"]
    child.stop(said.append)
    assert next(events)["event"] == "saving"
    with pytest.raises(TryAgain, match="told to stop; kept step 3 of 9"):
        list(events)
    assert said == [
        f"stopping knowledge: it ends its step and saves a checkpoint, within {child.grace:.0f} s or as long as it "
        "writes; a second Ctrl-C or SIGTERM stops it at once"
    ]
    wait_until_gone(grandchild)


def test_a_cancelled_run_ends_the_same_way(working: Callable[[str], StageProcess]) -> None:
    child = working(TRAINING)
    heard = []
    with pytest.raises(TryAgain, match="cancelled; run again to go on from the last checkpoint"):
        heard.extend(child.events(lambda: child._step == 2))
    assert child._child.returncode == TryAgain.exit_code


def test_an_interrupt_while_it_waits_kills_the_whole_tree_at_once(working: Callable[[str], StageProcess]) -> None:
    child = working(LONG_STEP)
    events = child.events()
    pids = [until(events, name)["pid"] for name in ("started", "child")]
    until(events, "progress")  # what is said, and interrupted here, is of a process that trains
    with pytest.raises(KeyboardInterrupt):
        child.stop(lambda _line: signal.raise_signal(signal.SIGINT))
    wait_until_gone(*pids)


def test_the_grace_is_longer_than_the_longest_step_seen(working: Callable[[str], StageProcess]) -> None:
    child = working(TRAINING)
    assert child.grace == process.GRACE
    until(child.events(), "child")
    child._progressed -= 100  # as if step 2 had been long ago
    child._note({"event": "progress", "phase": "train", "step": 3})
    assert child.grace >= process.GRACE + 200


def test_a_second_sigterm_ends_a_long_step_at_once(working: Callable[[str], StageProcess]) -> None:
    child = working(LONG_STEP)
    events = child.events()
    pid, grandchild = (until(events, name)["pid"] for name in ("started", "child"))
    until(events, "progress")
    os.kill(pid, signal.SIGTERM)
    until(events, "asked")
    os.kill(pid, signal.SIGTERM)
    with pytest.raises(TryAgain, match="told to stop; run again"):
        list(events)
    wait_until_gone(grandchild)


def test_sigterm_from_a_scheduler_and_the_parents_own_are_one_request(working: Callable[[str], StageProcess]) -> None:
    """It may signal every process of a job: the step must not die of the second one."""
    child = working(TRAINING)
    events = child.events()
    pid = until(events, "started")["pid"]
    until(events, "child")
    os.kill(pid, signal.SIGTERM)
    child.stop()
    with pytest.raises(TryAgain, match="told to stop; kept step 3 of 9"):
        list(events)


# Dead, one of the two


def test_what_a_crash_leaves_behind_is_killed(working: Callable[[str], StageProcess], job: Path) -> None:
    child = working("""
        def work(job, preemption):
            child()
            os.kill(os.getpid(), signal.SIGSEGV)
    """)
    events = child.events()
    grandchild = until(events, "child")["pid"]
    with pytest.raises(StageFailed, match="knowledge: its process was killed by SIGSEGV") as caught:
        list(events)
    assert str(job.with_suffix(".log")) in str(caught.value)
    wait_until_gone(grandchild)


PARENT = """
import sys
from pathlib import Path
from flows import process
process._COMMAND = {command!r}
child = process.StageProcess("stage", offline=True)
child.begin(Path({job!r}), "knowledge")
for event in child.events():
    if event["event"] in ("started", "child"):
        print(event["pid"], flush=True)
"""


DEAF = LONG_STEP.replace(
    "def work(job, preemption):",
    """def work(job, preemption):
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)""",
)


@pytest.mark.parametrize("body", [TRAINING, DEAF], ids=["listens", "does not listen"])
def test_a_killed_parent_takes_the_tree_along_even_where_it_does_not_listen(
    body: str, tmp_path: Path, job: Path
) -> None:
    command = script(tmp_path, body)
    step = tmp_path / "step.py"
    step.write_text(step.read_text().replace("ORPHANED = 0.05, 300.0", "ORPHANED = 0.05, 0.1"))
    parent = tmp_path / "parent.py"
    parent.write_text(PARENT.format(command=command, job=str(job)))
    environment = os.environ | {"PYTHONPATH": str(Path(process.__file__).parents[1])}
    with subprocess.Popen([sys.executable, parent], stdout=subprocess.PIPE, text=True, env=environment) as child:
        assert child.stdout is not None
        pids = [int(child.stdout.readline()) for _ in range(2)]
        child.kill()
    wait_until_gone(*pids)
