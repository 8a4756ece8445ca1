"""What the LM evaluation harness found, as measures that keep what each example adds."""

import math
import random
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from numbers import Real
from typing import Any, Literal

from stages.log import info
from stages.measure import Measure, ratio
from stages.metrics.whole import whole

ONE_BY_ONE = 300
"""Examples up to which a measure that is no mean is computed again without each of them; beyond it, without blocks."""
BLOCKS = 50
_NAMES = {"+": "p", "@": "_at_"}
"""Signs of the harness's names that mean something: chrf++ is chrfpp, pass@1 is pass_at_1."""

Better = Literal["higher", "lower"]


def measure_name(metric: str) -> str:
    """The harness's name for a result, `exact_match` or `exact_match,strict-match`, as a gate can write it."""
    spelt = "".join(_NAMES.get(sign, sign) for sign in metric.lower().removesuffix(",none"))
    return re.sub(r"[^a-z0-9]+", "_", spelt).strip("_")


def measures_of(results: Any, name: str, tasks: dict[str, Any]) -> dict[str, Measure]:
    """The measures of a task, or of a group of tasks.

    A task that filters its answers in several ways has a measure for each, `exact_match_strict_match`; the name without
    a filter is the first one's.

    Args:
        results: of the harness, with its samples.
        name: of the task or group.
        tasks: the tasks themselves, by name.
    """
    found: dict[str, Measure] = {}
    better = results["higher_is_better"].get(name, {})
    for key, value in results["results"].get(name, {}).items():
        metric, _, chosen = key.partition(",")
        if not chosen or metric.endswith("_stderr") or not isinstance(value, Real):
            continue
        if not math.isfinite(value):
            info(f"task {name}: its {key} is {value}, so it is not kept, and a gate that names it fails")
            continue
        parts = {
            task: [sample.get(metric) for sample in results["samples"].get(task, ()) if sample["filter"] == chosen]
            for task in tasks
        }
        aggregate = tasks[name].aggregation().get(metric) if name in tasks else None
        direction: Better = "higher" if better.get(metric, True) else "lower"
        measured = _measure(float(value), list(parts.values()), aggregate, direction)
        found[measure_name(key)] = measured
        found.setdefault(measure_name(metric), measured)
    return found


def _measure(value: float, parts: list[list[Any]], aggregate: Callable[..., Any] | None, better: Better) -> Measure:
    """A value of the harness, and what each example adds to it.

    Args:
        value: the harness's own.
        parts: of each task, a result for each example, in the harness's form; None where an example has none.
        aggregate: how the harness makes the value of these, of one task.
        better: the direction.
    """
    items = [item for part in parts for item in part]
    there = [item for item in items if item is not None]
    if there and all(_is_number(item) for item in there):
        for weights in ([1.0] * len(items), [1 / len(part) for part in parts for _ in part]):
            kept = [0.0 if item is None else weight for item, weight in zip(items, weights, strict=True)]
            tops = [weight * float(item or 0) for item, weight in zip(items, kept, strict=True)]
            if (mean := ratio(tops, kept, better)) and math.isclose(mean.value, value, rel_tol=1e-6, abs_tol=1e-9):
                return replace(mean, value=value)
    if aggregate is None or len(there) < 2:
        return Measure(value, None, len(there), better)
    if getattr(aggregate, "__name__", "") == "bits_per_byte":
        nats, sizes = ([float(item[side]) for item in there] for side in (0, 1))
        return replace(ratio([-one / math.log(2) for one in nats], sizes, better), value=value)
    return _jackknifed(value, there, aggregate, better)


def _is_number(item: Any) -> bool:
    return isinstance(item, Real) or type(item).__name__ in {"bool", "bool_"}


def _jackknifed(value: float, items: Sequence[Any], aggregate: Callable[..., Any], better: Better) -> Measure:
    n = len(items)
    if n <= ONE_BY_ONE:
        return whole(value, n, _without(items, list(range(n + 1)), aggregate), better)
    edges = [round(block * n / BLOCKS) for block in range(BLOCKS + 1)]
    shuffled = random.Random(n).sample(items, n)  # noqa: S311 - neighbours in a file may be alike
    without = _without(shuffled, edges, aggregate)
    mean = math.fsum(without) / BLOCKS
    error = math.sqrt((BLOCKS - 1) / BLOCKS * math.fsum((one - mean) ** 2 for one in without))
    return Measure(value, error if math.isfinite(error) else None, n, better)


def _without(items: Sequence[Any], edges: list[int], aggregate: Callable[..., Any]) -> list[float]:
    """What a measure is without each of the stretches between ``edges``."""
    with warnings.catch_warnings():  # of sets in which a class no longer occurs
        warnings.simplefilter("ignore")
        return [float(aggregate([*items[:start], *items[end:]])) for start, end in pairwise(edges)]
