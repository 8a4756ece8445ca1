"""A bound of time and memory on what strangers wrote and an interpreter runs for us: templates, patterns."""

import resource
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from stages.errors import InvalidInput

SECONDS = 5.0
"""Processor time for one text; a long conversation takes a hundredth of a second."""
MEMORY = 1 << 29
"""Bytes by which the process may grow meanwhile."""


@contextmanager
def bounded(what: str, remedy: str) -> Iterator[None]:
    """End what takes too much time or memory for one text; the process can go on.

    Time is the process's own, so that a busy machine refuses nothing. A bound that cannot be set is not: time needs
    the main thread, memory Linux.

    Args:
        what: the template or pattern, as the message names it.
        remedy: what to do about it.

    Raises:
        InvalidInput: it took too much.
    """

    def stop(*_: object) -> NoReturn:
        raise _TooSlowError

    timed = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGVTALRM, stop) if timed else None
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    try:
        if sys.platform == "linux":
            bounds = [bound for bound in (soft, hard) if bound != resource.RLIM_INFINITY]
            resource.setrlimit(resource.RLIMIT_AS, (min([_address_space() + MEMORY, *bounds]), hard))
        if timed:
            signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
        yield
    except _TooSlowError as error:
        raise InvalidInput(f"{what} takes more than {SECONDS:g} s for one text; {remedy}") from error
    except (MemoryError, OverflowError):
        # From nothing: the machine has memory, and whoever explains the error must not say that it has not.
        raise InvalidInput(f"{what} takes more than {MEMORY >> 20} MiB for one text; {remedy}") from None
    finally:
        if timed:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            signal.signal(signal.SIGVTALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


class _TooSlowError(BaseException):
    """Nothing between what runs and us may take it for an error of its own."""


def _address_space() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    return pages * resource.getpagesize()
