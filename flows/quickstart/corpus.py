"""The text of the corpus stage: the language reference that CPython ships, and the library's docstrings."""

import re
from collections import Counter
from collections.abc import Iterable

from flows.quickstart.library import Entry
from flows.quickstart.rows import mixed

_PIECE = 4_000  # characters of a long topic per row: no row is cut far below what a training sequence holds
_CLIP = 2_000
_HELDOUT_TOPICS = 5
_HELDOUT_DOCSTRINGS = 20_000  # characters of docstrings held out
_SHORTEST_DOC = 80
_TELLING = 40  # a paragraph shorter than this, such as "See also:", may occur anywhere

Row = dict[str, str]


def unseen(entries: list[Entry]) -> tuple[Entry, ...]:
    """Choose the docstrings that the corpus is measured on: of middle length, like no other."""
    owners = Counter(paragraph for entry in entries for paragraph in _telling(entry.doc))
    summaries = Counter(entry.summary for entry in entries)
    homes = {entry.home for entry in entries}  # a class whose methods are trained on is not unseen
    chosen, size = [], 0
    for entry in mixed(entries, "unseen docstrings"):
        alone = all(owners[paragraph] == 1 for paragraph in _telling(entry.doc))
        unlike = alone and summaries[entry.summary] == 1 and entry.path not in homes
        if unlike and 250 <= len(entry.doc) <= 1_500 and entry.module != "builtins":
            chosen.append(entry)
            size += len(_page(entry))
        if size >= _HELDOUT_DOCSTRINGS:
            break
    return tuple(chosen)


def corpus(entries: list[Entry], hidden: tuple[Entry, ...]) -> tuple[list[Row], list[Row]]:
    """Return the rows for training and the rows held out, split by document."""
    topics = _topics()
    middling = [name for name in sorted(topics) if 1_500 <= len(topics[name]) <= 9_000]
    heldout_topics = set(mixed(middling, "held-out topics")[:_HELDOUT_TOPICS])
    hidden_paths = {entry.path for entry in hidden}

    heldout = [_row(f"topic:{name}", _clip(topics[name])) for name in sorted(heldout_topics)]
    heldout += [_row(entry.path, _page(entry)) for entry in hidden]

    # The longer topics repeat the shorter ones word for word ("compound" holds "with"), so a paragraph is
    # kept once, in the shortest topic that has it, and never when a held-out topic has it.
    seen = {paragraph for name in heldout_topics for paragraph in _telling(topics[name])}
    seen |= {paragraph for entry in hidden for paragraph in _telling(entry.doc)}
    train = []
    for name in sorted(topics.keys() - heldout_topics, key=lambda name: (len(topics[name]), name)):
        fresh = _fresh(topics[name], seen)
        train += [_row(f"topic:{name}", piece) for piece in _pieces(fresh)]
    pages = set()
    for entry in entries:
        worth = entry.summary or len(entry.doc) >= _SHORTEST_DOC
        if worth and entry.path not in hidden_paths and entry.doc not in pages:
            pages.add(entry.doc)
            train += [_row(entry.path, piece) for piece in _pieces(_page(entry))]
    return mixed(train, "corpus"), mixed(heldout, "held-out corpus")


def _topics() -> dict[str, str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions leave it out; the docstrings alone are corpus enough
        return {}
    return {name: text.strip() for name, text in topics.items()}


def _page(entry: Entry) -> str:
    return f"{entry.path}{entry.signature}\n\n{entry.doc}"


def _row(source: str, text: str) -> Row:
    return {"text": text, "source": source}


def _paragraphs(text: str) -> list[str]:
    return [paragraph for paragraph in re.split(r"\n\s*\n", text) if paragraph.strip()]


def _telling(text: str) -> list[str]:
    """Return the paragraphs that identify a text, with white space evened out."""
    evened = (" ".join(paragraph.split()) for paragraph in _paragraphs(text))
    return [paragraph for paragraph in evened if len(paragraph) >= _TELLING]


def _fresh(text: str, seen: set[str]) -> str:
    """Drop paragraphs that were seen before, with the headings above them; remember the others."""
    kept: list[str] = []
    headings: list[str] = []
    for paragraph in _paragraphs(text):
        evened = " ".join(paragraph.split())
        if len(evened) < _TELLING:
            headings.append(paragraph)
            continue
        if evened not in seen:
            kept += [*headings, paragraph]
            seen.add(evened)
        headings.clear()
    return "\n\n".join(kept)


def _clip(text: str) -> str:
    return next(iter(_pieces(text, _CLIP)))


def _pieces(text: str, size: int = _PIECE) -> Iterable[str]:
    """Cut a text at paragraph boundaries into pieces of at most `size` characters."""
    piece = ""
    for paragraph in _paragraphs(text):
        if piece and len(piece) + len(paragraph) + 2 > size:
            yield piece
            piece = ""
        piece = f"{piece}\n\n{paragraph}" if piece else paragraph
    if piece:
        yield piece
