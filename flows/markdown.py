"""Text of others inside Markdown: data, models and specs may say anything, and a page must stay what it is."""

import html
import re
from collections.abc import Iterable, Sequence

from specs.printable import printable, printable_line

PLACE = "[a place on this machine]"
"""What stands in a published text for the folders above a file."""
_PUNCTUATION = re.compile(r"[!-/:-@\[-`{-~]")
_SPECIAL = re.compile(r"([\\`*_{}\[\]()#+!|~$^=:@-])")
_HOME_OR_ROOT = re.compile(r"(?<![\w./:~$}\])-])(?:~[\w.-]*|[A-Za-z]:\\|)(?:/[^\s/'\"`,;:)\]}>#]+)+/?")


def prose(text: object) -> str:
    """A text as plain words on one line, in a paragraph or in the cell of a table: no link, no HTML, no emphasis."""
    return _SPECIAL.sub(r"\\\1", html.escape(printable_line(str(text)), quote=False))


def escaped(text: str) -> str:
    """A text as one line that shows it as it is, in Prefect, which renders HTML: every sign of markup is escaped."""
    return _PUNCTUATION.sub(r"\\\g<0>", printable_line(text))


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are markdown already."""
    return "\n".join("| " + " | ".join(line) + " |" for line in (columns, ["---"] * len(columns), *rows))


def code(text: object) -> str:
    """A text as code on one line, in a paragraph or in the cell of a table."""
    line = printable_line(str(text))
    quotes = "`" * (1 + _longest_run(line))
    edge = " " if line[:1] in ("`", " ", "") or line[-1:] in ("`", " ") else ""
    return f"{quotes}{edge}{line.replace('|', chr(92) + '|')}{edge}{quotes}"


def fence(text: object, language: str = "") -> str:
    """A text as a block of code, its lines as they are."""
    block = printable(str(text)).rstrip("\n")
    quotes = "`" * max(3, 1 + _longest_run(block))
    return f"{quotes}{language}\n{block}\n{quotes}"


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)


def without_places(text: str, known: Iterable[str] = ()) -> str:
    """A text without the folders of this machine: of an absolute path only the last name stays.

    Args:
        text: what is published.
        known: absolute paths that it names, with blanks in them or not.
    """
    for place in sorted(known, key=len, reverse=True):
        text = text.replace(place, _last_name(place))
    return _HOME_OR_ROOT.sub(lambda found: _last_name(found[0]), text)


def _last_name(place: str) -> str:
    name = re.split(r"[/\\]", place.rstrip("/\\"))[-1]
    return f"{PLACE}/{name}"
