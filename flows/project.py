"""Where a project keeps its spec and its artifacts, and how commands name them."""

import os
import shlex
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from stages.errors import InvalidInput

DEFAULT_SPEC = "spec.yaml"
"""The spec of a project folder."""
ARTIFACTS = "artifacts"
"""The folder of the artifacts, beside the spec."""
SpecFile = Annotated[Path, Parameter(help="The spec file.")]
Root = Annotated[Path | None, Parameter(help="Folder of the artifacts; `artifacts` beside the spec by default.")]
Place = Annotated[Path, Parameter(help="The folder of the artifacts, a project folder, or a spec.")]


def root_of(spec: Path, root: Path | None) -> Path:
    """Where the artifacts of a spec are, or will be.

    Raises:
        InvalidInput: there is a file, so no folder can be.
    """
    # Not resolve(): it raises for a link that leads to itself, and the spec's own reader says so better.
    place = Path(os.path.realpath(spec.parent / ARTIFACTS if root is None else root))
    if (file := next((one for one in (place, *place.parents) if os.path.lexists(one)), place)).is_file():
        how = "as --root" if root is not None else "as --root, or move the file"
        raise InvalidInput(f"{file}: a file, and the artifacts need a folder; name another place {how}")
    return place


def command(name: str, spec: Path, root: Path, *options: str) -> str:
    """A command on a spec, as a shell takes it; artifacts that are elsewhere than beside the spec are named in it."""
    elsewhere = os.path.realpath(spec.parent / ARTIFACTS) != os.path.realpath(root)
    return shlex.join(["trivium", name, str(spec), *(["--root", str(root)] if elsewhere else []), *options])
