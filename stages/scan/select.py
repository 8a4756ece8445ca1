"""The top share of each module type. Needs neither numpy nor a checkpoint."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

from stages.layout import Key, Matrix

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


def ranks(matrices: Sequence[Matrix], score: Callable[[Matrix], float]) -> dict[Key, int]:
    """The place of each matrix within its module type, 1 for the highest score; ties in the order given."""
    found: dict[Key, int] = {}
    for own in by_type(matrices, lambda matrix: matrix).values():
        ranked = sorted(own, key=score, reverse=True)
        found |= {matrix.key: place for place, matrix in enumerate(ranked, 1)}
    return found


def top(matrices: Sequence[Matrix], places: Mapping[Key, int], percent: float) -> list[Matrix]:
    """The matrices whose place is within the share of their module type."""
    types = by_type(matrices, lambda matrix: matrix)
    allowed = {kind: share(len(own), percent) for kind, own in types.items()}
    return [matrix for matrix in matrices if places[matrix.key] <= allowed[matrix.type]]
