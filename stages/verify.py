"""Integrity on demand: every byte below a root compared with what was recorded of it, and what a damage touches."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from specs.base import fingerprint
from stages import checkpoint, evaluate
from stages.artifact import (
    CARD,
    DECISIONS,
    EVALUATION,
    MODEL,
    VERDICT,
    WORK,
    Artifact,
    damage,
    damage_elsewhere,
    published_in,
    read,
    remedy,
    sha256,
    short,
    strays,
)
from stages.documents import PARTIAL, is_sealed_card, read_sealed
from stages.errors import InvalidInput
from stages.store import by_identity, dependents, folders, size_of, stores

ANEW = "`trivium run` on its spec sets it aside and makes it anew; where no spec needs it any more, remove it"


@dataclass(frozen=True)
class Finding:
    """Something that is not as it was recorded."""

    path: Path
    what: list[str]
    """File by file."""
    depends: list[str]
    """What was made from it or leads to it, by name."""
    remedy: str


@dataclass
class Report:
    """What was looked at, and what was found."""

    artifacts: int = 0
    evaluations: int = 0
    verdicts: int = 0
    decisions: int = 0
    checkpoints: int = 0
    bases: int = 0
    """Folders elsewhere that a base refers to."""
    bytes: int = 0
    findings: list[Finding] = field(default_factory=list)


def weigh(root: Path) -> int:
    """About how many bytes `verify` will read below ``root``."""
    total = 0
    for store in stores(root):
        for one in published_in(store):
            total += sum(entry["size"] for entry in one.manifest["files"].values())
            total += sum(size for _, size in _elsewhere(one))
        total += sum(size_of(place) for place in _sealed_checkpoints(store))
    return total


def verify(root: Path, advance: Callable[[int], None]) -> Report:
    """Hash everything that is published below ``root``, the bases it refers to, and sealed checkpoints.

    Args:
        root: the folder of all artifacts.
        advance: told the bytes of each file once it was read.
    """
    report = Report()
    known: dict[Path, str] = {}

    def digest(file: Path) -> str:
        place = file.resolve()
        if place not in known:
            known[place] = sha256(file)
            report.bytes += (size := file.stat().st_size)
            advance(size)
        return known[place]

    for store in stores(root):
        for folder in folders(store):
            _verify_artifact(folder, digest, report)
        for place in _sealed_checkpoints(store):
            _verify_checkpoint(place, report)
            advance(size_of(place) if place.is_dir() else 0)
        _verify_link(store, report)
    return report


def _verify_artifact(folder: Path, digest: Callable[[Path], str], report: Report) -> None:
    report.artifacts += 1
    artifact = read(folder)
    if artifact is None:
        what, do = ["its manifest is missing, was changed or cannot be read"], ANEW
    else:
        report.bases += bool(_elsewhere(artifact))
        what = damage(artifact, digest)
        do = ANEW if not damage_elsewhere(artifact, digest) else remedy(artifact, what)
        if not what and short(artifact.identity) != folder.name[-8:]:
            what = [f"it is called as another artifact; its identity begins with {short(artifact.identity)}"]
            do = "give the folder its old name back, or remove it"
    if what:
        report.findings.append(Finding(folder, what, _depending(folder), do))
    elif artifact is not None and (found := strays(artifact)):
        what = [f"{name} does not belong there" for name in found]
        report.findings.append(
            Finding(folder, what, [], "remove it: what was published is whole, nothing is made anew")
        )
    _verify_added(folder, report)


def _verify_added(folder: Path, report: Report) -> None:
    """What was added to an artifact after it was published, each sealed by itself."""
    for file in sorted((folder / EVALUATION).glob("*")):
        if file.name.endswith(PARTIAL):
            continue
        report.evaluations += 1
        if what := _wrong_evaluation(file):
            do = "`trivium run` measures it anew; where no spec asks for it any more, remove it"
            report.findings.append(Finding(file, [what], [], do))
    for file in sorted((folder / DECISIONS).glob("*.json")):
        report.decisions += 1
        try:
            read_sealed(file)
        except InvalidInput:
            do = "it counts as none: decide again with `trivium approve` or `trivium reject`, or remove it"
            report.findings.append(Finding(file, ["not as it was written"], [], do))
    _verify_card(folder / CARD, report)
    file = folder / VERDICT
    if file.exists() or file.is_symlink():
        report.verdicts += 1
        try:
            read_sealed(file)
        except InvalidInput:
            do = "`trivium run` judges anew from the measurements; where no spec does any more, remove it"
            report.findings.append(Finding(file, ["not as it was written"], [], do))


def _verify_card(file: Path, report: Report) -> None:
    if (file.exists() or file.is_symlink()) and not is_sealed_card(file):
        report.findings.append(Finding(file, ["not as it was written"], [], "`trivium run` writes it anew"))


def _wrong_evaluation(file: Path) -> str:
    """What is wrong with an evaluation file; empty where it is sound and of the metric that its name says."""
    try:
        body = read_sealed(file, limit=evaluate.LIMIT)
        if evaluate.load(file) is None:
            return "not an evaluation"
        own = short(fingerprint(body.get("identity")))
    except InvalidInput:
        return "not as it was written"
    return "" if file.stem.endswith(f"-{own}") else "it is called as another measurement"


def _sealed_checkpoints(store: Path) -> list[Path]:
    places = sorted((store / WORK).glob("*/checkpoints")) if not (store / WORK).is_symlink() else []
    return [place for folder in places for place in checkpoint.by_step(folder) if (place / checkpoint.SEAL).is_file()]


def _verify_checkpoint(place: Path, report: Report) -> None:
    size = size_of(place)
    wrong = checkpoint.damage(place)
    if wrong is not None and not (place / checkpoint.SEAL).is_file():
        return  # a process at work has pruned it meanwhile: the seal goes first
    report.checkpoints += 1
    report.bytes += size
    if wrong is not None:
        do = "the next `trivium run` of its stage sets it aside and resumes at the checkpoint before it"
        report.findings.append(Finding(place, [wrong.removeprefix("damaged: ")], [], do))


def _verify_link(store: Path, report: Report) -> None:
    link = store / MODEL
    if link.is_symlink() and not link.exists():
        what = [f"leads to {link.readlink()}, which is not there"]
        report.findings.append(Finding(link, what, [], "`trivium run` on the spec makes the release and the link anew"))


def _depending(folder: Path) -> list[str]:
    """By name: the artifacts that were made from the one in ``folder``, and the link to the released model."""
    store = folder.parent
    found = dependents(folder, by_identity(store))
    link = store / MODEL
    led = link.is_symlink() and any(
        link.resolve().is_relative_to(path) for path in (folder, *(one.path for one in found))
    )
    return [*(one.path.name for one in found), *([f"{MODEL} (the link to the release)"] if led else [])]


def _elsewhere(artifact: Artifact) -> list[tuple[Path, int]]:
    """The files of a base in a folder elsewhere, with their sizes."""
    if not artifact.manifest["record"].get("model_path"):
        return []
    files = [artifact.model / name for name in artifact.manifest["inputs"].get("files", {})]
    return [(file, file.stat().st_size if file.is_file() else 0) for file in files]
