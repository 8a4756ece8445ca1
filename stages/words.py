"""The words of a text, as duplicates and overlap compare them: case, punctuation and spacing make no difference."""

import re
import unicodedata
from collections.abc import Iterator
from typing import Any

# Chinese and Japanese write no spaces: a sign counts as a word. So do the scripts of South-East Asia, which have
# none either; there a run between spaces is one word, and what is compared is coarser.
_SIGNS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(f"[{_SIGNS}]|[^\\W_{_SIGNS}]+")


def words_of(row: Any) -> list[str]:
    """The words of all texts in a row, in order; roles are none, and neither are numbers that are no text."""
    found: list[str] = []
    for text in _texts(row):
        folded = text if text.isascii() else unicodedata.normalize("NFKC", text)
        found += _WORD.findall(folded.lower())
    return found


def _texts(row: Any) -> Iterator[str]:
    ahead = [row]
    while ahead:  # a row of strangers may be nested more deeply than calls can be
        value = ahead.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            ahead += reversed([inner for key, inner in value.items() if key != "role"])
        elif isinstance(value, (list, tuple)):
            ahead += reversed(value)
