"""Every member of the registry of methods, with settings for a tiny model: the rows of the tables of behaviours."""

from typing import Any, get_args

from stages.methods import Method
from stages.methods.base import MethodSpec

SETTINGS: dict[str, Any] = {"rank": 4, "top_percent": 50.0, "initial_rank": 6, "target_rank": 3, "group_size": 8}
"""Values for fields whose default is too large, or too small, for a tiny model."""
REQUIRED: dict[str, dict[str, Any]] = {
    "top_layers": {"layers": 2},
    "random_subset": {"percent": 50.0},
}
"""Fields without a default."""


def method_of(kind: str, **fields: Any) -> MethodSpec:
    """A method by its kind."""
    cls = next(cls for cls in KINDS.values() if get_args(cls.model_fields["kind"].annotation)[0] == kind)
    small = {name: value for name, value in SETTINGS.items() if name in cls.model_fields}
    return cls.model_validate({"kind": kind} | small | REQUIRED.get(kind, {}) | fields)


KINDS: dict[str, type[MethodSpec]] = {
    get_args(cls.model_fields["kind"].annotation)[0]: cls for cls in get_args(get_args(Method)[0])
}
METHODS = [method_of(kind) for kind in KINDS]
MERGEABLE = [method for method in METHODS if method.mergeable]


def label(value: object) -> str:
    """How a test is called after a method: its kind, and the fields that were set beside those of the table."""
    if not isinstance(value, MethodSpec):
        return str(value)
    usual = method_of(value.kind)
    fields = [
        str(getattr(value, name)) for name in type(value).model_fields if getattr(value, name) != getattr(usual, name)
    ]
    return "-".join([value.kind, *fields])
