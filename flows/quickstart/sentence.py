"""Turn docstrings into plain prose: no reST marks, no signature line, one whole first sentence."""

import re

_SIGNATURE_LINE = re.compile(r"^[\w.]+\([^\n]*\)(\s*(->|→|=)\s*[^\n]{1,60})?:?\s*$")
_ROLE = re.compile(r":[a-z:]+:`~?\.?([^`<]+)(?: <[^`>]+>)?`")
_CODE = re.compile(r"``([^`]+)``")
_QUOTED_NAME = re.compile(r"`([A-Za-z_][\w.]*(?:\(\))?)'")
_EMPHASIS = re.compile(r"(?<![\w*])\*([A-Za-z_]\w*)\*(?![\w*])")
_END = re.compile(r"(?<=[.!?])[\"')]?\s+(?=[\"'`]?[A-Z]|\()")
_ABBREVIATION = re.compile(r"(?:\b(?:e\.g|i\.e|etc|vs|cf|incl|approx|resp)|\b[A-Z])\.$")
_NOISE = re.compile(
    r"::|>>>|\.\.\. |See help\(type|Initialize self|->|\{\}|^\W|__\w+__|^Internal|^Deprecated|^DEPRECATED|"
    r"\bTODO\b|\bself\.|\bthis (?:method|function|module) is deprecated\b|[\[\]{}|<>\\]",
    re.IGNORECASE,
)
_SHORTEST, _LONGEST = 18, 160


def without_signature(doc: str) -> str:
    """Drop the signature lines that built-in callables write at the top of their docstrings."""
    lines = doc.strip().splitlines()
    while lines and (not lines[0].strip() or _SIGNATURE_LINE.match(lines[0].strip())):
        lines.pop(0)
    return "\n".join(lines).strip()


def plain(text: str) -> str:
    """Write reST roles, literals and emphasis as a reader would type them in an answer."""
    text = _ROLE.sub(r"\1", text)
    text = _CODE.sub(r"\1", text)
    text = _QUOTED_NAME.sub(r"\1", text)
    text = _EMPHASIS.sub(r"\1", text)
    return " ".join(text.replace("“", '"').replace("”", '"').replace("’", "'").split())


def first_sentence(doc: str) -> str:
    """Return the first sentence of a docstring, or an empty string where none can stand alone."""
    paragraph = re.split(r"\n\s*\n", without_signature(doc), maxsplit=1)[0]
    if re.search(r"^\s+\S", paragraph, re.MULTILINE) or re.search(r"^\s*[-*] ", paragraph, re.MULTILINE):
        return ""  # an indented block or a list inside the paragraph: its first line is not a sentence
    sentence = _until_full_stop(plain(paragraph))
    if not _SHORTEST <= len(sentence) <= _LONGEST or _NOISE.search(sentence):
        return ""
    if sentence[-1] in ":;," or len(sentence.split()) < 3 or not _balanced(sentence):
        return ""
    return sentence[0].upper() + sentence[1:].rstrip(".") + ("" if sentence[-1] in "!?" else ".")


def _until_full_stop(text: str) -> str:
    start = 0
    while match := _END.search(text, start):
        head = text[: match.end()].rstrip()
        if not _ABBREVIATION.search(head.rstrip("\"')")):
            return head
        start = match.end()
    return text


def _balanced(sentence: str) -> bool:
    even_marks = all(sentence.count(mark) % 2 == 0 for mark in '"`')
    return even_marks and sentence.count("(") == sentence.count(")")
