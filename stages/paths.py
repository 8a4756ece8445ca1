"""Where the paths of a spec lead and what is there, without opening it: a pipe would wait for its writer."""

import os
import stat
from collections.abc import Iterable
from pathlib import Path

_KINDS = {
    stat.S_IFDIR: "a folder; name the file in it",
    stat.S_IFIFO: "a pipe; write what comes out of it to a file",
    stat.S_IFSOCK: "a socket; write what comes out of it to a file",
    stat.S_IFCHR: "a device; write what comes out of it to a file",
    stat.S_IFBLK: "a device; write what is on it to a file",
}


def irregular(path: Path) -> str | None:
    """Why a path is no file that can be read, with the path in front; None where it is one."""
    try:
        kind = stat.S_IFMT(path.stat().st_mode)
    except FileNotFoundError:
        return f"{path}: no such file"
    except (OSError, ValueError) as error:
        name = str(path) if len(str(path)) <= 200 else path.name[:60]
        return f"{name}: cannot be a file: {getattr(error, 'strerror', None) or error}"
    if kind != stat.S_IFREG:
        return f"{path}: not a regular file, but {_KINDS.get(kind, 'something else')}"
    if not os.access(path, os.R_OK):
        return f"{path}: cannot be read: Permission denied; let the user who runs trivium read it"
    return None


def astray(name: str, found: Iterable[Path], folder: Path) -> str | None:
    """Why files that a spec led to may not be read, `..` and links being followed; None where they may.

    Args:
        name: the path as it is written; an absolute one may lead anywhere.
        found: what it led to: the file or folder itself, what a pattern matched, what a file names in turn.
        folder: the spec's.
    """
    if Path(name).is_absolute():
        return None
    home = Path(os.path.realpath(folder))
    for path in found:
        target = Path(os.path.realpath(path))
        if not target.is_relative_to(home):
            return (
                f"{name} leads to {target}, and a relative path stays in the spec's folder ({home}); if that place is "
                "meant, write the absolute path"
            )
    return None
