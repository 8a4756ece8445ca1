"""One question to a module that is run as a process of its own: what it imports stays out of ours."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any


class ChildFailed(Exception):
    """The process ended without an answer: with which code, and what it said last."""

    def __init__(self, code: int, stderr: str) -> None:
        """Keep the code and the complaint."""
        super().__init__(code, stderr)
        self.code = code
        # pydantic's last line only links to its manual.
        lines = [line.strip() for line in stderr.strip().splitlines() if "errors.pydantic.dev" not in line]
        self.complaint = lines[-1] if lines else "no reason given"


def ask(module: str, request: Any, environment: Mapping[str, str], timeout: float | None = None) -> Any:
    """The answer of ``python -m module``: the last line on its stdout, as JSON.

    Args:
        module: reads a request from stdin.
        request: a JSON document.
        environment: variables beside our own.
        timeout: seconds.

    Raises:
        ChildFailed: it ended with another code than 0.
        subprocess.TimeoutExpired: it took longer.
    """
    done = subprocess.run(  # noqa: S603 - a module of ours
        [sys.executable, "-m", module],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
        env={**os.environ, **environment},
    )
    if done.returncode:
        raise ChildFailed(done.returncode, done.stderr)
    return json.loads(done.stdout.splitlines()[-1])
