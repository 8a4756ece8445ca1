"""JSON files, read and written in one place: what is read may be anything, what is written is whole or absent."""

import hashlib
import json
import os
import secrets
import stat
from pathlib import Path
from typing import Any

from specs.base import fingerprint
from stages.errors import InvalidInput

PARTIAL = ".partial"
"""How the name of a file ends that is still being written."""
LFS_POINTER = b"version https://git-lfs."
"""How a file begins that Git LFS left in place of the real one."""
_COMMENT = "\n<!-- sha256 of all above: {} -->\n"
LIMIT = 64 << 20
"""Bytes above which a JSON file is not read: parsed, it takes some thirty times as much memory."""


def read_json(file: Path, *, limit: int = LIMIT, strict: bool = False) -> Any:
    """The document in ``file``.

    Args:
        file: what to read; a link is followed.
        limit: bytes above which it is not read.
        strict: refuse what we never write: keys that are there twice, inf and nan.

    Raises:
        InvalidInput: no regular file, too large, or no JSON. The message names the file and what is wrong with it.
    """
    content = _content(file, limit)
    try:
        if not strict:
            return json.loads(content)
        return json.loads(content, object_pairs_hook=_object, parse_constant=_refuse)
    except RecursionError as error:
        raise InvalidInput(f"{file}: cannot be read as JSON: nested too deeply") from error
    except ValueError as error:
        raise InvalidInput(f"{file}: cannot be read as JSON: {error}") from error


def read_object(file: Path, *, limit: int = LIMIT) -> dict[str, Any]:
    """The JSON object in ``file``, written by whomever.

    Raises:
        InvalidInput: as `read_json`, or it is no object.
    """
    found = read_json(file, limit=limit)
    if not isinstance(found, dict):
        raise InvalidInput(f"{file}: not a JSON object")
    return found


def write_json(path: Path, document: Any) -> None:
    """Write ``document`` as `write_text` does."""
    write_text(path, _text(document))


def write_text(path: Path, text: str) -> None:
    """Write ``text`` so that readers see the old file or the whole new one, never a part.

    It is on the disk when this returns, and so is its name: a power cut afterwards takes neither.
    """
    make_folder(path.parent)
    partial = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}{PARTIAL}")
    try:
        with partial.open("w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        error.filename = str(path)  # a full disk is told by the write, which knows no name
        raise
    sync(path.parent)


def read_sealed(file: Path, *, limit: int = LIMIT) -> Any:
    """What `write_sealed` wrote.

    Raises:
        InvalidInput: the file cannot be read, is a link, or is not as it was written.
    """
    if file.is_symlink():
        raise InvalidInput(f"{file}: a link, which we never write; remove it")
    document = read_json(file, limit=limit, strict=True)
    try:
        if document["sha256"] == fingerprint(document["body"]):
            return document["body"]
    except (KeyError, TypeError, ValueError, RecursionError):
        pass
    raise InvalidInput(f"{file}: not as it was written: its seal does not match")


def write_sealed(file: Path, body: Any) -> None:
    """Write a document with the fingerprint of its content, so that a change by hand or by the disk is noticed."""
    write_text(file, sealed_text(body))


def sealed_text(body: Any) -> str:
    """What `write_sealed` writes."""
    return _text({"sha256": fingerprint(body), "body": body})


def _text(document: Any) -> str:
    return json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False)


def sealed_card(text: str) -> str:
    """A Markdown page with the hash of its text in a comment at its end, which no reader sees."""
    return text + _COMMENT.format(hashlib.sha256(text.encode()).hexdigest())


def is_sealed_card(file: Path) -> bool:
    """Whether a page is as `sealed_card` gave it."""
    if file.is_symlink():
        return False
    try:
        content = _content(file, LIMIT)
    except InvalidInput:
        return False
    text = content[: -len(_COMMENT.format("0" * 64))]
    return content == sealed_card(text)


def make_folder(path: Path) -> None:
    """Make a folder and what is missing above it; their names are on the disk when this returns."""
    missing = [one for one in (path, *path.parents) if not one.is_dir()]
    path.mkdir(parents=True, exist_ok=True)
    for one in missing:
        sync(one.parent)


def sync(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _content(file: Path, limit: int) -> str:
    try:
        # Without blocking: opening a pipe would wait for its writer.
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise InvalidInput(f"{file}: cannot be read as JSON: not a regular file")
            with os.fdopen(descriptor, "rb", closefd=False) as stream:
                content = stream.read(limit + 1)
        finally:
            os.close(descriptor)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InvalidInput(f"{file}: cannot be read as JSON: {reason}") from error
    if len(content) > limit:
        raise InvalidInput(f"{file}: cannot be read as JSON: larger than {limit >> 20} MiB")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{file}: cannot be read as JSON: {error}") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is there twice")
    return found


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no number")
