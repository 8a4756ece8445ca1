"""What a name, a path or another short text of a spec may look like, and how a message says so."""

from typing import Annotated

from pydantic import StringConstraints

_SLUG = r"^[a-z0-9][a-z0-9_-]{0,62}$"
_HUB_ID = r"^\w[\w.-]*/\w[\w.-]*$"
_COMMIT = r"^[0-9a-f]{40}$"
_SHA256 = r"^[0-9a-f]{64}$"
_METRIC = r"^[a-z0-9][a-z0-9_-]*(\.[a-z0-9_]+)?$"
_PERCENT = r"^\d{1,4}(\.\d{1,6})?\s?%$"

Slug = Annotated[str, StringConstraints(pattern=_SLUG)]
"""A name that is safe as a folder name and as a Prefect key."""
HubId = Annotated[str, StringConstraints(pattern=_HUB_ID)]
Commit = Annotated[str, StringConstraints(pattern=_COMMIT)]
Sha256 = Annotated[str, StringConstraints(pattern=_SHA256)]
MetricName = Annotated[str, StringConstraints(pattern=_METRIC)]
Percent = Annotated[str, StringConstraints(pattern=_PERCENT)]
FilePath = Annotated[str, StringConstraints(min_length=1, max_length=4096)]

IN_WORDS = {
    _SLUG: "a name of 1 to 63 characters, a-z, 0-9, - and _, that starts with a letter or digit",
    _HUB_ID: "an id on the hub, owner/name",
    _COMMIT: "a commit, 40 hex digits (a branch or tag may mean something else tomorrow)",
    _SHA256: "a sha256, 64 hex digits",
    _METRIC: "the name of a metric, or name.measure",
    _PERCENT: "a percentage such as 5%",
}
"""A pattern of these types -> what it asks for, in words."""
