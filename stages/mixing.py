"""Which rows a stage trains on, and in which order: its sources mixed by weights and shares.

All of it follows from the data and the seed alone, so that a stage which goes on after a crash has the same rows in the
same order: what was taken already is not kept anywhere, it is drawn again.
"""

import random
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

from specs.data import MOST_OFTEN, DataSpec
from specs.printable import printable_line
from stages.data import Count, Normaliser, read_lines
from stages.errors import InvalidInput
from stages.rows import Row

Sizes = Callable[[list[Row]], list[int]]
"""Tokens of each row that its stage sees."""


class Origin(NamedTuple):
    """Where a row of a stage comes from."""

    source: int
    """The source's place in the stage, from 0."""
    number: int
    """Of the rows of its source that can be used, from 0."""
    file: str
    line: str

    def place(self, folder: Path) -> str:
        """``file:line`` as reports and messages have it; files below ``folder``, the spec's, are named from there."""
        return printable_line(f"{self.file.removeprefix(f'{folder}/')}:{self.line}")


class Mixture(NamedTuple):
    """The rows of a stage."""

    rows: list[Row]
    """Weights and shares applied, in the stage's own order."""
    origins: list[Origin]
    """Of each row; one that is used twice is there twice."""
    counts: list[Count]
    """What was read of each source, before its weight."""


_Placed = tuple[Origin, Row]


def mixed(
    sources: Sequence[DataSpec], folder: Path, normalise: Normaliser, seed: int, sizes: Sizes | None = None
) -> Mixture:
    """All rows of all sources by their weights and shares, in one seeded order.

    A weight of 2.5 takes each row twice and a seeded half of them once more. A share takes as many rows, in a seeded
    order, as bring its tokens nearest to that share of all the stage's tokens; where the source has too few, it is used
    as often as it takes, and no row twice before every row once.

    Args:
        sources: of one stage.
        folder: what relative paths start from.
        normalise: one of the functions of `stages.rows`.
        seed: of the draws.
        sizes: how many tokens rows have; asked only where a source has a share.

    Raises:
        InvalidInput: a source cannot be used, a share cannot be reached, or no row is left.
    """
    read: list[list[_Placed]] = []
    counts: list[Count] = []
    for number, source in enumerate(sources):
        count = Count(source.label)
        lines = read_lines(source, folder, normalise, count=count)
        read.append([(Origin(number, place, *line), row) for place, (line, row) in enumerate(lines)])
        counts.append(count)
    parts = [
        _weighted(own, source.weight, _order(seed, number)) if source.share is None else []
        for number, (source, own) in enumerate(zip(sources, read, strict=True))
    ]
    if any(source.share is not None for source in sources):
        _add_shares(sources, read, parts, seed, sizes)
    placed = [one for part in parts for one in part]
    if not placed:
        names = ", ".join(source.label for source in sources)
        found = "; ".join(map(str, counts))
        raise InvalidInput(f"{names}: no rows are left after weighting; raise the weights (read: {found})")
    random.Random(seed).shuffle(placed)  # noqa: S311 - sampling, not secrets
    return Mixture([row for _, row in placed], [origin for origin, _ in placed], counts)


def _order(seed: int, number: int) -> random.Random:
    """What draws from the source of this number: the draws of one do not depend on the other sources."""
    return random.Random(f"{seed}/{number}")  # noqa: S311


def _weighted(own: list[_Placed], weight: float, order: random.Random) -> list[_Placed]:
    whole, part = divmod(weight, 1)
    return own * int(whole) + order.sample(own, round(part * len(own)))


def _add_shares(
    sources: Sequence[DataSpec], read: list[list[_Placed]], parts: list[list[_Placed]], seed: int, sizes: Sizes | None
) -> None:
    """Fill in the parts of the sources with a share, from how many tokens the other parts have."""
    if sizes is None:
        raise TypeError("shares are of tokens: rows need their sizes")
    shares = [Fraction(str(source.share or 0)) for source in sources]
    rest = sum(sum(sizes([row for _, row in part])) for part in parts if part)
    if not rest:
        names = ", ".join(source.label for source in sources if source.share is None)
        raise InvalidInput(f"{names}: no tokens are left after weighting, so no share can be told; raise weight")
    total = rest / (1 - sum(shares))
    for number, (share, own) in enumerate(zip(shares, read, strict=True)):
        if share:
            label = f"{sources[number].label}: share {sources[number].share:g}"
            wanted = Fraction(share * total)
            parts[number] = _drawn(own, sizes([row for _, row in own]), wanted, _order(seed, number), label)


def _drawn(own: list[_Placed], sizes: list[int], wanted: Fraction, order: random.Random, label: str) -> list[_Placed]:
    """Rows that come nearest to ``wanted`` tokens: the whole source as often as it fits, then a part of it."""
    everything = sum(sizes)
    if everything * MOST_OFTEN < wanted:
        raise InvalidInput(
            f"{label} of this stage is {float(wanted):,.0f} tokens, and the source has {everything:,}: each row would "
            f"be used more than {MOST_OFTEN} times; add rows, or lower the share"
        )
    passes, left = divmod(wanted, everything)
    part: list[_Placed] = []
    for place in order.sample(range(len(own)), len(own)):
        if 2 * left <= sizes[place]:  # without this row, what was drawn is nearer
            break
        part.append(own[place])
        left -= sizes[place]
    if not passes and not part:
        raise InvalidInput(
            f"{label} of this stage is {float(wanted):,.0f} tokens, less than half of a row; raise it, or remove "
            "the source"
        )
    return own * int(passes) + part
