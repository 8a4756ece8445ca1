"""One writer per stage, by the kernel's file lock: it is freed when its holder dies, however it dies.

A step has three: `.lock` of the process that makes it, `.run` of the run that has it made, `.used` of every run that
makes something from it. Who moves or removes an artifact takes them all.
"""

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from stages.errors import TryAgain

RUN, MAKE, USE = ENDINGS = (".run", ".lock", ".used")
"""How the names of a step's locks end."""


@contextmanager
def exclusive(path: Path, name: str | None = None) -> Iterator[None]:
    """Hold the lock at ``path`` alone.

    Args:
        path: the lock's file; made where it is missing, and left behind.
        name: what is locked, for people; the file's name where none is given.

    Raises:
        TryAgain: another process holds it; the message names its pid and host.
    """
    with _held(path, fcntl.LOCK_EX, name):
        yield


@contextmanager
def shared(path: Path, name: str | None = None) -> Iterator[None]:
    """Hold the lock at ``path`` together with others who only use what it protects; see `exclusive`."""
    with _held(path, fcntl.LOCK_SH, name):
        yield


@contextmanager
def _held(path: Path, kind: int, name: str | None) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with path.open("a+") as file:
            try:
                fcntl.flock(file, kind | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise TryAgain(
                    f"{name or path.stem} is being worked on by {_holder(file.read())}; wait for it, then run again"
                ) from None
            if not _is_at(file, path):
                continue  # cleared away between opening and locking: whoever comes next would lock another file
            file.truncate(0)
            file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
            file.flush()
            yield
            return


def _is_at(file: TextIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _holder(text: str) -> str:
    try:
        record = json.loads(text)
        return f"process {record['pid']} on {record['host']}"
    except (ValueError, KeyError, TypeError):
        return "another process"
