import csv
import json
import os
import random
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from huggingface_hub import constants
from row_reading import complaint, complaints, read, refusal, source, texts, write_parquet
from tiny import write_rows

from specs.data import DataSpec
from stages.artifact import sha256
from stages.data import digests, files_of, read_source
from stages.errors import InvalidInput
from stages.mixing import mixed
from stages.rows import conversation_row, preference_row, text_row

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def written(tmp_path):
    """A function that writes bytes into a file of a name and returns its path."""

    def write(name: str, content: bytes) -> Path:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
        return file

    return write


def test_jsonl_rows_come_in_order_and_blank_lines_do_not_count(tmp_path, written):
    written("a.jsonl", b'{"text": "one"}\n\n  \r\n{"text": "two\\nlines"}\r\n{"text": "\xe2\x80\xa8three"}')
    assert texts(read(tmp_path, "a.jsonl")) == ["one", "two\nlines", "\u2028three"]


def test_a_text_file_is_one_document(tmp_path, written):
    written("a.txt", "first\n\nsecond é\n".encode())
    assert texts(read(tmp_path, "a.txt")) == ["first\n\nsecond é\n"]


def test_csv_cells_may_hold_commas_quotes_and_line_breaks(tmp_path):
    cells = ["a, b", 'say "hi"', "two\nlines", "plain"]
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["id", "text"], *([n, cell] for n, cell in enumerate(cells))])
    assert texts(read(tmp_path, "a.csv")) == cells


def test_parquet_rows_come_in_order_over_many_row_groups(tmp_path):
    wanted = [f"row {n}" for n in range(2500)]
    table = pyarrow.table({"text": wanted})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=700)
    assert texts(read(tmp_path, "a.parquet")) == wanted


def test_parquet_holds_conversations(tmp_path):
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    write_parquet(tmp_path / "a.parquet", {"messages": [messages]})
    assert read(tmp_path, "a.parquet", conversation_row) == [{"messages": messages}]


def test_a_glob_reads_its_files_by_name_whatever_the_order_on_disk(tmp_path):
    for name in ("b", "c", "a"):
        write_rows(tmp_path / f"data/{name}.jsonl", [{"text": name}])
    write_rows(tmp_path / "data/other.txt", [])
    (tmp_path / "data/folder.jsonl").mkdir()
    assert [file.name for file in files_of(source("data/*.jsonl"), tmp_path)] == ["a.jsonl", "b.jsonl", "c.jsonl"]
    assert texts(read(tmp_path, "data/[ab].jsonl")) == ["a", "b"]
    assert texts(read(tmp_path, "**/?.jsonl")) == ["a", "b", "c"]


def test_a_glob_that_matches_nothing_names_the_place(tmp_path):
    assert refusal(tmp_path, "data/*.jsonl") == f"{tmp_path}/data/*.jsonl: no file matches"


def test_an_absolute_glob_reads_its_files_like_an_absolute_path(tmp_path):
    write_rows(tmp_path / "data/a.jsonl", [{"text": "a"}])
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert texts(read(elsewhere, str(tmp_path / "data/a.jsonl"))) == ["a"]
    assert texts(read(elsewhere, str(tmp_path / "data/*.jsonl"))) == ["a"]


def test_a_glob_that_cannot_be_one_is_refused_by_its_text(tmp_path):
    write_rows(tmp_path / "data/a.jsonl", [{"text": "a"}])
    assert "data/**.jsonl" in refusal(tmp_path, "data/**.jsonl")


def test_columns_are_renamed_and_the_rest_is_left(tmp_path):
    write_rows(tmp_path / "a.jsonl", [{"q": "ask", "a": "yes", "b": "no", "prompt": "old", "id": 3}])
    columns = {"prompt": "q", "chosen": "a", "rejected": "b"}
    seen = []

    def spy(row):
        seen.append(row)
        return preference_row(row)

    read(tmp_path, "a.jsonl", spy, columns=columns)
    assert seen == [{"prompt": "ask", "chosen": "yes", "rejected": "no", "id": 3}]


