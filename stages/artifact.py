"""Published outputs: a folder that appeared by one rename and whose manifest names every byte of it.

The manifest seals what a stage made. Two things may be added later and are sealed by themselves: the
measurements in ``evaluation/`` and the ``verdict.json`` that follows from them, because gates and metrics
can be edited without training again.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specs.base import fingerprint
from stages.documents import PARTIAL, sync, write_json
from stages.errors import InvalidInput, StageFailed

MANIFEST = "manifest.json"
MODEL = "model"
ADAPTER = "adapter"
BENEATH = "beneath"
"""The entry of a record that says which base an unmerged adapter belongs on; see `beneath`."""
EVALUATION = "evaluation"
VERDICT = "verdict.json"
MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")
"""What a plain checkpoint consists of."""
_ADDED_LATER = (MANIFEST, VERDICT, EVALUATION)
_FORMAT = 1


@dataclass(frozen=True, slots=True)
class Artifact:
    """A published folder and what its manifest says."""

    path: Path
    manifest: dict[str, Any]

    @property
    def identity(self) -> str:
        """sha256 (hex) over everything that could have changed the result."""
        return str(self.manifest["identity"])

    @property
    def model(self) -> Path:
        """The plain checkpoint: in the artifact, the folder that a base refers to, or what lies beneath `adapter`.

        Raises:
            StageFailed: the artifact is an adapter, and the base that it belongs on is not in the same folder.
        """
        elsewhere = self.manifest["record"].get("model_path")
        if elsewhere:
            return Path(elsewhere)
        if self.adapter is None or (self.path / MODEL).is_dir():
            return self.path / MODEL
        beneath = find(self.path.parent, self._beneath["identity"])
        if beneath is None:
            raise StageFailed(
                f"{self.path}: holds an adapter, and the base that it belongs on ({short(self._beneath['identity'])}) "
                f"is not in {self.path.parent}; run `trivium run` on the spec, or use the release, which holds both"
            )
        return beneath.model

    @property
    def adapter(self) -> Path | None:
        """The adapter without which `model` is not what was trained; None where `model` is all there is."""
        return self.path / ADAPTER if self._beneath else None

    @property
    def loadable(self) -> Path:
        """The folder to load: the plain checkpoint, or the artifact itself where it is base + adapter."""
        return self.model if self.adapter is None else self.path

    @property
    def _beneath(self) -> dict[str, Any]:
        return dict(self.manifest["record"].get(BENEATH, {}))


def short(identity: str) -> str:
    """The part of an identity that folder names carry."""
    return identity[:8]


def sha256(path: Path) -> str:
    """The sha256 (hex) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_writable(folder: Path) -> None:
    """Write and remove a file in ``folder``: rights and mounts have too many rules to ask instead.

    Raises:
        InvalidInput: nothing can be written there.
    """
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InvalidInput(f"{folder}: cannot be written to ({error.strerror}); name another folder") from error


def files_below(folder: Path) -> list[Path]:
    """Every file below ``folder``, sorted.

    Raises:
        StageFailed: something there is neither a regular file nor a folder (a link, a device).
    """
    found = []
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise StageFailed(f"{path}: neither a regular file nor a folder; remove it")
        if path.is_file():
            found.append(path)
    return found


def publish(work: Path, target: Path, *, identity: dict[str, Any], record: dict[str, Any]) -> Artifact:
    """Seal ``work`` with a manifest and let it appear at ``target`` by one rename.

    Args:
        work: the finished folder, on the same file system as ``target``.
        target: where it appears; must not exist.
        identity: the document whose fingerprint is the artifact's identity.
        record: what the stage wants known: versions, measurements of the run, hand-over errors.
    """
    files = {
        str(path.relative_to(work)): {"sha256": sha256(path), "size": path.stat().st_size}
        for path in files_below(work)
        if path.name != MANIFEST and not path.name.endswith(PARTIAL)
    }
    for name in files:
        sync(work / name)
    for folder in [path for path in work.rglob("*") if path.is_dir()]:
        sync(folder)
    manifest = {
        "format": _FORMAT,
        "identity": fingerprint(identity),
        "inputs": identity,
        "record": record,
        "files": files,
    }
    manifest["seal"] = fingerprint(manifest)
    write_json(work / MANIFEST, manifest)
    target.parent.mkdir(parents=True, exist_ok=True)
    work.rename(target)
    sync(target.parent)
    return Artifact(target, manifest)


