"""A publication in a folder: whole or absent, and never in place of what a person may want to keep."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import ValidationError

from flows.publish.publication import MANIFEST, Publication, Published, published
from specs.base import fingerprint
from specs.printable import printable_line
from stages.artifact import files_below, lock_file, sha256
from stages.documents import make_folder, read_sealed, sync, write_sealed, write_text
from stages.errors import InvalidInput, StageFailed
from stages.lock import RUN, USE, exclusive, shared


def to_folder(publication: Publication, target: Path) -> bool:
    """Let the publication appear at ``target``; an earlier one of the same pipeline is replaced.

    It is whole or absent: written beside its place, flushed, renamed. Where an earlier one is replaced, for the moment
    between two renames neither is there; a process that dies in that moment leaves the old one beside, and the next
    `trivium publish` puts it back first.

    Returns:
        Whether anything had to be written.

    Raises:
        InvalidInput: something else is there, or files were changed that a person may want to keep.
        StageFailed: the release is not what it was a moment ago.
        TryAgain: another process publishes there.
    """
    target = Path(os.path.realpath(target))
    _check_place(target, publication.plan.store.parent)
    with _told(target), _alone(publication, target):
        make_folder(target.parent)
        previous = target.with_name(f".{target.name}.previous")
        _recover(previous, target, publication.name)
        if target.exists() and _is_current(publication, _earlier(target, publication.name)):
            return False
        fresh = target.with_name(f".{target.name}.trivium-new")
        shutil.rmtree(fresh, ignore_errors=True)  # of a process that died: the lock is ours
        try:
            _write(publication, fresh)
            if target.exists():
                target.rename(previous)
            fresh.rename(target)
            sync(target.parent)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
        _remove(previous)
    return True


def check_folder(publication: Publication, target: Path) -> None:
    """Look, without writing anything, whether the publication may appear at ``target``.

    Raises:
        InvalidInput: something else is there, or files were changed that a person may want to keep.
    """
    target = Path(os.path.realpath(target))
    _check_place(target, publication.plan.store.parent)
    if target.exists():
        _earlier(target, publication.name)


@contextmanager
def _told(target: Path) -> Iterator[None]:
    """What the disk says, with the place that was to be written: a library names what it was reading."""
    try:
        yield
    except OSError as error:
        raise StageFailed(
            f"{target}: cannot be written ({error.strerror}); nothing was published. Free space or rights there, or "
            "name another place"
        ) from error


@contextmanager
def _alone(publication: Publication, target: Path) -> Iterator[None]:
    """Nobody else publishes to ``target``, and the release is neither moved nor cleared away meanwhile."""
    store, last = publication.plan.store, publication.plan.steps[-1]
    own = lock_file(store, fingerprint(str(target))[:16], RUN)
    with exclusive(own, str(target)), shared(lock_file(store, last.work.name, USE), last.place.name):
        yield
        own.unlink(missing_ok=True)


def _check_place(target: Path, root: Path) -> None:
    if target.is_relative_to(root) or root.is_relative_to(target):
        raise InvalidInput(f"{target}: among the artifacts ({root}); name a folder outside of it")
    if (file := next((one for one in (target, *target.parents) if os.path.lexists(one)), target)).is_file():
        raise InvalidInput(f"{file}: a file, and a publication needs a folder; name another place")


def _recover(previous: Path, target: Path, name: str) -> None:
    """Put right what a process left that died between two renames."""
    if previous.is_dir() and not target.exists():
        _earlier(previous, name)
        previous.rename(target)
        sync(target.parent)
    elif previous.is_dir():
        _earlier(previous, name)  # else it is somebody's
        _remove(previous)


def _remove(publication: Path) -> None:
    """Remove an earlier publication, its list last: what a crash leaves is still known to be ours."""
    for file in files_below(publication) if publication.is_dir() else ():
        if file != publication / MANIFEST:
            file.unlink()
    shutil.rmtree(publication, ignore_errors=True)


def _earlier(folder: Path, name: str) -> Published | None:
    """The earlier publication of the pipeline in a folder; None where the folder is empty.

    Raises:
        InvalidInput: there is something else, or something that was changed since.
    """
    present = {str(file.relative_to(folder)): file for file in _files_in(folder)}
    if not present:
        return None
    try:
        known = Published.model_validate(read_sealed(folder / MANIFEST), strict=True)
    except (InvalidInput, ValidationError) as error:
        raise InvalidInput(
            f"{folder}: is there and holds no earlier publication ({MANIFEST} that is whole); name a new folder"
        ) from error
    if known.pipeline != name:
        raise InvalidInput(f"{folder}: holds a publication of pipeline {known.pipeline!r}; name another folder")
    own = {MANIFEST, *known.files}
    foreign = [one for one in present if one not in own]
    changed = [one for one in known.files if one in present and sha256(present[one]) != known.files[one]]
    if foreign or changed:
        listed = ", ".join(printable_line(one) for one in [*foreign, *changed][:5])
        raise InvalidInput(
            f"{folder}: {listed}: added or changed since it was published, and replacing it would lose that; move "
            "what you want to keep elsewhere, or name another folder"
        )
    return known


def _files_in(folder: Path) -> list[Path]:
    try:
        return files_below(folder)
    except StageFailed as error:
        raise InvalidInput(f"{error}, or name another folder") from error
    except NotADirectoryError as error:
        raise InvalidInput(f"{folder}: not a folder; name another place") from error


def _is_current(publication: Publication, earlier: Published | None) -> bool:
    return earlier is not None and earlier.files == published(publication).files


def _write(publication: Publication, folder: Path) -> None:
    folder.mkdir()
    for name, source in publication.files.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
        if sha256(target) != publication.hashes[name]:  # what was copied counts, not what was verified before
            raise StageFailed(f"{source}: changed while it was copied; nothing is published (see `trivium verify`)")
        sync(target)
    for name, text in publication.texts.items():
        write_text(folder / name, text)
    write_sealed(folder / MANIFEST, published(publication).model_dump())
    for below in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
        sync(below)