def test_two_columns_can_be_swapped(tmp_path):
    write_rows(tmp_path / "a.jsonl", [{"prompt": "q", "chosen": "worse", "rejected": "better"}])
    found = read(tmp_path, "a.jsonl", preference_row, columns={"chosen": "rejected", "rejected": "chosen"})
    assert [(row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in found] == [("better", "worse")]


def test_a_renamed_column_that_is_not_there_is_named_with_those_that_are(tmp_path):
    write_rows(tmp_path / "a.jsonl", [{"text": "t", "id": 1}])
    expected = f"{tmp_path}/a.jsonl:1: no column 'body' (named in columns); columns: text, id"
    assert complaint(tmp_path, "a.jsonl", columns={"text": "body"}) == expected


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "a"', "not JSON: Expecting ',' delimiter: line 2 column 1 (char 13)"),
        (b"text", "not JSON: Expecting value: line 1 column 1 (char 0)"),
        (b'{"text": "a"} {"text": "b"}', "not JSON: Extra data: line 1 column 15 (char 14)"),
        (b'{"text": "\xff"}', "not UTF-8 (byte 11 of the line)"),
        (
            b'["text"]',
            "a list; expected an object: in JSON Lines each row is an object on a line of its own",
        ),
        (b'{"a\\u001b[2J\\nspec.yaml: valid": 1}', "no column 'text'; columns: a\\x1b[2J\\nspec.yaml: valid"),
        (
            bytes(9),
            "not JSON: Expecting value: line 1 column 1 (char 0): it holds NUL bytes, as a file does whose writing "
            "broke off; write it anew",
        ),
        (
            b"version https://git-lfs.github.com/spec/v1",
            "not JSON: Expecting value: line 1 column 1 (char 0): the file is a Git LFS pointer; fetch what it stands "
            "for with git lfs pull",
        ),
        (b"\x1f\x8b\x08", "not UTF-8 (byte 2 of the line): the file is compressed; unpack it with gunzip"),
        (b"\xff\xfe{", "not UTF-8 (byte 1 of the line): the file is UTF-16; save it as UTF-8"),
        (b"null", "a NoneType; expected an object"),
        (b'{"body": "a"}', "no column 'text'; columns: body"),
        (b'{"text": 5}', "column 'text' holds int 5; expected text"),
        (b'{"text": null}', "column 'text' holds nothing (null); expected text"),
        (b'{"text": "a\\u0000"}', "column 'text' holds a NUL character"),
        (b'{"text": " "}', "column 'text' is empty"),
    ],
)
def test_a_bad_line_is_named_by_file_and_line(tmp_path, written, line, reason):
    file = written("a.jsonl", b'{"text": "one"}\n\n' + line + b'\n{"text": "four"}\n')
    assert refusal(tmp_path, "a.jsonl").split("\n") == [
        f"{file}:3: {reason}",
        "a.jsonl: 1 of 3 rows cannot be used: correct them, or let them be left out (on_bad_row: drop)",
    ]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": ' + b"[" * 100_000, "not JSON that can be read: nested too deeply"),
        (b'{"text": "a", "n": ' + b"9" * 6000 + b"}", "a number of more than 4300 digits"),
    ],
)
def test_a_hostile_line_is_a_bad_row_like_any_other(tmp_path, written, line, reason):
    file = written("a.jsonl", line + b"\n")
    assert complaints(tmp_path, "a.jsonl") == [f"{file}:1: {reason}"]


def test_all_bad_rows_are_counted_and_the_first_five_shown(tmp_path):
    rows = [{"text": "good" if n % 2 else ""} for n in range(20)]
    write_rows(tmp_path / "a.jsonl", rows)
    lines = refusal(tmp_path, "a.jsonl").split("\n")
    assert lines == [
        *(f"{tmp_path}/a.jsonl:{line}: column 'text' is empty" for line in (1, 3, 5, 7, 9)),
        "a.jsonl: 10 of 20 rows cannot be used (5 of them shown): correct them, or let them be left out "
        "(on_bad_row: drop)",
    ]


