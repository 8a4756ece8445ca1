"""Told to stop, by whoever wants the machine back: training saves at its next step, everything else ends at once."""

import ctypes
import os
import signal
import sys

from stages.errors import TryAgain

ASK = signal.SIGUSR2
"""How a parent asks, and how its death does. As often as it comes it is one request: a scheduler may send SIGTERM to
every process of a job, and what the parent passes on must not count as the second SIGTERM, which ends at once."""
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Preemption:
    """SIGTERM or `ASK`: while training, a flag that the next step boundary reads; elsewhere, the end at once.

    A second SIGTERM ends the process wherever it is.
    """

    def __init__(self) -> None:
        """Listen from now on; in the main thread only."""
        self.asked = False
        self.training = False
        signal.signal(signal.SIGTERM, self._ask)
        signal.signal(ASK, self._ask)

    def _ask(self, number: int, frame: object) -> None:
        self.asked = True
        if number == signal.SIGTERM:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if not self.training:
            raise TryAgain("told to stop; run again to go on")


def die_with(parent: int) -> None:
    """Let the kernel send `ASK` when the parent ends, however it ends; without a handler that is the end."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, ASK)
        if os.getppid() != parent:
            sys.exit(0)
