"""Data of the quickstart: the standard library as the domain, read from the Python that runs this."""

import json
from importlib import resources
from pathlib import Path
from typing import Any

from flows.quickstart.corpus import corpus, unseen
from flows.quickstart.instructions import instructions
from flows.quickstart.library import walk
from flows.quickstart.preferences import preferences
from flows.quickstart.questions import library_questions, write_task
from flows.quickstart.rows import mixed, write_rows
from flows.quickstart.split import split


def build(folder: Path) -> None:
    """Write the training data, the held-out data and the lm-eval tasks into a folder.

    The same Python writes the same bytes each time. Nothing is downloaded.

    Args:
        folder: Where `data/` and `tasks/` are written; made if it does not exist.
    """
    entries = walk()
    hidden = unseen(entries)
    parts = split(entries, hidden)
    pairs = {
        "corpus": corpus(entries, hidden),
        "instructions": instructions(parts.train, parts.asked),
        "preferences": preferences(parts.train, parts.asked),
    }
    for name, (train, heldout) in pairs.items():
        write_rows(folder / "data" / f"{name}.jsonl", train)
        write_rows(folder / "data" / f"{name}.heldout.jsonl", heldout)

    prose = _shipped("general_text.jsonl")
    for use, name in (("replay", "replay.jsonl"), ("heldout", "general.heldout.jsonl")):
        texts = [{"text": row["text"]} for row in prose if row["use"] == use]
        write_rows(folder / "data" / name, mixed(texts, name))

    write_task(
        folder / "tasks",
        "stdlib_qa",
        "What a part of the standard library does; no training question is about the same part.",
        library_questions(parts.quartets),
    )
    write_task(
        folder / "tasks",
        "general",
        "Easy general knowledge, to see what training on a narrow domain makes a model forget.",
        _shipped("general.jsonl"),
    )


def _shipped(name: str) -> list[dict[str, Any]]:
    text = resources.files(__name__).joinpath(name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]
