"""Rows that are there twice, or nearly: by a hash of the row, and by MinHash over runs of five words.

Broder (1997), with the settings of Lee et al. (arXiv 2107.06499): runs of five words, Jaccard similarity of 0.8. The
signatures and their index are rensa's: on the same rows ten times as fast as datasketch, in a fifth of its memory.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import NamedTuple

from stages.rows import Row
from stages.words import words_of

RUN = 5
"""Words whose runs are compared; a shorter row is one run."""
THRESHOLD = 0.8
"""Jaccard similarity, as estimated, from which on two rows are near duplicates."""
HASHES = 128
"""Of a signature: the estimate's standard error is 0.035 at the threshold."""
BANDS = 16
"""Of the index: it finds 95% of the pairs at the threshold, and 99.98% at a similarity of 0.9."""
MOST_ROWS = 500_000
"""Rows beyond which only an even selection of so many is searched for near duplicates; exact ones always are."""
MOST_WORDS = 100_000
"""Words of a row that are compared."""
_SEED = 42


class Duplicate(NamedTuple):
    """A row that is, or nearly is, an earlier one; a row is a duplicate once."""

    row: int
    of: int
    """The first row that it is like."""
    similarity: float
    """Estimated; 1.0 also of rows that differ in case, punctuation or spacing alone."""
    exact: bool
    """Whether the rows are the same, character for character."""


class Duplicates(NamedTuple):
    """What was found."""

    found: list[Duplicate]
    """In the order of the rows."""
    searched: int
    """Rows that were searched for near duplicates."""


def duplicates(rows: Sequence[Row]) -> Duplicates:
    """Every row that an earlier one is equal or close to.

    Args:
        rows: different lines of files; a line that is used twice is no duplicate.
    """
    from rensa import RMinHash, RMinHashLSH

    first: dict[bytes, int] = {}
    index = RMinHashLSH(threshold=THRESHOLD, num_perm=HASHES, num_bands=BANDS)
    signatures: dict[int, RMinHash] = {}
    every = -(-len(rows) // MOST_ROWS)
    found: list[Duplicate] = []
    searched = 0
    for number, row in enumerate(rows):
        same = first.setdefault(_digest(row), number)
        if same != number:
            found.append(Duplicate(number, same, 1.0, exact=True))
            searched += 1
            continue
        if every > 1 and number % every:
            continue
        searched += 1
        if not (words := words_of(row)):
            continue  # signs alone: that none has a word makes no two of them alike
        signature = RMinHash(num_perm=HASHES, seed=_SEED)
        signature.update(_runs(words))
        near = [(signatures[one].jaccard(signature), -one) for one in index.query(signature)]
        similarity, place = max(near, default=(0.0, 0))
        if similarity >= THRESHOLD:
            found.append(Duplicate(number, -place, round(similarity, 3), exact=False))
        else:  # what is like a duplicate is like what that one duplicates: the index stays small
            index.insert(number, signature)
            signatures[number] = signature
    return Duplicates(found, searched)


def _digest(row: Row) -> bytes:
    return hashlib.blake2b(json.dumps(row, sort_keys=True).encode(), digest_size=16).digest()


def _runs(words: list[str]) -> list[str]:
    words = words[:MOST_WORDS]
    return [" ".join(words[start : start + RUN]) for start in range(max(1, len(words) - RUN + 1))]
