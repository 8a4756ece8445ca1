"""What a secret looks like: a spec may hold none, and a log shows none. Pure text; the environment is handed in."""

import json
import re
from collections.abc import Mapping
from urllib.parse import quote

REDACTED = "[redacted]"
"""What stands in a message or a log where a secret was."""
SECRET_NAMES = ("_TOKEN", "_KEY", "_SECRET", "_PASSWORD", "_AUTH_STRING")
"""Endings of the names of environment variables whose values are secrets."""
SHORTEST = 8
"""Characters that a value of such a variable has at least: shorter ones would blot out ordinary words."""

# Nothing of a word may stand in front; lengths are bounded, so that no text makes the search slow.
_START = r"(?<![A-Za-z0-9])"
_KEY_LINE = r"[A-Z ]{0,20}PRIVATE KEY-----"

TOKEN_SHAPES: dict[str, re.Pattern[str]] = {
    noun: re.compile(pattern)
    for noun, pattern in {
        "a Hugging Face token": _START + r"(?:hf_|api_org_)[A-Za-z0-9]{20,}",
        # A long run with a digit tells a key from a name with hyphens: sk-wikipedia-2024-filtered is Slovak text.
        "an API key (sk-...)": _START
        + r"sk-(?=[A-Za-z0-9_-]{0,99}?(?=[A-Za-z]{0,15}[0-9])[A-Za-z0-9]{16})[A-Za-z0-9_-]{20,}",
        "an AWS access key": _START + r"A[KS]IA[A-Z0-9]{16}(?![A-Za-z0-9])",
        "a GitHub token": _START + r"(?:gh[pousr]_[A-Za-z0-9]{30,}|github_pat_[A-Za-z0-9_]{22,})",
        "a GitLab token": _START + r"glpat-[A-Za-z0-9_-]{20,}",
        "a Google API key": _START + r"AIza[A-Za-z0-9_-]{35}",
        "a Slack token": _START + r"xox[abeprs]-[A-Za-z0-9-]{10,}",
        "a Prefect API key": _START + r"pn[ub]_[A-Za-z0-9]{30,}",
        "a signed token (JWT)": _START + r"eyJ[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}",
        "an authorization header": r"\b[Bb]earer\s+[A-Za-z0-9._~+/=-]{20,}",
        "a private key": rf"-----BEGIN {_KEY_LINE}(?:[\s\S]{{0,10000}}?-----END {_KEY_LINE})?",
        "a URL with a password": _START + r"[A-Za-z][A-Za-z0-9+.-]{0,30}://[^\s/:@]{0,256}:[^\s/]{1,256}@",
    }.items()
}
"""What a secret is called -> its shape. A hash, a commit, a path or the id of a model has none of them."""


def looks_like_secret(text: str) -> str | None:
    """What a text holds that should be nobody else's, in words (`a GitHub token`); None where it holds nothing."""
    return next((noun for noun, shape in TOKEN_SHAPES.items() if shape.search(text)), None)


def redact(text: str, environment: Mapping[str, str]) -> str:
    """Return ``text`` without what looks like a secret and without the secrets of an environment.

    Args:
        text: a message, a line of a log.
        environment: names and values of environment variables, such as `os.environ`. The values of those whose
            names end as `SECRET_NAMES` are replaced wherever they stand, also as JSON or a URL would write them.
    """
    for value in _secrets(environment):
        text = text.replace(value, REDACTED)
    for shape in TOKEN_SHAPES.values():
        text = shape.sub(REDACTED, text)
    return text


def _secrets(environment: Mapping[str, str]) -> list[str]:
    """The secret values in each of their spellings, the longest first: one may be a part of another."""
    # A log may show a value of several lines (a key file) line by line.
    values = {
        part.strip()
        for name, value in environment.items()
        if name.upper().endswith(SECRET_NAMES)
        for part in (value, *value.splitlines())
        if len(part.strip()) >= SHORTEST
    }
    spellings = {form for value in values for form in (value, json.dumps(value)[1:-1], quote(value, safe=""))}
    return sorted(spellings, key=len, reverse=True)