def read(path: Path) -> Artifact | None:
    """The artifact at ``path`` by its manifest, or None where there is none that can be read."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != _FORMAT or manifest["identity"] != fingerprint(manifest["inputs"]):
            return None
        if manifest["seal"] != fingerprint({key: value for key, value in manifest.items() if key != "seal"}):
            return None
        return Artifact(path, manifest) if isinstance(manifest["files"], dict) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def damage(artifact: Artifact, digest: Callable[[Path], str] = sha256) -> list[str]:
    """What differs between an artifact and its manifest; empty when every byte is as published.

    Args:
        artifact: the published folder.
        digest: how a file is hashed; a planner passes one that remembers unchanged files.
    """
    found = []
    present = {str(path.relative_to(artifact.path)): path for path in files_below(artifact.path)}
    for name, expected in artifact.manifest["files"].items():
        path = present.pop(name, None)
        if path is None:
            found.append(f"{name} is missing")
        elif path.stat().st_size != expected["size"]:
            found.append(f"{name} has {path.stat().st_size} bytes instead of {expected['size']}")
        elif digest(path) != expected["sha256"]:
            found.append(f"{name} was changed")
    found += [
        f"{name} does not belong there"
        for name in present
        if Path(name).parts[0] not in _ADDED_LATER and not name.endswith(PARTIAL)
    ]
    return found + _damage_beneath(artifact, digest)


def beneath(identity: str, model: Path) -> dict[str, Any]:
    """The record of the base that an unmerged adapter belongs on.

    Args:
        identity: of the artifact that holds the base.
        model: the base as a plain checkpoint.
    """
    files = sorted({file for pattern in MODEL_FILES for file in model.glob(pattern)})
    return {"identity": identity, "files": {file.name: sha256(file) for file in files}}


def _damage_beneath(artifact: Artifact, digest: Callable[[Path], str]) -> list[str]:
    """What differs between the base that an unmerged adapter was trained on and the one that is there now."""
    if artifact.adapter is None:
        return []
    try:
        model = artifact.model
    except StageFailed as error:
        return [str(error)]
    found = []
    for name, expected in artifact._beneath["files"].items():
        if not (model / name).is_file():
            found.append(f"{name} of its base is missing")
        elif digest(model / name) != expected:
            found.append(f"{name} of its base was changed")
    return found


def verified(artifact: Artifact) -> Artifact:
    """``artifact`` itself, after every byte was compared with its manifest.

    Raises:
        StageFailed: it was damaged; the message names the files and what to do.
    """
    found = damage(artifact)
    if found:
        raise StageFailed(
            f"{artifact.path}: damaged since it was published: {'; '.join(found)}. "
            "Run `trivium run` on the spec: the folder is set aside, and that stage and those after it are made anew"
        )
    return artifact


def find(store: Path, identity: str) -> Artifact | None:
    """The published artifact with this identity, whatever its stage is called by now."""
    for path in sorted(store.glob(f"*-{short(identity)}")):
        artifact = read(path)
        if artifact is not None and artifact.identity == identity:
            return artifact
    return None


def newest_of_stage(store: Path, stage: str) -> Artifact | None:
    """The last published artifact of a stage by its name, of whatever identity."""
    found = [read(path) for path in store.glob(f"[0-9][0-9]-{stage}-????????")]
    published = [artifact for artifact in found if artifact is not None]
    return max(published, key=lambda artifact: artifact.manifest["record"].get("published", ""), default=None)


def set_aside(path: Path) -> Path:
    """Move a folder out of the way, under ``.set-aside`` beside it, and return its new place."""
    number = 1
    while (target := path.parent / ".set-aside" / f"{path.name}.{number}").exists():
        number += 1
    target.parent.mkdir(exist_ok=True)
    return Path(shutil.move(path, target))
