"""What a name, a path or another short text of a spec may look like, and how a message says so."""

import re
from typing import Annotated

from pydantic import AfterValidator, StringConstraints

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


def _on_this_machine(path: str) -> str:
    """Refuse what looks like a path and would be taken for the name of a file beside the spec."""
    if path.startswith("~"):
        raise ValueError(f"{path[:60]!r}: ~ is not expanded in a spec; write the absolute path")
    if _URL.match(path):
        raise ValueError(
            f"{path[:60]!r} is a URL, and a path names a file on this machine: download it, or name what is on the "
            "Hugging Face hub by hub and revision"
        )
    return path


_SLUG = r"^[a-z0-9][a-z0-9_-]{0,62}$"
_HUB_ID = r"^\w[\w.-]*/\w[\w.-]*$"
_COMMIT = r"^[0-9a-f]{40}$"
_SHA256 = r"^[0-9a-f]{64}$"
_LICENSE = r"^[a-z0-9][a-z0-9.+-]{0,63}$"
_METRIC = r"^[a-z0-9][a-z0-9_-]*(\.[a-z0-9_]+)?$"
_PERCENT = r"^\d{1,4}(\.\d{1,6})?\s?%$"

Slug = Annotated[str, StringConstraints(pattern=_SLUG)]
"""A name that is safe as a folder name and as a Prefect key."""
HubId = Annotated[str, StringConstraints(pattern=_HUB_ID)]
Commit = Annotated[str, StringConstraints(pattern=_COMMIT)]
Sha256 = Annotated[str, StringConstraints(pattern=_SHA256)]
License = Annotated[str, StringConstraints(pattern=_LICENSE)]
"""A licence as the hub spells it: https://huggingface.co/docs/hub/repositories-licenses."""
MetricName = Annotated[str, StringConstraints(pattern=_METRIC)]
Percent = Annotated[str, StringConstraints(pattern=_PERCENT)]
FilePath = Annotated[str, StringConstraints(min_length=1, max_length=4096), AfterValidator(_on_this_machine)]
"""A file or folder of this machine. A relative one starts at the spec's folder and, once `..` and links are followed,
stays in it: a spec that came from somebody else reads nothing of yours unless you can see an absolute path in it."""

IN_WORDS = {
    _SLUG: "a name of 1 to 63 characters, a-z, 0-9, - and _, that starts with a letter or digit",
    _HUB_ID: "an id on the hub, owner/name",
    _COMMIT: "a commit, 40 hex digits (a branch or tag may mean something else tomorrow)",
    _SHA256: "a sha256, 64 hex digits",
    _LICENSE: "a licence as the Hugging Face hub spells it, apache-2.0 or llama3.1; `other` where it knows none",
    _METRIC: "the name of a metric, or name.measure",
    _PERCENT: "a percentage such as 5%",
}
"""A pattern of these types -> what it asks for, in words."""
