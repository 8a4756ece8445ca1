"""Words as they are compared, and rows that are there twice or nearly."""

import json
import random

import pytest
from row_reading import words

from stages.duplicates import THRESHOLD, duplicates
from stages.words import words_of

# Words


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"text": "The CAT, sat_on: a mat!"}, ["the", "cat", "sat", "on", "a", "mat"]),
        ({"text": "Ünïcode ﬁne Ⅳ"}, ["ünïcode", "fine", "iv"]),
        ({"text": "猫が好き cat"}, ["猫", "が", "好", "き", "cat"]),
        ({"text": "한국어 문장"}, ["한국어", "문장"]),
        ({"messages": [{"role": "assistant", "content": "Hi there"}], "n": 3}, ["hi", "there"]),
        ({"text": "?! …"}, []),
        (json.loads('{"a":' * 900 + '["deep", {"b": "down"}]' + "}" * 900), ["deep", "down"]),
    ],
)
def test_words_are_what_is_left_without_case_and_punctuation(row, expected):
    assert words_of(row) == expected


# Duplicates


def test_the_same_row_is_found_as_the_first_one_with_it():
    rows = [{"text": words(n)} for n in (1, 2, 1, 3, 2, 1)]
    found = duplicates(rows)
    assert [(one.row, one.of, one.exact) for one in found.found] == [(2, 0, True), (4, 1, True), (5, 0, True)]
    assert found.searched == 6


def test_rows_that_differ_in_case_and_punctuation_are_near_and_not_exact():
    (one,) = duplicates([{"text": "A cat sat there."}, {"text": "a cat, sat THERE"}, {"text": "a dog"}]).found
    assert (one.row, one.of, one.similarity, one.exact) == (1, 0, 1.0, False)


def similarity(left: str, right: str) -> float:
    one, other = ({tuple(words[n : n + 5]) for n in range(len(words) - 4)} for words in (left.split(), right.split()))
    return len(one & other) / len(one | other)


def test_rows_of_signs_alone_are_the_same_or_not_alike():
    rows = [{"text": one} for one in ("...", "!!", "?", "!!")]
    assert [(one.row, one.of, one.exact) for one in duplicates(rows).found] == [(3, 1, True)]


def test_near_duplicates_are_those_of_a_jaccard_similarity_above_the_threshold():
    rows, wanted, apart = [], set(), set()
    for seed in range(120):
        original = words(seed, 200)
        changed = original.split()
        for place in random.Random(seed).sample(range(200), seed % 12):
            changed[place] = "changed"
        rows += [{"text": original}, {"text": " ".join(changed)}]
        alike = similarity(original, " ".join(changed))
        if alike >= THRESHOLD + 0.08:
            wanted.add(2 * seed + 1)
        elif alike < THRESHOLD - 0.12:
            apart.add(2 * seed + 1)
    found = {one.row for one in duplicates(rows).found}
    assert min(len(wanted), len(apart)) >= 30
    assert wanted <= found
    assert not found & apart
    assert found <= {2 * seed + 1 for seed in range(120)}


def test_beyond_a_bound_an_even_selection_is_searched_for_near_ones_and_all_for_exact_ones(monkeypatch):
    monkeypatch.setattr("stages.duplicates.MOST_ROWS", 10)
    found = duplicates([{"text": words(n % 15)} for n in range(30)])
    assert [one.of for one in found.found] == list(range(15))
    assert found.searched == 5 + 15
