"""Decide which callables are asked about only after training, and which are not seen at all."""

import re
from collections import Counter, defaultdict
from dataclasses import dataclass

from flows.quickstart.library import Entry
from flows.quickstart.rows import mixed

_QUARTETS = 30
_LONGEST_ANSWER = 120
_LONGEST_HELDOUT_ANSWER = 100
_SIMILAR = 0.6


@dataclass(frozen=True)
class Split:
    """The callables by what they serve; no callable is in two of the three."""

    train: tuple[Entry, ...]
    """Questions and preferences for training are about these."""
    quartets: tuple[tuple[Entry, ...], ...]
    """Held out, four neighbours each: in the corpus, but in no question that is trained on."""
    unseen: tuple[Entry, ...]
    """Held out altogether: their docstrings measure the corpus stage."""

    @property
    def asked(self) -> tuple[Entry, ...]:
        """The held-out callables that questions are about."""
        return tuple(entry for quartet in self.quartets for entry in quartet)


def split(entries: list[Entry], unseen: tuple[Entry, ...]) -> Split:
    """Hold out quartets of neighbours and leave the other callables that have a short summary to training."""
    hidden = {entry.path for entry in unseen}
    known = [entry for entry in entries if entry.path not in hidden]
    answerable = [entry for entry in known if 0 < len(entry.summary) <= _LONGEST_ANSWER and not _echoes(entry)]
    quartets = _quartets(known, answerable)
    asked = [entry for quartet in quartets for entry in quartet]
    telltale = {entry.path for entry in (*asked, *unseen)}
    answers = [entry.summary for entry in asked]
    train = tuple(
        entry
        for entry in answerable
        if entry.path not in telltale
        and not telltale & set(re.findall(r"[\w.]+\w", entry.summary))
        and not any(answer in entry.summary for answer in answers)
    )
    return Split(train, quartets, unseen)


def words(text: str) -> frozenset[str]:
    """Return the words of a sentence or a name, in small letters, with camel case taken apart."""
    apart = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|_", " ", text)
    return frozenset(re.findall(r"[a-z0-9]+", apart.lower()))


def _quartets(known: list[Entry], answerable: list[Entry]) -> tuple[tuple[Entry, ...], ...]:
    """Choose groups of four whose summaries are about equally long, from as many modules as possible.

    The four share their choices in the multiple-choice task, so each sentence is right once and wrong three
    times, and a model that judges sentences without reading the question scores exactly one in four.
    """
    neighbours: dict[tuple[str, str], list[Entry]] = defaultdict(list)
    for entry in _distinctive(known, answerable):
        neighbours[entry.home, entry.kind].append(entry)
    waves: dict[int, list[tuple[Entry, ...]]] = defaultdict(list)
    for key in sorted(neighbours):
        group = sorted(neighbours[key], key=lambda entry: (len(entry.summary), entry.path))
        for wave, four in enumerate(mixed(_fours(group), f"quartets of {key}")[: max(1, len(group) // 10)]):
            waves[wave].append(four)
    chosen = [four for wave in sorted(waves) for four in mixed(waves[wave], f"wave {wave}")]
    return tuple(chosen[:_QUARTETS])


def _fours(group: list[Entry]) -> list[tuple[Entry, ...]]:
    fours, at = [], 0
    while at + 4 <= len(group):
        if len(group[at + 3].summary) <= 1.5 * len(group[at].summary):
            fours.append(tuple(group[at : at + 4]))
            at += 4
        else:
            at += 1
    return fours


def _distinctive(known: list[Entry], answerable: list[Entry]) -> list[Entry]:
    """Keep what neither training on the other callables nor its own name gives away."""
    leaves = Counter(entry.leaf.lower() for entry in known)
    homes = {entry.home for entry in known}
    bags = [(entry.path, words(entry.summary)) for entry in known if entry.summary]
    kept = []
    for entry in answerable:
        bag = words(entry.summary)
        shared = leaves[entry.leaf.lower()] > 1 or entry.path in homes
        if shared or len(entry.summary) > _LONGEST_HELDOUT_ANSWER or _spelled_out(entry):
            continue
        if entry.module == "builtins" and entry.kind == "class":  # exceptions: their names say all
            continue
        if all(path == entry.path or len(bag & other) < _SIMILAR * len(bag | other) for path, other in bags):
            kept.append(entry)
    return kept


def _echoes(entry: Entry) -> bool:
    """Tell whether the summary says no more than the name, as "Unicode encoding error" does."""
    name = {word[:4] for word in words(entry.name)}
    return all(word[:4] in name for word in words(entry.summary) if len(word) >= 4)


def _spelled_out(entry: Entry) -> bool:
    name = words(entry.leaf)
    told = {word for word in name if any(word[:4] == other[:4] for other in words(entry.summary))}
    return entry.leaf.lower() in entry.summary.lower() or len(told) * 3 > len(name) * 2
