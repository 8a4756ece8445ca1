"""What every part of a spec has in common: frozen, strict, hashable by content."""

import hashlib
import json
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

Slug = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")]
"""A name that is safe as a folder name and as a Prefect key."""


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


def identity_fields(spec: BaseModel) -> dict[str, Any]:
    """The fields of ``spec`` that can change a result, nested and JSON-ready.

    Fields declared with `name_only` are left out at every depth. Defaults are included: changing a
    default of ours changes what a stage computes.
    """
    fields: dict[str, Any] = {}
    for name, field in type(spec).model_fields.items():
        extra = field.json_schema_extra
        if isinstance(extra, dict) and extra.get("identity") is False:
            continue
        fields[name] = _plain(getattr(spec, name))
    return fields


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return identity_fields(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value


def fingerprint(document: Any) -> str:
    """The sha256 (hex, 64 characters) of a JSON document in canonical form.

    Raises:
        TypeError: a value has no JSON form; it is never replaced by its ``str``.
        ValueError: a value is inf or nan.
    """
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
