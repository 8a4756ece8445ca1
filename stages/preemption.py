"""SIGTERM, from whoever wants the machine back: training saves at its next step, everything else ends at once."""

import signal

from stages.errors import TryAgain


class Preemption:
    """SIGTERM: while training, a flag that the next step boundary reads; elsewhere, the end at once.

    A second SIGTERM ends the process wherever it is.
    """

    def __init__(self) -> None:
        """Listen from now on; in the main thread only."""
        self.asked = False
        self.training = False
        signal.signal(signal.SIGTERM, self._ask)

    def _ask(self, number: int, frame: object) -> None:
        self.asked = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if not self.training:
            raise TryAgain("told to stop; run again to go on")
