"""What nothing refers to any more, and how it is removed: decided under the locks of its steps, renamed away first.

docs/artifacts.md has the table of what refers to what. Whatever is not listed there stays: unknown folders, links and
what they lead to, damaged artifacts, and everything of a step that a process works on.
"""

import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from stages.artifact import (
    EVALUATION,
    JOBS,
    LOCKS,
    MODEL,
    SET_ASIDE,
    WORK,
    Artifact,
    lock_file,
    misshapen,
    published_in,
    set_aside,
    step_of,
)
from stages.documents import PARTIAL, read_object, sync
from stages.errors import InvalidInput, TryAgain
from stages.lock import ENDINGS, exclusive
from stages.store import CURRENT, KEY, Current, ancestors, current, folders, stores, work_of

_JOB = re.compile(rf".+-(?P<key>{KEY.pattern})\.[a-z.]+")
_LOCK = re.compile(rf"(?P<key>{KEY.pattern})(?:{'|'.join(map(re.escape, ENDINGS))})")
_PARTIAL = re.compile(rf"\..+\.(?P<pid>\d+)-[0-9a-f]{{8}}{re.escape(PARTIAL)}")


@dataclass(frozen=True)
class Item:
    """Something that may go."""

    path: Path
    why: str
    key: str | None
    """The step whose lock is taken first; None where no step can be at work on it."""


@dataclass
class Garbage:
    """What may go, and what stays although nothing refers to it."""

    items: list[Item] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    """Lines for people."""


def find_garbage(root: Path, ours: frozenset[str] = frozenset()) -> Garbage:
    """Look through every pipeline below ``root``.

    Args:
        root: the folder of all artifacts.
        ours: the steps whose locks this process holds.
    """
    found = Garbage([*_partials(root)])
    for entry in sorted(root.iterdir()):
        if entry.is_symlink():
            found.left.append(f"{entry}: a link, which is not followed")
    for store in stores(root):
        try:
            _Sweep(store, current(store), ours, found).all()
        except InvalidInput as error:
            found.left.append(f"{store}: nothing of this pipeline is looked at: {error}")
    return found


def remove(root: Path, wanted: Iterable[Item]) -> tuple[list[Item], list[str]]:
    """Remove what is still garbage once the locks of its steps are held.

    Returns:
        What is gone, and a line for each thing that stayed and why.
    """
    gone, stayed = [], []
    with ExitStack() as locks:
        held = set()
        items = list(wanted)
        for store, key in sorted({(_store_of(root, item), item.key) for item in items if item.key is not None}):
            try:
                for ending in ENDINGS:
                    locks.enter_context(exclusive(lock_file(store, key, ending)))
                held.add(key)
            except TryAgain as error:
                stayed.append(f"{store / key}: {error}")
        again = {item.path for item in find_garbage(root, frozenset(held)).items}
        for item in items:
            if item.key is not None and item.key not in held:
                continue
            if item.path not in again:
                stayed.append(f"{item.path}: referred to by now")
                continue
            try:
                _remove(item.path)
                gone.append(item)
            except OSError as error:
                stayed.append(f"{item.path}: {error.strerror}; remove it by hand")
        for item in find_garbage(root, frozenset(held)).items:
            if item.path.parent.name == LOCKS and item.key in held:
                item.path.unlink(missing_ok=True)  # of steps that went just now
    return gone, stayed


def _store_of(root: Path, item: Item) -> Path:
    return root / item.path.relative_to(root).parts[0]


