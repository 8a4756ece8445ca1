"""What a stage's process tells the one that started it: JSON lines on a channel of their own.

Nothing of it, and nothing that Python prints into the log, holds a secret: see `specs.secrets`.
"""

import io
import json
import logging
import os
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path
from typing import Any, TextIO

from specs.secrets import redact

_channel: TextIO | None = None
_sending = threading.Lock()
_phase = ""
_phase_began = 0.0


def open_channel(log_file: Path) -> None:
    """Keep today's stdout for events and send everything else that prints to ``log_file``."""
    global _channel  # noqa: PLW0603 - one process has one stdout
    if _channel is None:
        _channel = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        log_file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    except OSError as error:
        descriptor = os.open(os.devnull, os.O_WRONLY)
        _tell_lost(str(log_file), error)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    if not isinstance(sys.stdout, _Redacted):
        sys.stdout, sys.stderr = _Redacted(sys.stdout), _Redacted(sys.stderr)


def _tell_lost(log: str, error: OSError) -> None:
    event("info", message=f"{log}: cannot be written ({error.strerror}); the work goes on, its log is not whole")


class _Redacted(io.TextIOBase):
    """A text stream without secrets: a line of a library, or a traceback, may hold the token that it was given.

    It never fails: a log on a full disk must not end the work, nor hide why it ended.
    """

    lost = False
    """Whether it was told that the log is not whole: both streams write into one."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._line = ""

    def write(self, text: str) -> int:
        """Pass on what is whole: a secret may come in parts, and a line ends it."""
        lines, newline, self._line = (self._line + text).rpartition("\n")
        if newline:
            self._pass_on(redact(lines, os.environ) + "\n")
        return len(text)

    def flush(self) -> None:
        """Pass on the line that was begun, too."""
        line, self._line = self._line, ""
        self._pass_on(redact(line, os.environ))

    def _pass_on(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except OSError as error:
            if not _Redacted.lost:
                _Redacted.lost = True
                _tell_lost("the log", error)

    def fileno(self) -> int:
        """The descriptor beneath: what writes there by itself, as a crash handler does, bypasses us."""
        return self._stream.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """Of the stream beneath."""
        return self._stream.encoding


def event(kind: str, **fields: Any) -> None:
    """Tell the parent something; silently dropped where nobody listens (a library call, a dead parent)."""
    if _channel is None:
        return
    with _sending, suppress(BrokenPipeError, ValueError):
        _channel.write(json.dumps(_without_secrets({"event": kind, "phase": _phase, **fields})) + "\n")


def _without_secrets(told: Any) -> Any:
    if isinstance(told, str):
        return redact(told, os.environ)
    if isinstance(told, dict):
        return {key: _without_secrets(value) for key, value in told.items()}
    return [_without_secrets(value) for value in told] if isinstance(told, (list, tuple)) else told


def info(message: str) -> None:
    """A line for people: in the log and on the terminal of whoever started the run."""
    print(message, file=sys.stderr, flush=True)  # noqa: T201 - stderr is the log file
    event("info", message=message)


def phase_at_work() -> str:
    """The phase that began last; empty before the first."""
    return _phase


def redact_logging() -> None:
    """Keep secrets out of every log record of this process, wherever it goes: Prefect keeps them in its database."""
    plain = logging.getLogRecordFactory()
    if hasattr(plain, "__wrapped__"):
        return

    @wraps(plain)
    def without_secrets(*given: Any, **settings: Any) -> logging.LogRecord:
        record = plain(*given, **settings)
        with suppress(TypeError, ValueError, KeyError):  # arguments that do not fit are told of where it is written
            record.msg, record.args = redact(record.getMessage(), os.environ), None
        if record.exc_info and record.exc_info[0] is not None:
            record.exc_text = redact("".join(traceback.format_exception(*record.exc_info)).rstrip(), os.environ)
        return record

    logging.setLogRecordFactory(without_secrets)


def so_far() -> dict[str, float]:
    """The phase at work and its seconds until now."""
    return {_phase: time.monotonic() - _phase_began}


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the libraries' progress bars, warnings and advice off the terminal of a command that answers people."""
    from transformers.utils import logging as own

    others = [logging.getLogger(name) for name in ("bitsandbytes", "torchao", "kernels")]
    before, bars = own.get_verbosity(), own.is_progress_bar_enabled()
    levels = [logger.level for logger in others]
    own.set_verbosity_error()
    own.disable_progress_bar()
    for logger in others:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        own.set_verbosity(before)
        if bars:
            own.enable_progress_bar()
        for logger, level in zip(others, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def phase(name: str, durations: dict[str, float]) -> Iterator[None]:
    """Announce a phase, time it by the monotonic clock and add its seconds to ``durations``."""
    global _phase, _phase_began
    _phase, _phase_began = name, time.monotonic()
    event("phase_started")
    yield
    durations |= so_far()
    event("phase_done", seconds=round(durations[name], 3))
