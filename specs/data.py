"""Where rows come from."""

from decimal import Decimal
from typing import Annotated, Literal

from pydantic import Field, model_validator

from specs.base import Spec, later_addition, name_only
from specs.paths import Commit, FilePath, HubId, Percent

FORMATS = (".jsonl", ".txt", ".parquet", ".csv")
"""File endings that can be read; the ending decides the format."""


Most = Annotated[int, Field(ge=0)] | Percent
"""The most rows that something may be true of: a number, or a share of them."""
MOST_OFTEN = 100
"""How often a row may be used per epoch."""


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
    weight: Annotated[float, Field(gt=0, le=MOST_OFTEN)] = 1.0
    """How often a row is used per epoch: 0.1 takes a seeded tenth of the rows, 2 takes each one twice."""
    share: Annotated[float, Field(gt=0, lt=1)] | None = later_addition(None)
    """In place of `weight`: the share of the stage's tokens that comes from this source, however large it is; 0.1 for a
    tenth of replay. The sources without a share make up the rest. Rows are drawn without replacement, and used again
    only once all of them were."""
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
        if self.share is not None and "weight" in self.model_fields_set:
            raise ValueError("share and weight exclude one another: share says how much of the stage, weight how often")
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


class DataLimits(Spec):
    """What the data report may find before the stage is refused: a number of rows, or a share of them such as 5%."""

    duplicates: Most | None = None
    """Rows that are, or nearly are, an earlier row of the stage."""
    overlap: Most | None = None
    """Examples of any one metric's evaluation set that share a run of words with the stage's rows."""
    truncated: Most | None = None
    """Rows longer than `train.sequence_length`, whose end is lost."""
    dropped: Most | None = None
    """Rows of which nothing to learn is left within `train.sequence_length`."""

    @model_validator(mode="after")
    def _shares(self) -> "DataLimits":
        for name in type(self).model_fields:
            limit = getattr(self, name)
            if isinstance(limit, str) and share(limit) > 1:
                raise ValueError(f"{name} {limit} is more than all rows; 100% are the most")
        return self


def exceeds(found: int, limit: int | str, of: int) -> bool:
    """Whether ``found`` of ``of`` rows are more than a limit of `DataLimits` lets be."""
    return found > (limit if isinstance(limit, int) else share(limit) * of)