def _remove(path: Path) -> None:
    """Rename a folder away before its files go: what a crash leaves of it must not look whole."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        if path.parent.name != SET_ASIDE:
            before, path = path.parent, set_aside(path)
            sync(before)
        shutil.rmtree(path)
    if path.parent.name == SET_ASIDE and not any(path.parent.iterdir()):
        path.parent.rmdir()


class _Sweep:
    """One pipeline's folder."""

    def __init__(self, store: Path, named: Current, ours: frozenset[str], found: Garbage) -> None:
        self.store, self.named, self.found = store, named, found
        self.gone: set[Path] = set()
        self.artifacts = {one.path: one for one in published_in(store)}
        self.whole = [one for one in self.artifacts.values() if not misshapen(one)]
        self.busy = {key for key in _locked(store) if key not in ours and _is_held(store, key)}
        self.live = ancestors(self._starts(), {one.identity: one for one in self.artifacts.values()})
        published = {one.identity for one in self.whole}
        # A step that is to be made goes on in its folder; so does one of which only settings of memory were changed.
        self.needed = {work for identity, work in named.works.items() if identity not in published}

    def all(self) -> None:
        """Look at everything that is ours."""
        for spec in self.named.gone:
            self.found.left.append(
                f"{spec}: this spec is gone, and what its last run named is kept; to let go of it, remove the file "
                f"that names it in {self.store / CURRENT}"
            )
        self.found.items += [item for item in self._items() if item.key not in self.busy]
        for key in sorted(self.busy):
            self.found.left.append(
                f"{self.store / WORK / key}: a process works on this step; run again when it is done"
            )

    def _starts(self) -> Iterator[str]:
        """The identities that something refers to by itself; their ancestors follow."""
        yield from self.named.works
        yield from {step_of(one.path): one.identity for one in self.whole}.values()  # the last published comes last
        link = self.store / MODEL
        used = {Path(start).name for file in _entries(self.store / JOBS) if (start := self._start_at_work(file))}
        for path, one in self.artifacts.items():
            released = link.is_symlink() and link.resolve().is_relative_to(path)
            if released or path.name in used or work_of(one) in self.busy:
                yield one.identity

    def _start_at_work(self, file: Path) -> str:
        """What the step of a job file starts from, if a process works on it."""
        job = _job(file)
        return job["start"] if job["work"] in self.busy else ""

    def _items(self) -> Iterator[Item]:
        for item in (*self._artifacts(), *self._works()):
            self.gone.add(item.path)
            yield item
        yield from self._jobs()
        yield from self._locks()
        yield from self._set_aside()
        below = folders(self.store)
        for place in (self.store, self.store / CURRENT, *below, *(folder / EVALUATION for folder in below)):
            yield from _partials(place)

    def _artifacts(self) -> Iterator[Item]:
        for folder in folders(self.store):
            artifact = self.artifacts.get(folder)
            if artifact is None:
                self.found.left.append(f"{folder}: its manifest cannot be read; `trivium verify` says what to do")
            elif artifact.identity in self.live:
                continue
            elif artifact not in self.whole:
                self.found.left.append(f"{folder}: damaged; `trivium verify` says what to do")
            else:
                yield Item(folder, "no spec, newer artifact, release or running process needs it", work_of(artifact))

    def _works(self) -> Iterator[Item]:
        published = {work_of(one) for one in self.whole}
        for folder in _entries(self.store / WORK):
            key = folder.name
            if not KEY.fullmatch(key) or key in self.needed:
                continue
            if key in published:
                yield Item(folder, "its step is published", key)
            elif self.named.works:
                yield Item(folder, "no spec's last run goes on in it", key)
            else:
                self.found.left.append(f"{folder}: no run has said yet which steps it needs; `trivium run` does")

    def _staying(self) -> list[Artifact]:
        return [one for path, one in self.artifacts.items() if path not in self.gone]

    def _jobs(self) -> Iterator[Item]:
        """A job's files bear its step's identity; they go with the artifact, and stay while its work does."""
        steps = {identity[:16] for identity in (*self.named.works, *(one.identity for one in self._staying()))}
        works = {folder.name for folder in _entries(self.store / WORK) if folder not in self.gone}
        for file in _entries(self.store / JOBS):
            match = _JOB.fullmatch(file.name)
            if match and file.is_file() and match["key"] not in steps and _job(file)["work"] not in works:
                yield Item(file, "its step is gone", _job(file)["work"] or None)

    def _locks(self) -> Iterator[Item]:
        works = {*self.named.works.values(), *(work_of(one) for one in self._staying())}
        works |= {folder.name for folder in _entries(self.store / WORK) if folder not in self.gone}
        for file in _entries(self.store / LOCKS):
            match = _LOCK.fullmatch(file.name)
            if match and file.is_file() and match["key"] not in works:
                yield Item(file, "its step is gone", match["key"])

    def _set_aside(self) -> Iterator[Item]:
        places: list[tuple[Path, str | None]] = [(self.store, None), (self.store / WORK, None)]
        for work in _entries(self.store / WORK):
            if KEY.fullmatch(work.name) and work not in self.gone:
                places += [(place, work.name) for place in (work, *_entries(work))]
        for place, key in places:
            for path in _entries(place / SET_ASIDE, links=True):
                yield Item(path, "set aside", key)


def _job(file: Path) -> dict[str, str]:
    """From a job file, or the one beside a log: the name of the folder that it works in, and what it starts from."""
    try:
        job = read_object(file.with_suffix(".json"))
    except InvalidInput:
        job = {}
    work, start = job.get("work"), job.get("start")
    return {"work": Path(work).name if isinstance(work, str) else "", "start": start if isinstance(start, str) else ""}


def _entries(folder: Path, *, links: bool = False) -> list[Path]:
    """What is in a folder of ours, without links unless they are asked for; nothing where it is a link itself."""
    if folder.is_symlink() or not folder.is_dir():
        return []
    return [path for path in sorted(folder.iterdir()) if links or not path.is_symlink()]


def _partials(folder: Path) -> Iterator[Item]:
    for path in _entries(folder):
        match = _PARTIAL.fullmatch(path.name)
        if match and path.is_file() and not _is_alive(int(match["pid"])):
            yield Item(path, "half written by a process that is gone", None)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _locked(store: Path) -> set[str]:
    """The steps that ever had a lock."""
    names = (_LOCK.fullmatch(file.name) for file in _entries(store / LOCKS))
    return {match["key"] for match in names if match}


def _is_held(store: Path, key: str) -> bool:
    for ending in ENDINGS:
        file = lock_file(store, key, ending)
        if file.is_file():
            try:
                with exclusive(file):
                    pass
            except TryAgain:
                return True
    return False
