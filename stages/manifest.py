"""The shape of a manifest: whoever wrote it, its readers meet no other types and no name that leads outside."""

import re
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, NonNegativeInt, ValidationError

from specs.base import Spec, fingerprint
from specs.paths import Sha256
from stages.documents import read_json
from stages.errors import InvalidInput

FORMAT = 1
NAME = re.compile(r"\d{2,}-(?P<step>.+)-(?P<short>[0-9a-f]{8})")
"""What the folder of an artifact is called: the step's order and name, the beginning of its identity."""
_LIMIT = 16 << 20
"""Bytes of a manifest: some hundred thousand files."""


def _inside(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or str(path) != name or name == "." or "\0" in name:
        raise ValueError("not the name of a file inside the folder")
    return name


def _absolute(place: str) -> str:
    if not Path(place).is_absolute() or "\0" in place:
        raise ValueError("not the full path of a folder")
    return place


Inside = Annotated[str, AfterValidator(_inside)]


class _Entry(Spec):
    sha256: Sha256
    size: NonNegativeInt


class _Beneath(Spec):
    identity: Sha256
    files: dict[Inside, Sha256]


class _Record(BaseModel):
    """What readers of a record rely on; the rest is for people."""

    model_config = ConfigDict(strict=True, extra="allow")

    number: NonNegativeInt = 0
    model_path: Annotated[str, AfterValidator(_absolute)] | None = None
    beneath: _Beneath | None = None


class _Stage(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    train: dict[str, Any] = {}


class _Inputs(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    stage: _Stage = _Stage()
    files: dict[str, Sha256] = {}


class _Manifest(Spec):
    format: Literal[1]
    identity: Sha256
    inputs: _Inputs
    record: _Record
    files: dict[Inside, _Entry]
    seal: Sha256


def sealed(inputs: dict[str, Any], record: dict[str, Any], files: dict[str, Any]) -> dict[str, Any]:
    """The manifest of what was made.

    Args:
        inputs: the document whose fingerprint is the identity.
        record: what the stage wants known.
        files: sha256 and size by name.
    """
    body = {"format": FORMAT, "identity": fingerprint(inputs), "inputs": inputs, "record": record, "files": files}
    return body | {"seal": fingerprint(body)}


def read_manifest(file: Path) -> dict[str, Any] | None:
    """The manifest in ``file``, or None where it is not of this shape or contradicts itself."""
    if file.is_symlink():
        return None
    try:
        manifest: dict[str, Any] = read_json(file, limit=_LIMIT, strict=True)
        _Manifest.model_validate(manifest)
        believed = manifest == sealed(manifest["inputs"], manifest["record"], manifest["files"])
    except (InvalidInput, ValidationError, ValueError, RecursionError):
        return None
    return manifest if believed else None
