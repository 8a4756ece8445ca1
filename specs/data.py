"""Where rows come from."""

from typing import Annotated

from pydantic import Field, model_validator

from specs.base import Spec, name_only
from specs.model import Commit, FilePath, HubId

FORMATS = (".jsonl", ".txt", ".parquet", ".csv")
"""File endings that can be read; the ending decides the format."""


class DataSpec(Spec):
    """One source of rows: a file, or the files of a hub dataset at one commit."""

    path: FilePath | None = name_only(None)
    """A file, or a glob of files, relative to the spec: .jsonl, .txt (a document per file), .parquet, .csv."""
    hub: HubId | None = None
    """Id of a dataset on the Hugging Face hub, together with `revision` and `files`."""
    revision: Commit | None = None
    """The commit of the hub dataset, 40 hex digits."""
    files: str | None = None
    """Which files of the hub dataset, as a glob: `data/train-*.parquet`."""
    columns: dict[str, str] = {}
    """Our column name -> the name it has in the source, where they differ: `{text: body}`."""
    weight: Annotated[float, Field(gt=0, le=100)] = 1.0
    """How often a row is used per epoch: 0.1 takes a seeded tenth of the rows, 2 takes each one twice."""

    @model_validator(mode="after")
    def _one_source(self) -> "DataSpec":
        if (self.path is None) == (self.hub is None):
            raise ValueError("a source is either path or hub")
        if self.hub is not None and (self.revision is None or self.files is None):
            raise ValueError("a hub source needs its revision (the commit, 40 hex digits) and files (a glob)")
        if self.path is not None and (self.revision is not None or self.files is not None):
            raise ValueError("revision and files go with hub, not with path")
        if self.path is not None and not self.path.endswith(FORMATS):
            raise ValueError(f"cannot tell the format of {self.path!r}; allowed endings: {', '.join(FORMATS)}")
        return self

    @property
    def label(self) -> str:
        """How the source is called in messages and reports."""
        return self.path if self.path is not None else f"{self.hub}@{(self.revision or '')[:8]}/{self.files}"
