"""What every part of a spec has in common: frozen, strict, hashable by content."""

import hashlib
import json
from datetime import date
from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Spec(BaseModel):
    """A frozen, strict part of a spec: unknown keys, coercions, inf and nan are refused."""

    model_config = ConfigDict(
        frozen=True,
        strict=True,
        extra="forbid",
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        validate_default=True,
        protected_namespaces=(),
        defer_build=True,  # only the models in use are built: half of the time that a command needs to start
    )


def name_only(default: Any = ...) -> Any:
    """A field that labels or schedules but cannot change a result, so it is no part of an identity."""
    return Field(default, json_schema_extra={"identity": False})


def later_addition(default: Any) -> Any:
    """A field that counts in an identity only where it was set: what was published before it existed is kept."""
    return Field(default, json_schema_extra={"identity": "unless default"})


def identity_fields(spec: BaseModel) -> dict[str, Any]:
    """The fields of ``spec`` that can change a result, nested and JSON-ready.

    Fields declared with `name_only` are left out at every depth. Defaults are included, but for those of
    `later_addition`: changing a default of ours changes what a stage computes.
    """
    fields: dict[str, Any] = {}
    for name, field in type(spec).model_fields.items():
        extra = field.json_schema_extra
        counts = extra.get("identity") if isinstance(extra, dict) else None
        value = getattr(spec, name)
        if counts is False or (counts == "unless default" and value == field.default):
            continue
        fields[name] = _plain(value)
    return fields


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return identity_fields(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, date):
        return value.isoformat()
    return value


def fingerprint(document: Any) -> str:
    """The sha256 (hex, 64 characters) of a JSON document in canonical form.

    Raises:
        TypeError: a value has no JSON form; it is never replaced by its ``str``.
        ValueError: a value is inf or nan.
    """
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
