"""The top share of each module type. Needs neither numpy nor a checkpoint."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from stages.layout import Matrix

T = TypeVar("T")


def share(count: int, percent: float) -> int:
    """How many of ``count`` matrices a percentage means: rounded down as the reference does, but at least one."""
    return max(1, int(count * percent / 100))


def by_type(items: Iterable[T], matrix: Callable[[T], Matrix]) -> dict[str, list[T]]:
    """Items by module type, the types in alphabetical order, the items in their own."""
    found: dict[str, list[T]] = defaultdict(list)
    for item in items:
        found[matrix(item).type].append(item)
    return dict(sorted(found.items()))


def top(matrices: Sequence[Matrix], score: Callable[[Matrix], float], percent: float) -> list[Matrix]:
    """The matrices with the highest scores of each module type, best first; ties in the order given."""
    chosen: list[Matrix] = []
    for own in by_type(matrices, lambda matrix: matrix).values():
        chosen += sorted(own, key=score, reverse=True)[: share(len(own), percent)]
    return chosen
