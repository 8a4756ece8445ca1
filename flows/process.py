"""A stage's process: started, listened to, and ended with its whole tree.

The process of the next step is started while the current one still works, so that its imports cost nothing
(`warm`). It leads a process group of its own and is asked to stop when its parent dies: nothing is left behind by a
crash.
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

from stages.errors import BY_EXIT_CODE, StageFailed, StageSilent, TryAgain
from stages.preemption import ASK

GRACE = 20.0
"""Seconds that a process has at least to end after it was asked to, before it is killed."""
SILENCE = 300.0
"""Seconds without a sign of life (`stages.heartbeat`) after which a process is taken for hung and ended."""
_TICK = 0.5
_COMMAND = (sys.executable, "-m", "stages.run")
_ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 34), "MALLOC_TOP_PAD_": str(1 << 26)}
"""glibc's malloc in a stage's process: keep large blocks instead of asking the kernel for zeroed pages at every
layer. On a CPU that was a tenth to a fifth of a training step; the process ends soon and gives all of it back."""
_OFFLINE = {"HF_HUB_OFFLINE": "1"}
_ASKED = {-signal.SIGTERM, -ASK}
"""How a process ends that is told to stop before it listens, or twice."""

Event = dict[str, Any]
_standby: "StageProcess | None" = None


class StageProcess:
    """One ``python -m stages.run``, and the events that it sends."""

    def __init__(self, kind: str, *, offline: bool) -> None:
        """Start it; it imports what a job of this kind needs and waits for one. Call from the main thread.

        Args:
            kind: the job's.
            offline: never let a library ask the Hugging Face hub, whatever the environment says.
        """
        self._child = subprocess.Popen(  # noqa: S603 - our own module, no shell
            [*_COMMAND, "--wait", str(os.getpid()), kind],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            start_new_session=True,
            env=_ALLOCATOR | os.environ | (_OFFLINE if offline else {}),
        )
        self.silence = SILENCE
        """Seconds without a sign of life after which the process is taken for hung."""
        self._name = "the stage"
        self._log: Path | None = None
        self._phase = ""
        self._step: int | None = None
        self._saving = False
        self._heard = self._progressed = time.monotonic()
        self._longest_gap = 0.0
        self._events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        # A thread of its own: a slow reader must never fill the pipe and stall the training behind it.
        threading.Thread(target=self._pump, daemon=True).start()

    def begin(self, job: Path, name: str) -> None:
        """Hand over the job file of the step ``name``; if the process is dead already, `events` says so."""
        self._name, self._log = name, job.with_suffix(".log")
        self._heard = time.monotonic()
        with suppress(BrokenPipeError):
            if self._child.stdin is not None:
                self._child.stdin.write(f"{job}\n")
                self._child.stdin.close()

    def events(
        self,
        cancelled: Callable[[], bool] = lambda: False,
        say: Callable[[str], None] = lambda _line: None,
    ) -> Iterator[Event]:
        """Every event until the process ends; whatever interrupts the listening ends the process and its children.

        Args:
            cancelled: whether somebody asked for the end; read twice a second.
            say: hears what is being waited for when the process is asked to stop.

        Raises:
            TriviumError: the process failed; the class follows from its exit code.
            StageSilent: it gave no sign of life.
            TryAgain: ``cancelled`` turned true.
        """
        reason = None
        try:
            while (event := self._next(cancelled)) is not None:
                if event["event"] == "failed":
                    reason = event["reason"]
                yield event
            if self._child.returncode is None:
                os.waitid(os.P_PID, self._child.pid, os.WEXITED | os.WNOWAIT)
        finally:
            self.stop(say)
        code = self._child.returncode
        if code in _ASKED:
            raise TryAgain(reason or "the stage's process was told to stop; run again to go on")
        if code:
            raise BY_EXIT_CODE.get(code, StageFailed)(reason or self._death(code))

    def stop(self, say: Callable[[str], None] = lambda _line: None) -> None:
        """Ask the process to end, wait, and kill what is left of it and of everything that it started.

        While it trains it ends its step and writes a checkpoint first. It has `GRACE` for that, or twice the longest
        step seen and `GRACE` more; once it says that it saves, as long as it shows life. A signal that comes
        meanwhile (a second Ctrl-C) kills at once and goes on to the caller.
        """
        if self._child.returncode is not None:
            return
        try:
            if not self._over():
                os.kill(self._child.pid, ASK)  # to it alone: its data workers must serve the step to its end
                deadline = time.monotonic() + self.grace
                if self._phase == "train":
                    say(
                        f"stopping {self._name}: it ends its step and saves a checkpoint, within {self.grace:.0f} s or "
                        "as long as it writes; a second Ctrl-C or SIGTERM stops it at once"
                    )
                while not self._over() and (time.monotonic() < deadline or self._is_writing()):
                    time.sleep(0.05)
        finally:
            self._kill()

    @property
    def grace(self) -> float:
        """Seconds from asking the process to end until it is killed."""
        return GRACE + 2 * self._longest_gap

    def _next(self, cancelled: Callable[[], bool]) -> Event | None:
        while True:
            asked = time.monotonic()
            try:
                return self._events.get(timeout=_TICK)
            except queue.Empty:
                now = time.monotonic()
            # Stopped ourselves (Ctrl-Z, a suspended job), we have heard nothing and must not blame the process.
            self._heard = min(now, self._heard + max(0.0, now - asked - 2 * _TICK))
            if cancelled():
                raise TryAgain("cancelled; run again to go on from the last checkpoint")
            if now - self._heard > self.silence:
                self._kill()
                raise StageSilent(self._silent())

    def _pump(self) -> None:
        assert self._child.stdout is not None  # noqa: S101 - a pipe was asked for
        with self._child.stdout as lines:
            for line in lines:
                with suppress(ValueError):
                    event: Event = json.loads(line)
                    self._heard = time.monotonic()
                    if event["event"] != "beat":
                        self._note(event)
                        self._events.put(event)
        self._events.put(None)

    def _note(self, event: Event) -> None:
        """Keep what a stop, or a report of the process's death, must know."""
        self._phase = event.get("phase", "")
        if event["event"] == "progress":
            if self._step is not None:
                self._longest_gap = max(self._longest_gap, self._heard - self._progressed)
            self._progressed, self._step = self._heard, event["step"]
        elif event["event"] == "saving":
            self._saving = True

    def _is_writing(self) -> bool:
        return self._saving and time.monotonic() - self._heard < self.silence

    def _over(self) -> bool:
        """Whether the process has ended. It is not reaped yet: its id, and its group's, must not become another's."""
        return os.waitid(os.P_PID, self._child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def _kill(self) -> None:
        """Kill what is left of the process's group, and reap it."""
        if self._child.returncode is None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._child.pid, signal.SIGKILL)
            self._child.wait()
        with suppress(BrokenPipeError):
            if self._child.stdin is not None:
                self._child.stdin.close()

    def _silent(self) -> str:
        where = f" in phase {self._phase}" if self._phase else ""
        after = "" if self._step is None else f" after step {self._step}"
        return (
            f"{self._name}: its process gave no sign of life for {self.silence:g} s{where}{after}, and was ended. "
            f"{self._see_log()} Run again: it resumes at its last checkpoint"
        )

    def _death(self, code: int) -> str:
        if code < 0:
            name = signal.Signals(-code).name
            hint = " (out of memory? lower train.micro_batch_size)" if name == "SIGKILL" else ""
            return (
                f"{self._name}: its process was killed by {name}{hint}. {self._see_log()} Run again: it resumes at its "
                "last checkpoint"
            )
        return f"{self._name}: its process ended with exit code {code} and gave no reason. {self._see_log()}"

    def _see_log(self) -> str:
        return f"Its log: {self._log}."


def warm(kind: str, *, offline: bool) -> None:
    """Start the process of the next step now; ``kind`` is its job's."""
    global _standby  # noqa: PLW0603 - at most one waits
    if _standby is None:
        _standby = StageProcess(kind, offline=offline)


def start(kind: str, job: Path, name: str, *, offline: bool) -> StageProcess:
    """The waiting process, or a new one, at work on ``job`` of the step ``name``."""
    global _standby
    warm(kind, offline=offline)
    process, _standby = _standby, None
    if process is None:
        raise StageFailed("no process could be started")
    process.begin(job, name)
    return process


def dismiss() -> None:
    """End the waiting process, if there is one."""
    global _standby  # noqa: PLW0603
    if _standby is not None:
        _standby.stop()
        _standby = None
