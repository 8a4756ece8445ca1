"""Where rows come from."""

from decimal import Decimal
from typing import Annotated, Literal

from pydantic import Field, model_validator

from specs.base import Spec, later_addition, name_only
from specs.paths import Commit, FilePath, HubId, Percent

FORMATS = (".jsonl", ".txt", ".parquet", ".csv")
"""File endings that can be read; the ending decides the format."""


def share(percent: str) -> Decimal:
    """A percentage as a share of one, without rounding: `5%` is 0.05."""
    return Decimal(percent.rstrip("% ")) / 100


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
    on_bad_row: Literal["fail", "drop"] = later_addition("fail")
    """fail refuses a source with any row that cannot be used, before anything trains; drop leaves such rows out, up to
    `max_bad_rows`, and records how many and the first of them by file and line."""
    max_bad_rows: Annotated[int, Field(gt=0)] | Percent = name_only("1%")
    """With `on_bad_row: drop`: the most rows of this source that may be left out, as a number or as a share; beyond it
    the source is refused, for then the format is misunderstood rather than a row broken."""

    @model_validator(mode="after")
    def _one_source(self) -> "DataSpec":
        if (self.path is None) == (self.hub is None):
            raise ValueError("a source is either path or hub")
        if self.hub is not None and (self.revision is None or self.files is None):
            raise ValueError("a hub source needs its revision (the commit, 40 hex digits) and files (a glob)")
        if self.files is not None and (self.files.startswith("/") or ".." in self.files.split("/")):
            raise ValueError(
                f"files {self.files[:60]!r} leads out of the dataset; write a glob within it, data/*.parquet"
            )
        if self.path is not None and (self.revision is not None or self.files is not None):
            raise ValueError("revision and files go with hub, not with path")
        if self.path is not None and not self.path.endswith(FORMATS):
            raise ValueError(f"cannot tell the format of {self.path!r}; allowed endings: {', '.join(FORMATS)}")
        if self.on_bad_row == "fail" and "max_bad_rows" in self.model_fields_set:
            raise ValueError("max_bad_rows goes with on_bad_row: drop; add that, or remove max_bad_rows")
        if isinstance(self.max_bad_rows, str) and share(self.max_bad_rows) > 1:
            raise ValueError(f"max_bad_rows {self.max_bad_rows} is more than all rows; 100% are the most")
        return self

    def droppable(self, rows: int) -> int:
        """How many of ``rows`` rows, good and bad ones together, may be left out; a share is rounded down."""
        if self.on_bad_row == "fail":
            return 0
        return int(share(self.max_bad_rows) * rows) if isinstance(self.max_bad_rows, str) else self.max_bad_rows

    @property
    def label(self) -> str:
        """How the source is called in messages and reports."""
        return self.path if self.path is not None else f"{self.hub}@{(self.revision or '')[:8]}/{self.files}"
