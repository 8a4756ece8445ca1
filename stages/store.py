"""The store of all pipelines below one root: which there are, what is in them, and which steps their specs name now."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from os.path import relpath
from pathlib import Path
from typing import Annotated

from pydantic import StringConstraints, ValidationError

from specs.base import Spec, fingerprint
from specs.load import SpecError
from specs.paths import Sha256
from stages.artifact import SET_ASIDE, WORK, Artifact, published_in, short
from stages.documents import read_json, write_json
from stages.errors import InvalidInput, TriviumError
from stages.identity import work_key
from stages.manifest import NAME
from stages.pipeline import load_pipeline
from stages.plan import Plan, Step, make_plan

CURRENT = ".current"
"""The folder with one file per spec: the steps that its last run was planned with."""
KEY = re.compile(r"[0-9a-f]{16}")
"""What work folders and locks are called, and how the names of job files end."""


class _Named(Spec):
    """A step as a run planned it."""

    identity: Sha256
    work: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{16}$")]


class _Current(Spec):
    """What is kept of a run's plan."""

    spec: str
    steps: dict[str, _Named]


@dataclass(frozen=True)
class Current:
    """The steps that the specs of a store name: at their last run, and as they are now."""

    specs: tuple[Path, ...]
    works: dict[str, str]
    """Identity -> the name of the folder that the step is made in."""

    @property
    def gone(self) -> tuple[Path, ...]:
        """The specs that are not where they were: what they named is kept all the same."""
        return tuple(spec for spec in self.specs if not spec.is_file())


def root_at(place: Path, artifacts: str) -> Path:
    """The folder of all artifacts that ``place`` means.

    Args:
        place: that folder itself, a project's, or a spec.
        artifacts: what a project calls it.

    Raises:
        InvalidInput: nothing was ever published there.
    """
    below = (place.parent if place.is_file() else place) / artifacts
    for root in (place, below):
        if root.is_dir() and stores(root):
            return root.resolve()
    if place.is_dir() and _is_store(place):
        raise InvalidInput(f"{place}: the folder of one pipeline; name the one above it: {place.resolve().parent}")
    raise InvalidInput(
        f"{place}: no artifacts there; name the folder that holds them (`{artifacts}` in a project, or what was given "
        "as --root), the project or its spec"
    )


def stores(root: Path) -> list[Path]:
    """The folders of the pipelines below ``root``; links are not followed."""
    return [path for path in sorted(root.iterdir()) if not path.name.startswith(".") and _is_store(path)]


def _is_store(path: Path) -> bool:
    if path.is_symlink() or not path.is_dir():
        return False
    return any(entry.name in {WORK, CURRENT, SET_ASIDE} or NAME.fullmatch(entry.name) for entry in path.iterdir())


def folders(store: Path) -> list[Path]:
    """The folders that are called as artifacts are, readable or not; links are not followed."""
    return [path for path in sorted(store.iterdir()) if NAME.fullmatch(path.name) and _is_folder(path)]


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def by_identity(store: Path) -> dict[str, Artifact]:
    """The artifacts of a store whose manifests can be read."""
    return {artifact.identity: artifact for artifact in published_in(store)}


def ancestors(identities: Iterable[str], known: dict[str, Artifact]) -> set[str]:
    """``identities`` and all that they were made from, and the bases beneath adapters."""
    found: set[str] = set()
    ahead = list(identities)
    while ahead:
        identity = ahead.pop()
        if identity not in found:
            found.add(identity)
            ahead += known[identity].parents if identity in known else ()
    return found


def dependents(folder: Path, known: dict[str, Artifact]) -> list[Artifact]:
    """The artifacts that were made from the one in ``folder``, or do not load without it; its manifest is not asked."""
    match = NAME.fullmatch(folder.name)
    found = {match["short"]} if match else set()
    reached: list[Artifact] = []
    others = [one for one in known.values() if one.path != folder]
    while new := [one for one in others if one not in reached and any(short(above) in found for above in one.parents)]:
        reached += new
        found |= {short(one.identity) for one in new}
    return reached


def remember(plan: Plan, spec: Path) -> None:
    """Keep which steps a run of ``spec`` is planned with, so that nobody clears them away.

    The spec is named by its way from the store: a project that is moved as a whole still finds it.
    """
    way = relpath(spec.resolve(), plan.store)
    steps = {_called(step): _Named(identity=step.key, work=step.work.name) for step in plan.named}
    document = _Current(spec=way, steps=steps).model_dump()
    file = plan.store / CURRENT / f"{fingerprint(way)[:16]}.json"
    try:
        if read_json(file, strict=True) == document:
            return
    except InvalidInput:
        pass  # the first run, or a broken file, which is written anew
    write_json(file, document)


def _called(step: Step) -> str:
    """A step's name in the record of a run; the first attempt at a stage has the stage's."""
    return step.name if step.attempt == 1 else f"{step.name}, attempt {step.attempt}"


def current(store: Path) -> Current:
    """What the specs of a store name.

    Raises:
        InvalidInput: a record of a run cannot be read, so what it protects is not known.
    """
    specs: list[Path] = []
    works: dict[str, str] = {}
    for file in sorted((store / CURRENT).glob("*.json")):
        try:
            kept = _Current.model_validate(read_json(file, strict=True))
        except (InvalidInput, ValidationError) as error:
            raise InvalidInput(
                f"{file}: cannot be read, so which artifacts it protects is not known; run `trivium run` on the specs "
                f"of {store.name}, then remove it"
            ) from error
        spec = (store / kept.spec).resolve()
        specs.append(spec)
        works |= {one.identity: one.work for one in kept.steps.values()}
        works |= {step.key: step.work.name for step in _steps_now(spec, store)}
    return Current(tuple(specs), works)


def _steps_now(spec: Path, store: Path) -> tuple[Step, ...]:
    """The steps of a spec as it is now; none where it cannot be planned, and what its last run named stands alone."""
    try:
        pipeline, _ = load_pipeline(spec)
        plan = make_plan(pipeline, spec.parent, store.parent)
    except (SpecError, TriviumError, OSError):
        return ()
    return plan.named if plan.store == store else ()


def work_of(artifact: Artifact) -> str:
    """The name of the folder that an artifact was made in, which is that of its lock."""
    return work_key(artifact.manifest["inputs"])


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files below a folder; links count as themselves."""
    if path.is_symlink() or not path.is_dir():
        return path.lstat().st_size
    return sum(one.lstat().st_size for one in path.rglob("*") if one.is_symlink() or not one.is_dir())
