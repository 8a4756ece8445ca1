"""Write JSON lines, and mix them the same way each time."""

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def mixed(things: Iterable[T], purpose: str) -> list[T]:
    """Return the things in a random order that depends on the purpose alone."""
    order = list(things)
    dice(purpose).shuffle(order)
    return order


def dice(purpose: str) -> random.Random:
    """Return a generator seeded with a word, so that one more draw in one file changes no other file."""
    return random.Random(f"quickstart {purpose}")  # noqa: S311 - order and wording, not secrets


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write one object per line, creating the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    # Bytes, because text mode would write other line ends on Windows.
    path.write_bytes("".join(lines).encode("utf-8"))