def test_exactly_five_bad_rows_leave_nothing_to_count(tmp_path):
    write_rows(tmp_path / "a.jsonl", [{"text": ""}] * 5)
    assert refusal(tmp_path, "a.jsonl").count("\n") == 5
    assert "shown" not in refusal(tmp_path, "a.jsonl")


def test_bad_rows_of_several_files_are_told_at_once(tmp_path):
    write_rows(tmp_path / "a.jsonl", [{"text": "good"}, {"text": ""}])
    write_rows(tmp_path / "b.jsonl", [{"body": "x"}])
    assert complaints(tmp_path, "*.jsonl") == [
        f"{tmp_path}/a.jsonl:2: column 'text' is empty",
        f"{tmp_path}/b.jsonl:1: no column 'text'; columns: body",
    ]


def test_a_text_file_that_is_not_utf8_is_refused(tmp_path, written):
    file = written("a.txt", b"abc\xfe")
    assert complaint(tmp_path, "a.txt") == f"{file}:1: not UTF-8 (byte 4 of the file)"


@pytest.mark.parametrize("row", [b"1,a,surplus", b"1"])
def test_a_csv_row_of_another_width_is_named_by_its_line(tmp_path, written, row):
    file = written("a.csv", b"id,text\n0,fine\n" + row + b"\n")
    assert complaint(tmp_path, "a.csv") == f"{file}:3: not 2 columns"


def test_a_csv_that_is_not_utf8_is_refused_at_its_line(tmp_path, written):
    file = written("a.csv", b"text\nfine\nfine too\n\xff\xfe\n")
    told = refusal(tmp_path, "a.csv")
    assert told.startswith(f"{file}:4: not UTF-8")
    assert told.endswith("what follows in a file that breaks off cannot be read: write that file anew")


def test_a_csv_as_excel_writes_it_is_read(tmp_path, written):
    written("a.csv", b"\xef\xbb\xbftext,id\r\nfirst,1\r\n")
    assert texts(read(tmp_path, "a.csv")) == ["first"]


def test_a_csv_cell_may_be_as_long_as_a_document(tmp_path, written):
    text = "word " * 40_000
    written("a.csv", b"text\n" + text.encode() + b"\n")
    assert texts(read(tmp_path, "a.csv")) == [text]


def test_a_quote_that_is_never_closed_does_not_swallow_the_rest_of_a_csv(tmp_path, written):
    file = written("a.csv", b'text\nfirst\n"second\nthird\nfourth\n')
    assert refusal(tmp_path, "a.csv").startswith(f"{file}:")


def test_a_parquet_file_that_is_none_is_refused(tmp_path, written):
    file = written("a.parquet", b"PAR1 but not really")
    assert refusal(tmp_path, "a.parquet").startswith(f"{file}:1: not a Parquet file: ")


def test_a_null_in_parquet_is_named_by_its_row(tmp_path):
    file = write_parquet(tmp_path / "a.parquet", {"text": ["a", None, "c"]})
    assert complaint(tmp_path, "a.parquet") == f"{file}:2: column 'text' holds nothing (null); expected text"


def test_bad_utf8_in_parquet_is_refused_by_file(tmp_path):
    bad = pyarrow.array([b"fine", b"\xff\xfe"]).cast(pyarrow.string(), safe=False)
    file = write_parquet(tmp_path / "a.parquet", {"text": bad})
    assert refusal(tmp_path, "a.parquet").startswith(f"{file}:")


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
@pytest.mark.parametrize("content", [b"", b"\n\n"])
def test_a_file_without_rows_is_refused(tmp_path, written, name, content):
    written(name, content)
    assert refusal(tmp_path, name) == f"{name}: no rows; {name} is empty: put rows in, or remove the source"


