"""Published outputs: a folder that appeared by one rename and whose manifest names every byte of it.

The manifest seals what a stage made. These may be added later and are sealed by themselves: the measurements in
``evaluation/``, the ``verdict.json`` that follows from them, because gates and metrics can be edited without training
again, what people decided, in ``decisions/``, and a model card, which follows from all that.
"""

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specs.printable import printable_line
from stages.documents import PARTIAL, make_folder, sync, write_json
from stages.errors import InvalidInput, StageFailed
from stages.manifest import NAME, read_manifest, sealed

MANIFEST = "manifest.json"
MODEL = "model"
ADAPTER = "adapter"
BENEATH = "beneath"
"""The entry of a record that says which base an unmerged adapter belongs on; see `beneath`."""
EVALUATION = "evaluation"
VERDICT = "verdict.json"
DECISIONS = "decisions"
"""What people decided where gates refused, a file for each question."""
CARD = "README.md"
"""The model card beside a release; it follows from the chain and what was measured of it."""
WORK, JOBS, LOCKS, SET_ASIDE = ".work", ".jobs", ".locks", ".set-aside"
"""Beside the artifacts of a pipeline: what is being made, job files and logs, locks, what was damaged."""
MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")
"""What a plain checkpoint consists of."""


LOADED = frozenset(
    (".safetensors", ".json", ".jinja", ".model", ".txt", ".tiktoken", ".py", ".so", ".bin", ".pt", ".pth", ".ckpt",
     ".pkl", ".h5", ".msgpack", ".gguf", ".onnx")
)  # fmt: skip
"""How the names of files end that some loader of models reads or runs, listed or not."""
_LITTER = re.compile(
    r"\.DS_Store|\._.*|Thumbs\.db|desktop\.ini|\.directory|\.nfs[0-9a-f]+|.*~|\..*\.sw[a-p]|\.#.*|#.*#"
)
"""What file browsers, editors and network file systems leave behind."""


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
    def number(self) -> int:
        """Its place in the order of publication in its store, whatever the clock said; 0 in the oldest manifests."""
        return int(self.manifest["record"].get("number", 0))

    @property
    def parents(self) -> frozenset[str]:
        """The identities of what it was made from, and of the base that it does not load without."""
        named = (self.manifest["inputs"].get("parent"), self._beneath.get("identity"))
        return frozenset(identity for identity in named if isinstance(identity, str))

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
        if beneath is None or (beneath.adapter is not None and not (beneath.path / MODEL).is_dir()):
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


def model_files(folder: Path) -> list[Path]:
    """The files in ``folder`` that a plain checkpoint consists of, sorted."""
    return sorted({file for pattern in MODEL_FILES for file in folder.glob(pattern)})


def lock_file(store: Path, work: str, ending: str) -> Path:
    """One of the locks of a step.

    Args:
        store: the pipeline's folder.
        work: the name of the folder that the step is made in: those who share it wait for one another.
        ending: one of `stages.lock.ENDINGS`.
    """
    return store / LOCKS / f"{work}{ending}"


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
    files, others = _contents(folder)
    for name in others:
        raise StageFailed(f"{folder / name}: neither a regular file nor a folder; remove it")
    return [folder / name for name in files]


def _contents(folder: Path) -> tuple[dict[str, int], list[str]]:
    """The files below ``folder`` with their sizes, and what is neither a file nor a folder; links are not followed."""
    files, others, below = {}, [], [""]
    while below:
        place = below.pop()
        with os.scandir(folder / place) as entries:
            for entry in entries:
                name = place + entry.name
                if entry.is_dir(follow_symlinks=False):
                    below.append(f"{name}/")
                elif entry.is_file(follow_symlinks=False):
                    files[name] = entry.stat(follow_symlinks=False).st_size
                else:
                    others.append(name)
    return dict(sorted(files.items(), key=lambda item: Path(item[0]))), sorted(others)


