"""Signs of life of a step's process: a beat every few seconds, and only while something moves.

A thread that merely slept and sent would go on beside a deadlock. This one looks, before each beat, whether the
process or one of its children computed, read or wrote since the last one. A process that waits for ever, or is
stopped, goes silent though the thread lives, and its parent ends it (`flows.process.SILENCE`).

What cannot be told from work: an endless loop, a collective that spins until its peers come, and a disk that is
waited for in the kernel (a hard-mounted network share whose server is gone).
"""

import os
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil

from stages.log import event

BEAT = 10.0
"""Seconds from one look to the next."""
ORPHANED = 300.0
"""Seconds that a process may outlive its parent: time to end the step at work and to write its checkpoint."""
_IDLE_SHARE = 0.005
"""Threads that poll while they wait (queues, progress bars) compute too: up to this share of a core is no sign."""
_IDLE_BYTES = 1024
"""Per second, likewise."""


def start(parent: int, *, beat: float = BEAT, orphaned: float = ORPHANED) -> None:
    """Send `beat` events from a thread of its own, and end the process when it outlives its parent for too long.

    Args:
        parent: the process that hears them.
        beat: seconds from one look to the next.
        orphaned: seconds after the parent's death, on which the kernel asks the process to stop, until it is killed.
    """
    threading.Thread(target=_watch, args=(parent, beat, orphaned), name="heartbeat", daemon=True).start()


class Life:
    """Whether this process moves, from one look to the next. What the thread that looks does itself is left out."""

    def __init__(self) -> None:
        """The first look."""
        self._computed, self._moved, self._below = _computed(), _moved(), 0.0

    def moves(self, seconds: float) -> bool:
        """Whether the process, or one below it, did anything since the last look, ``seconds`` ago."""
        computed, moved = _computed(), _moved()
        busy = computed - self._computed > _IDLE_SHARE * seconds or moved - self._moved > _IDLE_BYTES * seconds
        self._computed, self._moved = computed, moved
        # Asked last: to find the children, all processes of the machine are looked at.
        return busy or self._a_child_moves(seconds) or psutil.Process().status() == psutil.STATUS_DISK_SLEEP

    def _a_child_moves(self, seconds: float) -> bool:
        """Compilers and data workers compute for a process that waits for them."""
        below = 0.0
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                times = child.cpu_times()
                below += times.user + times.system
        before, self._below = self._below, below
        return abs(below - before) > _IDLE_SHARE * seconds  # one that ended takes its share along


def end_children() -> None:
    """Kill whatever this process started: the parent that would do so may be gone.

    May be: its main thread dies first, the kernel says so then, and for a moment it is still our parent.
    """
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            child.kill()


def _watch(parent: int, beat: float, orphaned: float) -> None:
    life, looked, gone = Life(), time.monotonic(), 0.0
    while True:
        time.sleep(beat)
        now = time.monotonic()
        if life.moves(now - looked):
            event("beat")
        looked = now
        if os.getppid() != parent:
            gone = gone or now
            if now - gone >= orphaned:
                os.killpg(os.getpgrp(), signal.SIGKILL)


def _computed() -> float:
    """CPU seconds of the process."""
    return time.process_time() - time.thread_time()


def _moved() -> int:
    """Bytes that the process read and wrote."""
    return _bytes("self") - _bytes("thread-self")


def _bytes(whose: str) -> int:
    """Bytes through read and write calls, and those that the disk had to give or take."""
    try:
        lines = Path("/proc", whose, "io").read_text(encoding="ascii").splitlines()
    except OSError:  # no Linux, or hidden from us
        return 0
    fields = dict(line.split(": ") for line in lines)
    return sum(int(fields[name]) for name in ("rchar", "wchar", "read_bytes", "write_bytes") if name in fields)
