"""Shares: how much of a stage comes from a source, whatever the sizes. Weights are tested in `test_data`."""

from collections import Counter
from itertools import pairwise

import pytest
from row_reading import source
from tiny import write_rows

from stages.errors import InvalidInput
from stages.mixing import Mixture, mixed
from stages.rows import Row, text_row


def sizes(rows: list[Row]) -> list[int]:
    """Of rows of words, their number."""
    return [len(row["text"].split()) for row in rows]


def mix(folder, shares: dict[str, float | None], seed: int = 1) -> Mixture:
    sources = [source(path, **({} if share is None else {"share": share})) for path, share in shares.items()]
    return mixed(sources, folder, text_row, seed, sizes)


def tokens(mixture: Mixture, number: int) -> int:
    return sum(sizes([row for row, one in zip(mixture.rows, mixture.origins, strict=True) if one.source == number]))


def refusal(folder, shares: dict[str, float | None]) -> str:
    with pytest.raises(InvalidInput) as caught:
        mix(folder, shares)
    return str(caught.value)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A domain of 900 tokens, and general text in rows of 2 to 12 tokens, 700 in all."""
    folder = tmp_path_factory.mktemp("shares")
    write_rows(folder / "domain.jsonl", [{"text": " ".join(["d"] * 30)} for _ in range(30)])
    write_rows(folder / "general.jsonl", [{"text": " ".join([f"g{n}"] * (2 + n % 11))} for n in range(100)])
    write_rows(folder / "other.jsonl", [{"text": f"o{n}"} for n in range(1000)])
    return folder


@pytest.mark.parametrize("share", [0.01, 0.1, 0.25, 0.43, 0.5, 0.9])
def test_a_share_is_of_the_stages_tokens_to_within_half_a_row(folder, share):
    mixture = mix(folder, {"domain.jsonl": None, "general.jsonl": share})
    assert tokens(mixture, 0) == 900
    wanted = share * 900 / (1 - share)
    assert abs(tokens(mixture, 1) - wanted) <= 6


def test_several_shares_hold_at_once_and_weights_divide_the_rest(folder):
    sources = [source("domain.jsonl", weight=2), source("general.jsonl", share=0.2), source("other.jsonl", share=0.1)]
    mixture = mixed(sources, folder, text_row, 1, sizes)
    total = sum(tokens(mixture, number) for number in range(3))
    assert tokens(mixture, 0) == 1800
    assert tokens(mixture, 1) / total == pytest.approx(0.2, abs=0.003)
    assert tokens(mixture, 2) / total == pytest.approx(0.1, abs=0.001)


def test_rows_are_drawn_without_replacement_and_again_only_once_all_were(folder):
    once = Counter(origin for origin in mix(folder, {"domain.jsonl": None, "general.jsonl": 0.3}).origins)
    assert set(once.values()) == {1}
    often = Counter(
        origin.number
        for origin in mix(folder, {"domain.jsonl": None, "general.jsonl": 0.65}).origins
        if origin.source == 1
    )
    assert len(often) == 100
    assert set(often.values()) == {2, 3}


def test_the_rows_of_a_share_follow_from_the_seed(folder):
    shares = {"domain.jsonl": None, "general.jsonl": 0.1}
    first = mix(folder, shares)
    assert mix(folder, shares) == first
    assert set(mix(folder, shares, 2).origins) != set(first.origins)
    order = [origin.number for origin in first.origins if origin.source == 1]
    assert any(after < before for before, after in pairwise(order))


def test_a_larger_share_takes_the_rows_of_a_smaller_one_and_more(folder):
    small, large = (set(mix(folder, {"domain.jsonl": None, "general.jsonl": share}).origins) for share in (0.1, 0.2))
    assert small < large


def test_the_other_sources_are_mixed_as_without_a_share(folder):
    with_share = mix(folder, {"domain.jsonl": None, "other.jsonl": None, "general.jsonl": 0.1})
    without = mix(folder, {"domain.jsonl": None, "other.jsonl": None})
    assert {one for one in with_share.origins if one.source < 2} == set(without.origins)


def test_every_row_is_beside_where_it_stands(folder):
    mixture = mix(folder, {"domain.jsonl": None, "general.jsonl": 0.3})
    for row, origin in zip(mixture.rows, mixture.origins, strict=True):
        if origin.source == 1:
            assert row["text"].split()[0] == f"g{origin.number}"
            assert origin.place(folder) == f"general.jsonl:{origin.number + 1}"


def test_a_share_that_cannot_be_reached_is_refused_with_what_to_do(folder, tmp_path):
    assert refusal(folder, {"domain.jsonl": None, "general.jsonl": 0.999}) == (
        "general.jsonl: share 0.999 of this stage is 899,100 tokens, and the source has 695: each row would be used "
        "more than 100 times; add rows, or lower the share"
    )
    assert refusal(folder, {"domain.jsonl": None, "general.jsonl": 1e-4}) == (
        "general.jsonl: share 0.0001 of this stage is 0 tokens, less than half of a row; raise it, or remove the source"
    )
    write_rows(tmp_path / "one.jsonl", [{"text": "a"}])
    write_rows(tmp_path / "general.jsonl", [{"text": "b"}])
    sources = [source("one.jsonl", weight=0.1), source("general.jsonl", share=0.5)]
    with pytest.raises(InvalidInput, match=r"^one.jsonl: no tokens are left after weighting, so no share can be told"):
        mixed(sources, tmp_path, text_row, 1, sizes)
