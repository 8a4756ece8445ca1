"""What is tried when the gates of a stage refuse: changes to the stage as written, in order."""

import json
import math
import re
from collections.abc import Iterator
from decimal import Decimal
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, model_validator

from specs.base import Spec
from specs.explain import Location

Policy = Literal["stop", "warn", "approve"]
"""What becomes of a run whose gates refuse."""
MOST_CHANGES = 9
"""The gates' doubt is shared by all attempts: with more than ten, hardly any sample would pass."""

_LARGEST = 2**63 - 1
"""Of whole numbers: beyond it no library takes one."""
_TIMES = re.compile(r"x([0-9]+(?:\.[0-9]+)?|\.[0-9]+)")

S = TypeVar("S", bound=Spec)


class ChangeSpec(Spec):
    """One attempt: the stage as written, but for these fields.

    A number may be written as a multiple of the one that it replaces: `x0.5` is half of it. null takes back what the
    stage says, so that the default holds.
    """

    method: dict[str, Any] = {}
    """Fields of the method: `{rank: 8}`. Another `kind` replaces the method as a whole."""
    data: dict[str, dict[str, Any]] | tuple[dict[str, Any], ...] = {}
    """By a source's path (or hub label) its fields that change: `{data/replay.jsonl: {weight: x2}}`; or a list of
    sources instead of the stage's own."""
    train: dict[str, Any] = {}
    """Fields of the training: `{learning_rate: x0.5}`."""
    seed: int | None = None
    """Another seed."""

    @model_validator(mode="after")
    def _changes_something(self) -> "ChangeSpec":
        if not any(getattr(self, name) not in ({}, (), None) for name in CHANGEABLE):
            raise ValueError(f"changes nothing: name fields of {', '.join(CHANGEABLE)}")
        return self


CHANGEABLE = tuple(ChangeSpec.model_fields)
"""The parts of a stage that an attempt may change."""


class RetrySpec(Spec):
    """When gates refuse, the stage is made again with the first change, then with the second, until one passes."""

    retry: Annotated[tuple[ChangeSpec, ...], Field(min_length=1, max_length=MOST_CHANGES)]
    """The changes, in order. Each is made to the stage as it is written, not to the attempt before."""
    then: Policy = "stop"
    """What becomes of the run if the gates refuse every attempt; the best of them is then the stage's result."""


class UnfitChange(ValueError):
    """A change that the stage does not take: its place within the change, and why."""

    def __init__(self, where: Location, message: str) -> None:
        """Keep both."""
        super().__init__(message)
        self.where, self.message = where, message


def changed_fields(stage: Spec, change: ChangeSpec) -> dict[str, Any]:
    """The fields of ``stage`` with ``change``, JSON-ready and not yet validated; those that were not given stay unsaid.

    Raises:
        UnfitChange: a multiple of what is no number, or a source that the stage does not have.
    """
    written = stage.model_dump(mode="json", exclude_unset=True)
    whole = stage.model_dump(mode="json")
    asked = change.model_dump(mode="json", exclude_unset=True)
    sources = asked.pop("data", {})
    fields = dict(_laid_over(written, whole, asked, ()))
    if asked.get("method", {}).get("kind", whole["method"]["kind"]) != whole["method"]["kind"]:
        fields["method"] = asked["method"]
    if isinstance(sources, list):
        fields["data"] = sources or fields["data"]
    for label, source in sources.items() if isinstance(sources, dict) else ():
        number = source_number(stage, label)
        place: Location = ("data", label)
        fields["data"][number] = dict(_laid_over(written["data"][number], whole["data"][number], source, place))
    return fields


def changed(stage: S, change: ChangeSpec, **fields: Any) -> S:
    """``stage`` with ``change``.

    Args:
        stage: as written.
        change: the attempt's.
        fields: further ones to set.

    Raises:
        UnfitChange: as `changed_fields`.
        pydantic.ValidationError: the result is no stage.
    """
    return type(stage).model_validate_json(json.dumps(changed_fields(stage, change) | fields), strict=True)


def source_number(stage: Any, label: str) -> int:
    """The place of a source of ``stage`` by its label.

    Raises:
        UnfitChange: there is none, or several.
    """
    labels = [source.label for source in stage.data]
    if labels.count(label) != 1:
        wrong = "several sources are" if label in labels else "no source of the stage is"
        raise UnfitChange(("data", label), f"{wrong} {label!r}; sources: {', '.join(labels)}")
    return labels.index(label)


def in_words(written: Any, stage: Any, change: ChangeSpec) -> str:
    """What an attempt changes, with the values that come of it: `learning_rate 1e-05, rank 8`.

    Args:
        written: the stage as written, by whose sources the change names them.
        stage: the attempt.
        change: what made it.
    """
    whole = stage.model_dump(mode="json")
    asked = change.model_dump(mode="json", exclude_unset=True)
    sources = asked.pop("data", {})
    words = list(_leaves(asked, whole))
    if isinstance(sources, list):
        words += ["other data"] if sources else []
    else:
        for label, source in sources.items():
            own = whole["data"][source_number(written, label)]
            words += [f"{word} of {label}" for word in _leaves(source, own)]
    return ", ".join(words)


def _leaves(asked: dict[str, Any], whole: Any) -> Iterator[str]:
    for name, value in asked.items():
        now = whole.get(name) if isinstance(whole, dict) else None
        if isinstance(value, dict):
            yield from _leaves(value, now)
        else:
            yield f"no {name}" if now is None else f"{name} {now}"


def _laid_over(
    written: dict[str, Any], whole: dict[str, Any], asked: dict[str, Any], place: Location
) -> Iterator[tuple[str, Any]]:
    """``written`` with what is ``asked``; multiples are of what stands in ``whole``, which has the defaults, too."""
    yield from ((name, value) for name, value in written.items() if name not in asked)
    for name, value in asked.items():
        before = whole.get(name)
        if isinstance(value, dict) and isinstance(before, dict):
            yield name, dict(_laid_over(written.get(name, {}), before, value, (*place, name)))
        elif value is not None:
            yield name, _multiple(value, before, (*place, name))


def _multiple(value: Any, before: Any, place: Location) -> Any:
    times = _TIMES.fullmatch(value) if isinstance(value, str) else None
    if times is None or isinstance(before, str):
        return value
    if before is None or isinstance(before, bool) or not isinstance(before, int | float):
        raise UnfitChange(place, f"{value} multiplies a number, and the stage has none here; write the value")
    product = Decimal(repr(before)) * Decimal(times[1])
    if isinstance(before, float):
        if not math.isfinite(float(product)):
            raise UnfitChange(place, f"{value[:20]}… makes a number of {before} that is too large; write the value")
        return float(product)
    if product > _LARGEST:
        raise UnfitChange(place, f"{value[:20]} makes a whole number of {before} that is too large; write the value")
    if product != product.to_integral_value():
        raise UnfitChange(place, f"{value} makes {product:f} of {before}, and it must be a whole number; write one")
    return int(product)
