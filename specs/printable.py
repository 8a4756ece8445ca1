"""Text of others as a terminal may have it: names and values come from specs, data and models of strangers."""

import re

# Escape sequences would clear a screen or write over what was said; marks of direction turn text around.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """Return a text whose control characters are spelt out, such as x1b with a backslash; line breaks and tabs stay."""
    return _CONTROL.sub(lambda found: _spelt(found[0]), text)


def printable_line(text: str) -> str:
    """Return a text as one line, its line breaks and tabs spelt out too."""
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")


def _spelt(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
