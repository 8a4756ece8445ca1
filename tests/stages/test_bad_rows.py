"""Rows that cannot be used: left out only where the spec says so, counted and named, and never in silence."""

import pytest
from row_reading import complaint, read, refusal, source, texts, write_parquet
from tiny import write_rows

from stages.data import Count, read_source, tell_what_was_left_out
from stages.errors import InvalidInput
from stages.mixing import mixed
from stages.rows import conversation_row, preference_row, text_row

GOOD = [{"text": f"good {n}"} for n in range(8)]
BAD = {"text": None}


def test_bad_rows_are_left_out_where_the_spec_says_so_and_counted_with_their_places(tmp_path):
    write_rows(tmp_path / "data/a.jsonl", [*GOOD[:3], BAD, *GOOD[3:], {"body": "x"}])
    count = Count("data/a.jsonl")
    chosen = source("data/a.jsonl", on_bad_row="drop", max_bad_rows=2)
    assert list(read_source(chosen, tmp_path, text_row, count=count)) == GOOD
    assert (count.rows, count.bad, count.used) == (10, 2, 8)
    assert count.as_record(tmp_path) == {
        "source": "data/a.jsonl",
        "rows": 10,
        "dropped": 2,
        "first_dropped": [
            "data/a.jsonl:4: column 'text' holds nothing (null); expected text",
            "data/a.jsonl:10: no column 'text'; columns: body",
        ],
    }
    assert str(count) == "data/a.jsonl: 10 rows, 2 of them cannot be used"


@pytest.mark.parametrize(("most", "allowed"), [(1, 1), ("10%", 1), ("19.9%", 1), ("1%", 0)])
def test_more_bad_rows_than_may_be_left_out_refuse_the_source_with_the_first_of_them(tmp_path, most, allowed):
    write_rows(tmp_path / "a.jsonl", [*GOOD, BAD, BAD])
    told = refusal(tmp_path, "a.jsonl", on_bad_row="drop", max_bad_rows=most)
    assert told.split("\n") == [
        *(f"{tmp_path}/a.jsonl:{n}: column 'text' holds nothing (null); expected text" for n in (9, 10)),
        f"a.jsonl: 2 of 10 rows cannot be used; max_bad_rows ({most}) lets {allowed} be left out: correct the rows, or "
        "raise it",
    ]


@pytest.mark.parametrize("most", [2, "20%"])
def test_as_many_bad_rows_as_may_be_left_out_are_left_out(tmp_path, most):
    write_rows(tmp_path / "a.jsonl", [*GOOD, BAD, BAD])
    assert read(tmp_path, "a.jsonl", on_bad_row="drop", max_bad_rows=most) == GOOD


def test_a_share_of_bad_rows_is_not_judged_by_a_sample_and_a_number_is(tmp_path):
    write_rows(tmp_path / "a.jsonl", [BAD, BAD, GOOD[0], *GOOD * 30])
    count = Count("a.jsonl")
    share = source("a.jsonl", on_bad_row="drop", max_bad_rows="1%")
    assert list(read_source(share, tmp_path, text_row, 3, count)) == GOOD[:1]
    assert (count.bad, count.sampled) == (2, True)
    with pytest.raises(InvalidInput, match=r"2 of the first 3 rows cannot be used; max_bad_rows \(1\)"):
        list(read_source(source("a.jsonl", on_bad_row="drop", max_bad_rows=1), tmp_path, text_row, 3))
    with pytest.raises(InvalidInput, match=r"2 of 243 rows cannot be used; max_bad_rows \(0\.1%\)"):
        read(tmp_path, "a.jsonl", on_bad_row="drop", max_bad_rows="0.1%")


def test_a_source_of_which_every_row_is_left_out_is_refused(tmp_path):
    write_rows(tmp_path / "a.jsonl", [BAD] * 7)
    *first, last = refusal(tmp_path, "a.jsonl", on_bad_row="drop", max_bad_rows="100%").split("\n")
    assert len(first) == 5
    assert last == "a.jsonl: no rows are left: all 7 that were read cannot be used; correct them"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", b'text\nfirst\n"second\nthird\nfourth\n'),
        ("a.csv", b"text\nfine\nfine too\n\xff\xfe\nlost\n"),
        ("a.parquet", b"PAR1 but not really"),
    ],
)
def test_a_file_that_breaks_off_is_refused_though_bad_rows_may_be_left_out(tmp_path, name, content):
    """What is behind the break is lost and was never counted: that is no row left out, that is a silent loss."""
    file = tmp_path / name
    file.write_bytes(content)
    told = refusal(tmp_path, name, on_bad_row="drop", max_bad_rows="100%")
    assert told.startswith(f"{file}:")
    assert told.endswith("write that file anew")