def publish(work: Path, target: Path, *, identity: dict[str, Any], record: dict[str, Any]) -> Artifact:
    """Seal ``work`` with a manifest and let it appear at ``target`` by one rename.

    Args:
        work: the finished folder, on the same file system as ``target``.
        target: where it appears; must not exist.
        identity: the document whose fingerprint is the artifact's identity.
        record: what the stage wants known: versions, measurements of the run, hand-over errors.

    Returns:
        The artifact; its record holds a number, one more than the highest in its store. Two stages that publish at
        the same moment may get the same one.
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
    number = 1 + max((one.number for one in published_in(target.parent)), default=0)
    manifest = sealed(identity, record | {"number": number}, files)
    write_json(work / MANIFEST, manifest)
    make_folder(target.parent)
    work.rename(target)
    sync(target.parent)
    return Artifact(target, manifest)


def read(path: Path) -> Artifact | None:
    """The artifact at ``path`` by its manifest, or None where there is none that can be read and believed."""
    manifest = read_manifest(path / MANIFEST)
    return None if manifest is None else Artifact(path, manifest)


def damage(artifact: Artifact, digest: Callable[[Path], str] = sha256) -> list[str]:
    """What differs between an artifact and its manifest; empty when every byte is as published.

    Where a base refers to a folder elsewhere, or an adapter belongs on a base, that is compared as well.

    Args:
        artifact: the published folder.
        digest: how a file is hashed; a planner passes one that remembers unchanged files.
    """
    return _damage_inside(artifact, digest) + damage_elsewhere(artifact, digest) + _damage_beneath(artifact, digest)


def misshapen(artifact: Artifact) -> list[str]:
    """The part of `damage` that shows without reading: files that are missing, of another size or too many."""
    return _damage_inside(artifact, None)


def _damage_inside(artifact: Artifact, digest: Callable[[Path], str] | None) -> list[str]:
    try:
        present, others = _contents(artifact.path)
    except OSError as error:
        return [f"cannot be read ({error.strerror})"]
    found = [f"{_shown(name)} is a link or a device" for name in others if not _may_be_added(name)]
    for name, expected in artifact.manifest["files"].items():
        size = present.pop(name, None)
        if size is None:
            found += [] if name in others else [f"{name} is missing"]
        elif size != expected["size"]:
            found.append(f"{name} has {size} bytes instead of {expected['size']}")
        elif digest is not None:
            found += _compared(artifact.path / name, expected["sha256"], name, digest)
    unlisted = _unlisted(present)
    return found + [f"{_shown(name)} does not belong there" for name in unlisted if _is_loaded(name)]


def strays(artifact: Artifact) -> list[str]:
    """What lies in an artifact, is none of its own and is no damage either: no loader of models looks at it.

    What file browsers and editors leave behind (``.DS_Store``, ``config.json~``) is not among them.
    """
    try:
        present, _ = _contents(artifact.path)
    except OSError:
        return []  # `damage` says so
    unlisted = _unlisted([name for name in present if name not in artifact.manifest["files"]])
    return [_shown(name) for name in unlisted if not _is_loaded(name) and not _is_litter(name)]


def _unlisted(names: Iterable[str]) -> list[str]:
    """Those of ``names``, none of which is in the manifest, that are not ours in another way."""
    return [name for name in names if name != MANIFEST and not _may_be_added(name) and not name.endswith(PARTIAL)]


def _is_loaded(name: str) -> bool:
    return not _is_litter(name) and Path(name).suffix.lower() in LOADED


def _is_litter(name: str) -> bool:
    return _LITTER.fullmatch(Path(name).name) is not None


def _may_be_added(name: str) -> bool:
    """Whether a file may come after the manifest; it is sealed by itself, and made anew where it is not sound."""
    return name in (VERDICT, CARD) or name.startswith((f"{EVALUATION}/", f"{DECISIONS}/"))


def damage_elsewhere(artifact: Artifact, digest: Callable[[Path], str] = sha256) -> list[str]:
    """What differs between the folder that a base refers to and the files that the base is identified by."""
    if not artifact.manifest["record"].get("model_path"):
        return []
    known = artifact.manifest["inputs"].get("files", {})
    try:
        present = {file.name: file for file in model_files(artifact.model)}
    except OSError as error:
        return [f"{artifact.model} cannot be read ({error.strerror})"]
    found = [f"{artifact.model / name} is missing" for name in known if name not in present]
    for name, file in sorted(present.items()):
        found += _compared(file, known[name], str(file), digest) if name in known else [f"{_shown(str(file))} is new"]
    return found


def _compared(file: Path, expected: str, name: str, digest: Callable[[Path], str]) -> list[str]:
    try:
        return [] if digest(file) == expected else [f"{name} was changed"]
    except FileNotFoundError:
        return [f"{name} is missing"]
    except OSError as error:
        return [f"{name} cannot be read ({error.strerror})"]


def _shown(name: str) -> str:
    """A name from the disk, which may hold anything, as text that can be printed."""
    return printable_line(name.encode("utf-8", "backslashreplace").decode())


def beneath(identity: str, model: Path) -> dict[str, Any]:
    """The record of the base that an unmerged adapter belongs on.

    Args:
        identity: of the artifact that holds the base.
        model: the base as a plain checkpoint.
    """
    return {"identity": identity, "files": {file.name: sha256(file) for file in model_files(model)}}


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
        found += _compared(model / name, expected, f"{name} of its base", digest)
    return found


def verified(artifact: Artifact) -> Artifact:
    """``artifact`` itself, after every byte was compared with its manifest.

    Raises:
        StageFailed: it was damaged; the message names the files and what to do.
    """
    found = damage(artifact)
    if not found:
        return artifact
    listed = "; ".join(found[:5]) + (f"; and {len(found) - 5} more" if len(found) > 5 else "")
    raise StageFailed(f"{artifact.path}: damaged since it was published: {listed}. {remedy(artifact, found)}")


def remedy(artifact: Artifact, found: list[str]) -> str:
    """What to do about what `damage` found."""
    elsewhere = artifact.manifest["record"].get("model_path")
    if elsewhere and any(line.startswith(str(Path(elsewhere))) for line in found):
        return (
            f"Put the files of {elsewhere} back as they were, or run `trivium run` on the spec: a base that was "
            "changed is another base, and every stage is made anew from it"
        )
    return (
        "Run `trivium run` on the spec: the folder is set aside and its step is made anew; "
        "what is published after it and whole is kept"
    )


def published_in(store: Path) -> list[Artifact]:
    """Every artifact in a pipeline's folder whose manifest can be read, the first published first."""
    folders = [path for path in store.glob("*") if NAME.fullmatch(path.name) and not path.is_symlink()]
    found = [artifact for path in folders if (artifact := read(path)) is not None]
    return sorted(found, key=lambda artifact: (artifact.number, artifact.path.name))


def find(store: Path, identity: str) -> Artifact | None:
    """The published artifact with this identity, whatever its stage is called by now."""
    for path in sorted(store.glob(f"*-{short(identity)}")):
        artifact = None if path.is_symlink() else read(path)
        if artifact is not None and artifact.identity == identity:
            return artifact
    return None


def newest_of_stage(store: Path, stage: str) -> Artifact | None:
    """The last published artifact of a stage by its name, of whatever identity. Clocks play no part."""
    return next((one for one in reversed(published_in(store)) if step_of(one.path) == stage), None)


def step_of(path: Path) -> str | None:
    """The name of the step whose artifact is at ``path``; None where no artifact is called so."""
    match = NAME.fullmatch(path.name)
    return match["step"] if match else None


def set_aside(path: Path) -> Path:
    """Move a folder out of the way, under `SET_ASIDE` beside it, and return its new place."""
    number = 1
    while (target := path.parent / SET_ASIDE / f"{path.name}.{number}").exists():
        number += 1
    target.parent.mkdir(exist_ok=True)
    return Path(shutil.move(path, target))