def test_an_empty_text_file_and_an_empty_table_are_refused(tmp_path, written):
    file = written("a.txt", b"")
    assert complaint(tmp_path, "a.txt") == f"{file}:1: column 'text' is empty"
    write_parquet(tmp_path / "a.parquet", {"text": pyarrow.array([], pyarrow.string())})
    assert refusal(tmp_path, "a.parquet").startswith("a.parquet: no rows; a.parquet is empty")


def test_what_is_missing_or_no_file_is_refused_with_its_whole_path(tmp_path):
    (tmp_path / "folder.jsonl").mkdir()
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "dangling.jsonl").symlink_to(tmp_path / "nowhere")
    assert refusal(tmp_path, "none.jsonl") == f"{tmp_path}/none.jsonl: no such file"
    assert refusal(tmp_path, "dangling.jsonl") == f"{tmp_path}/dangling.jsonl: no such file"
    folder = "not a regular file, but a folder; name the file in it"
    piped = "not a regular file, but a pipe; write what comes out of it to a file"
    assert refusal(tmp_path, "folder.jsonl") == f"{tmp_path}/folder.jsonl: {folder}"
    assert refusal(tmp_path, "pipe.jsonl") == f"{tmp_path}/pipe.jsonl: {piped}"


def test_a_limit_is_per_file_and_what_lies_beyond_is_not_looked_at(tmp_path):
    for name in ("a", "b"):
        write_rows(tmp_path / f"{name}.jsonl", [{"text": f"{name}{n}"} for n in range(3)] + [{"text": ""}])
    found = read_source(source("*.jsonl"), tmp_path, text_row, limit=2)
    assert texts(found) == ["a0", "a1", "b0", "b1"]


def test_a_row_that_was_handed_out_is_never_from_after_a_bad_one(tmp_path):
    write_rows(tmp_path / "a.jsonl", [{"text": "one"}, {"text": ""}, {"text": "three"}])
    reader = read_source(source("a.jsonl"), tmp_path, text_row)
    assert next(reader) == {"text": "one"}
    with pytest.raises(InvalidInput, match=r"a\.jsonl:2: "):
        next(reader)


def test_a_jsonl_with_a_byte_order_mark_is_read(tmp_path, written):
    written("a.jsonl", b'\xef\xbb\xbf{"text": "first"}\r\n{"text": "second"}\r\n')
    assert texts(read(tmp_path, "a.jsonl")) == ["first", "second"]


@pytest.fixture
def numbered(tmp_path):
    """Two files of numbered rows."""
    write_rows(tmp_path / "a.jsonl", [{"text": f"a{n}"} for n in range(40)])
    write_rows(tmp_path / "b.jsonl", [{"text": f"b{n}"} for n in range(40)])
    return tmp_path


def mix(folder: Path, weights: dict[str, float], seed: int = 1) -> list[str]:
    return texts(mixed([source(path, weight=weight) for path, weight in weights.items()], folder, text_row, seed).rows)


@pytest.mark.parametrize(("weight", "per_row", "total"), [(0.1, {0, 1}, 4), (1.0, {1}, 40), (2.5, {2, 3}, 100)])
def test_a_weight_is_how_often_a_row_is_used(numbered, weight, per_row, total):
    found = Counter(mix(numbered, {"a.jsonl": weight}))
    assert found.total() == total
    assert {found[f"a{n}"] for n in range(40)} == per_row


def test_the_same_seed_gives_the_same_rows_in_the_same_order(numbered):
    weights = {"a.jsonl": 0.1, "b.jsonl": 2.5}
    state = random.getstate()
    first = mix(numbered, weights)
    random.seed(99)
    assert mix(numbered, weights) == first
    random.setstate(state)


def test_another_seed_gives_another_sample_and_another_order(numbered):
    assert set(mix(numbered, {"a.jsonl": 0.25}, 1)) != set(mix(numbered, {"a.jsonl": 0.25}, 2))
    whole = mix(numbered, {"a.jsonl": 1.0}, 1)
    other = mix(numbered, {"a.jsonl": 1.0}, 2)
    assert whole != other
    assert sorted(whole) == sorted(other)


