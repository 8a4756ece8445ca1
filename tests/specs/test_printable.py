import pytest

from specs.load import Problem
from specs.printable import printable, printable_line
from stages.errors import InvalidInput

HOSTILE = {
    "\x1b[2J": r"\x1b[2J",
    "\x1b]0;title\x07": r"\x1b]0;title\x07",
    "over\rwritten": r"over\rwritten",
    "\x9b2J": r"\x9b2J",
    "\u202etxt.exe": r"\u202etxt.exe",
    "a\0b": r"a\x00b",
}


@pytest.mark.parametrize("text", HOSTILE)
def test_nothing_that_moves_a_cursor_or_turns_text_around_is_printed(text: str) -> None:
    assert printable(text) == printable_line(text) == HOSTILE[text]
    assert str(InvalidInput(text)) == HOSTILE[text]


def test_words_of_all_languages_stay_and_lines_of_a_message_too() -> None:
    text = "Größe 🚀 日本\n\tline two \\x1b"
    assert printable(text) == text
    assert printable_line(text) == "Größe 🚀 日本\\n\\tline two \\x1b"


def test_a_problem_is_one_line_whatever_it_quotes() -> None:
    problem = Problem("a\nb.yaml", 1, 2, "model", "found x\nb.yaml: valid")
    assert str(problem) == "a\\nb.yaml:1:2: model: found x\\nb.yaml: valid"
