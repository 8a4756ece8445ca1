"""A stage's process: started, listened to, and ended with its whole tree.

The process of the next step is started while the current one still works, so that its imports cost nothing
(`warm`). It leads a process group of its own and dies with its parent: nothing is left behind by a crash.
"""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from stages.errors import BY_EXIT_CODE, StageFailed, TryAgain

GRACE = 20.0
"""Seconds between SIGTERM, on which training saves at its next step, and SIGKILL."""
_TICK = 0.5
ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 34), "MALLOC_TOP_PAD_": str(1 << 26)}
"""glibc's malloc in a stage's process: keep large blocks instead of asking the kernel for zeroed pages at every
layer. On a CPU that was a tenth to a fifth of a training step; the process ends soon and gives all of it back."""

Event = dict[str, Any]
_standby: "StageProcess | None" = None


class StageProcess:
    """One ``python -m stages.run``, and the events that it sends."""

    def __init__(self, kind: str) -> None:
        """Start it; it imports what a job of this kind needs and waits for one. Call from the main thread."""
        self._child = subprocess.Popen(  # noqa: S603 - our own module, no shell
            [sys.executable, "-m", "stages.run", "--wait", str(os.getpid()), kind],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            start_new_session=True,
            env=ALLOCATOR | os.environ,
        )
        self._events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        # A thread of its own: a slow reader must never fill the pipe and stall the training behind it.
        threading.Thread(target=self._pump, daemon=True).start()

    def begin(self, job: Path) -> None:
        """Hand over the job file; if the process is dead already, `events` says so."""
        with suppress(BrokenPipeError):
            if self._child.stdin is not None:
                self._child.stdin.write(f"{job}\n")
                self._child.stdin.close()

    def events(self, cancelled: Callable[[], bool]) -> Iterator[Event]:
        """Every event until the process ends.

        Raises:
            TriviumError: the process failed; the class follows from its exit code.
            TryAgain: ``cancelled`` turned true; the process and its children are gone.
        """
        reason = None
        while True:
            try:
                event = self._events.get(timeout=_TICK)
            except queue.Empty:
                if cancelled():
                    self.stop()
                    raise TryAgain("cancelled; run again to go on from the last checkpoint") from None
                continue
            if event is None:
                break
            if event["event"] == "failed":
                reason = event["reason"]
            yield event
        code = self._child.wait()
        if code:
            raise BY_EXIT_CODE.get(code, StageFailed)(reason or _death(code))

    def stop(self) -> None:
        """End the process and everything it started: SIGTERM, a grace period, SIGKILL."""
        for number, seconds in ((signal.SIGTERM, GRACE), (signal.SIGKILL, GRACE)):
            if not _signal_group(self._child.pid, number):
                break
            deadline = time.monotonic() + seconds
            while time.monotonic() < deadline and _signal_group(self._child.pid, 0):
                with suppress(subprocess.TimeoutExpired):
                    self._child.wait(timeout=0.1)
        with suppress(subprocess.TimeoutExpired):
            self._child.wait(timeout=1)

    def _pump(self) -> None:
        for line in self._child.stdout or ():
            with suppress(ValueError):
                self._events.put(json.loads(line))
        self._events.put(None)


def warm(kind: str) -> None:
    """Start the process of the next step now; ``kind`` is its job's."""
    global _standby  # noqa: PLW0603 - at most one waits
    if _standby is None:
        _standby = StageProcess(kind)


def start(kind: str, job: Path) -> StageProcess:
    """The waiting process, or a new one, at work on ``job``."""
    global _standby
    warm(kind)
    process, _standby = _standby, None
    if process is None:
        raise StageFailed("no process could be started")
    process.begin(job)
    return process


def dismiss() -> None:
    """End the waiting process, if there is one."""
    global _standby  # noqa: PLW0603
    if _standby is not None:
        _standby.stop()
        _standby = None


def _signal_group(group: int, number: int) -> bool:
    """Send a signal to every process of a group; False when none is left."""
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def _death(code: int) -> str:
    if code < 0:
        name = signal.Signals(-code).name
        hint = " (out of memory? lower train.micro_batch_size)" if name == "SIGKILL" else ""
        return f"the stage's process was killed by {name}{hint}; run again, it resumes at its last checkpoint"
    return f"the stage's process ended with exit code {code} and gave no reason; its log is beside its job"