def test_a_parquet_file_that_was_cut_in_its_middle_is_refused(tmp_path):
    file = write_parquet(tmp_path / "a.parquet", {"text": [f"row {n} {'x' * 50}" for n in range(3000)]})
    content = bytearray(file.read_bytes())
    content[200:4000] = bytes(3800)
    file.write_bytes(content)
    assert refusal(tmp_path, "a.parquet", on_bad_row="drop", max_bad_rows="100%").startswith(f"{file}:1: not a Parquet")


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("", "column 'text' is empty"),
        (" \t", "column 'text' is empty"),
        ("a\0b", "column 'text' holds a NUL character"),
    ],
)
def test_a_bad_text_is_refused_in_every_format_at_its_row(tmp_path, form, value, reason):
    rows = ["one", "two", value, "four"]
    if form == "parquet":
        file, line = write_parquet(tmp_path / "a.parquet", {"text": rows}), 3
    elif form == "csv":
        file, line = tmp_path / "a.csv", 4
        file.write_text("text\n" + "".join(f'"{text}"\n' for text in rows))
    else:
        file, line = tmp_path / "a.jsonl", 3
        write_rows(file, [{"text": text} for text in rows])
    assert complaint(tmp_path, file.name) == f"{file}:{line}: {reason}"
    assert texts(read(tmp_path, file.name, on_bad_row="drop", max_bad_rows="25%")) == ["one", "two", "four"]


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize(
    ("normalise", "row", "reason"),
    [
        (text_row, {"body": "a"}, "no column 'text'; columns: body"),
        (conversation_row, {"prompt": "q"}, "columns prompt; expected messages, or prompt and completion, or "),
        (conversation_row, {"prompt": "q", "completion": " "}, "column 'completion' is empty"),
        (preference_row, {"prompt": "q", "chosen": "a"}, "no column 'rejected'; columns: prompt, chosen"),
        (preference_row, {"prompt": "q", "chosen": "a", "rejected": "a"}, "chosen and rejected are the same"),
    ],
)
def test_a_row_that_an_objective_cannot_use_is_refused_in_every_format(tmp_path, form, normalise, row, reason):
    file, line = tmp_path / f"a.{form}", 1
    if form == "parquet":
        write_parquet(file, {key: [value] for key, value in row.items()})
    elif form == "csv":
        line = 2
        file.write_text(",".join(row) + "\n" + ",".join(row.values()) + "\n")
    else:
        write_rows(file, [row])
    assert complaint(tmp_path, file.name, normalise).startswith(f"{file}:{line}: {reason}")


def test_what_was_left_out_is_said_in_the_log(tmp_path, capsys):
    write_rows(tmp_path / "a.jsonl", [*GOOD, BAD])
    (count,) = mixed([source("a.jsonl", on_bad_row="drop", max_bad_rows=1)], tmp_path, text_row, 1).counts
    tell_what_was_left_out(count)
    assert capsys.readouterr().err == (
        "a.jsonl: 9 rows, 1 of them cannot be used; left out, as on_bad_row: drop allows: "
        f"{tmp_path}/a.jsonl:9: column 'text' holds nothing (null); expected text\n"
    )


def test_nothing_is_said_where_nothing_was_left_out(tmp_path, capsys):
    write_rows(tmp_path / "a.jsonl", GOOD)
    (count,) = mixed([source("a.jsonl", on_bad_row="drop")], tmp_path, text_row, 1).counts
    tell_what_was_left_out(count)
    assert capsys.readouterr().err == ""


def test_the_rows_of_each_file_are_counted(tmp_path):
    write_rows(tmp_path / "a.jsonl", GOOD)
    write_rows(tmp_path / "b.jsonl", [*GOOD[:2], BAD])
    (count,) = mixed([source("?.jsonl", on_bad_row="drop", max_bad_rows=1)], tmp_path, text_row, 1).counts
    assert str(count) == "?.jsonl: 11 rows (a.jsonl 8, b.jsonl 3), 1 of them cannot be used"


def test_a_pair_that_is_left_out_shifts_no_row(tmp_path):
    good = [{"prompt": f"q{n}", "chosen": "a", "rejected": "b"} for n in range(3)]
    write_rows(tmp_path / "a.jsonl", [good[0], {"prompt": "q", "chosen": "a", "rejected": "a"}, *good[1:]])
    found = read(tmp_path, "a.jsonl", preference_row, on_bad_row="drop", max_bad_rows=1)
    assert [row["prompt"][0]["content"] for row in found] == ["q0", "q1", "q2"]