def test_the_order_mixes_the_sources(numbered):
    found = mix(numbered, {"a.jsonl": 1.0, "b.jsonl": 1.0})
    assert {row[0] for row in found[:20]} == {"a", "b"}


def test_mixing_does_not_depend_on_the_hash_seed_of_the_process(numbered):
    assert mix(numbered, {"a.jsonl": 0.1}, 7) == ["a7", "a39", "a22", "a3"]


def test_weights_that_leave_nothing_are_refused(tmp_path):
    write_rows(tmp_path / "a.jsonl", [{"text": "a"}])
    with pytest.raises(InvalidInput) as caught:
        mix(tmp_path, {"a.jsonl": 0.1})
    assert str(caught.value) == ("a.jsonl: no rows are left after weighting; raise the weights (read: a.jsonl: 1 rows)")


def test_a_digest_is_of_the_content_and_the_format_of_every_file(tmp_path):
    for name in ("a", "b"):
        write_rows(tmp_path / f"{name}.jsonl", [{"text": name}])
    expected = [f".jsonl:{sha256(tmp_path / name)}" for name in ("a.jsonl", "b.jsonl")]
    assert digests(source("*.jsonl"), tmp_path) == expected


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """A hub cache laid out by hand, with the hub switched off; returns the folder of the commit."""
    cache = tmp_path / "huggingface/hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = cache / "datasets--owner--name"
    snapshot = repository / "snapshots" / COMMIT
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(COMMIT)
    blob = repository / "blobs/1234"
    write_rows(blob, [{"text": "from the hub"}])
    (snapshot / "data").mkdir(parents=True)
    (snapshot / "data/train-0.jsonl").symlink_to(blob)
    write_rows(snapshot / "data/train-1.jsonl", [{"text": "and more"}])
    (snapshot / "README.md").write_text("# a data set")
    return snapshot


def hub_source(files: str = "data/train-*.jsonl", *, hub: str = "owner/name", revision: str = COMMIT) -> DataSpec:
    return DataSpec.model_validate({"hub": hub, "revision": revision, "files": files})


def hub_refusal(folder: Path, chosen: DataSpec) -> str:
    with pytest.raises(InvalidInput) as caught:
        list(read_source(chosen, folder, text_row))
    return str(caught.value)


def test_a_hub_dataset_is_read_from_the_cache(hub_cache, tmp_path):
    assert texts(read_source(hub_source(), tmp_path, text_row)) == ["from the hub", "and more"]


def test_the_digest_of_a_hub_dataset_is_its_commit_and_needs_no_cache(tmp_path):
    assert digests(hub_source(), tmp_path) == [f"owner/name@{COMMIT}/data/train-*.jsonl"]


def test_a_hub_dataset_that_is_not_there_says_what_to_do(hub_cache, tmp_path):
    message = hub_refusal(tmp_path, hub_source(revision="f" * 40))
    assert message.startswith("owner/name@ffffffff/data/train-*.jsonl: cannot be fetched from the hub (")
    assert message.endswith("check the id and the revision, or download the files and name them by path")


def test_files_that_a_hub_dataset_does_not_have_are_named(hub_cache, tmp_path):
    assert hub_refusal(tmp_path, hub_source("test-*.jsonl")) == "owner/name@01234567/test-*.jsonl: no file matches"


def test_a_hub_file_of_a_format_that_cannot_be_read_is_refused_with_those_that_can(hub_cache, tmp_path):
    message = hub_refusal(tmp_path, hub_source("*"))
    assert "README.md" in message
    assert ".jsonl" in message


def test_a_hub_id_that_the_hub_does_not_allow_is_refused_by_name(hub_cache, tmp_path):
    assert "owner/na--me" in hub_refusal(tmp_path, hub_source(hub="owner/na--me"))


def test_every_json_value_survives_the_way_through_a_file(tmp_path):
    text = 'ünïcode \N{GRINNING FACE} \\ " / \t \u2028'
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert texts(read(tmp_path, "a.jsonl")) == [text]
