"""Every malformed spec that we know, and the exact words in which each is refused by each command that takes a spec."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny
from headers import llama, write_headers
from methods_table import KINDS

from flows.cli import _run

EMPTY = "the file is empty: a spec is a mapping of keys to values"
ALIAS = "aliases are not supported: write the value out"
ANCHOR = "anchors are not supported: write the value out where it is used"
MAPPING = "the top level must be a mapping of keys to values, found"
YAML: dict[str, tuple[str | bytes, list[str]]] = {
    "empty": ("", [f"1:1: {EMPTY}"]),
    "comment": ("# only\n", [f"1:1: {EMPTY}"]),
    "null": ("---\n~\n", [f"2:1: {EMPTY}"]),
    "scalar": ("abc", [f"1:1: {MAPPING} 'abc'"]),
    "list": ("- a\n", [f"1:1: {MAPPING} a list"]),
    "two documents": ("a: 1\n---\nb: 1\n", ["2:1: a second document begins: a spec is one document"]),
    "yaml 1.1": ("%YAML 1.1\n---\na: 1\n", ["2:1: only YAML 1.2 is supported: remove the %YAML line"]),
    "tab": ("a:\n\tb: 1\n", ["2:1: tabs cannot indent YAML: use spaces"]),
    "unterminated text": (
        'a: "x',
        ["1:6: not valid YAML: found unexpected end of stream (while scanning a quoted scalar, line 1)"],
    ),
    "unterminated mapping": (
        "a: {b: 1",
        ["1:9: not valid YAML: expected ',' or '}', but got '<stream end>' (while parsing a flow mapping, line 1)"],
    ),
    "colon": (
        "a: b: c",
        ["1:5: not valid YAML: mapping values are not allowed here: text that holds ': ' needs quotes"],
    ),
    "bad escape": (
        'a: "\\UFFFFFFFF"',
        ["1:1: not valid YAML after this point: Python int too large to convert to C int"],
    ),
    "duplicate": ("a: 1\nb: 2\na: 3\n", ["3:1: a: the key is already on line 1: keep one of the two"]),
    "duplicates": (
        "l:\n  - x: 1\n    x: 2\nm: {y: 1, y: 2}\n",
        [
            "3:5: l[0].x: the key is already on line 2: keep one of the two",
            "4:11: m.y: the key is already on line 4: keep one of the two",
        ],
    ),
    "digits": ("a: " + "1" * 5000, ["1:4: a: a number of 5,000 digits is too long: 100 are the most"]),
    "hex digits": ("a: 0x" + "f" * 5000, ["1:4: a: a number of 5,002 digits is too long: 100 are the most"]),
    "NUL": ("a: 1\n\nb: \0x", ["3:4: the character U+0000 is not allowed in YAML: remove it"]),
    "escaped NUL": (
        'a: "\\0"',
        ["1:4: a: text cannot hold a NUL or half of a surrogate pair: remove the escape"],
    ),
    "surrogate": (
        'a: "\\ud800"',
        ["1:4: a: text cannot hold a NUL or half of a surrogate pair: remove the escape"],
    ),
    "bad UTF-8": (
        b"a: 1\nb: \xff",
        ["2:4: not UTF-8: the byte 0xFF is no character; save the file as UTF-8"],
    ),
    "UTF-16": (
        "a: 1".encode("utf-16"),
        ["1:1: not UTF-8: the byte 0xFF is no character; save the file as UTF-8"],
    ),
    "2 MiB": ("#" * 2**21, ["1:1: is larger than 256 KiB: a spec names its data, it does not hold it"]),
    "many values": (
        "a: [" + "1," * 120_000 + "]",
        ["1:9999: more than 5,000 keys and values: a spec names its data, it does not hold it"],
    ),
    "deep flow": ("a: " + "[" * 3000, ["1:35: nested deeper than 32 levels"]),
    "deep block": ("- " * 3000 + "a", [f"1:1: {MAPPING} a list"]),
    "deep mappings": ("".join(" " * i + "a:\n" for i in range(600)), ["33:33: nested deeper than 32 levels"]),
    "alias bomb": (
        "a: &a [x, x]\nb: &b [*a, *a]\n",
        [
            f"1:4: a: {ANCHOR}",
            f"2:4: b: {ANCHOR}",
            f"2:8: b[0]: {ALIAS}",
            f"2:12: b[1]: {ALIAS}",
        ],
    ),
    "self reference": ("a: &a [*a]\n", [f"1:4: a: {ANCHOR}", f"1:8: a[0]: {ALIAS}"]),
    "alias as a key": (
        "x: 1\n*x : 1\n",
        [f"2:1: {ALIAS}", "2:1: x: the key is already on line 1: keep one of the two"],
    ),
    "merge": ("<<: {a: 1}\n", ["1:1: ['<<']: merge keys are not supported: write the values out"]),
    "python tag": (
        "a: !!python/object/apply:os.system [x]\n",
        ["1:4: a: tags are not supported: remove !!python/object/apply:os.system"],
    ),
    "unknown tag": ("a: !foo {b: 1}\n", ["1:4: a: tags are not supported: remove !foo"]),
    "known tag": ("a: !!str 1\n", ["1:4: a: tags are not supported: remove !!str"]),
    "number as a key": ("a:\n  1: x\n", ["2:3: a.1: a key must be text, found 1: put it in quotes"]),
    "no key": (": x\n", ["1:1: ['']: a key must be text, found nothing: put it in quotes"]),
    "list as a key": ("? [a]\n: 1\n", ["1:3: a key must be text, found a list or a mapping"]),
}

NAME = "expected a name of 1 to 63 characters, a-z, 0-9, - and _, that starts with a letter or digit, found"
SECRET = (
    "a spec is copied into manifests and logs, so it holds no secrets; remove it, export it as an environment variable "
    "(the hub reads HF_TOKEN), and revoke it if anybody else has seen this file"
)
TOKEN = "hf_" + "Ab1" * 12
KEYS = "name, kind, method, data, data_limits, train, seed, gates, on_gate_failure"
RATE = "learning_rate: 5e-3"
CORPUS = "path: data/corpus.jsonl"

# Edits of the tiny project's spec: what is replaced, by what, and every line of the answer.
EDITS: dict[str, tuple[list[tuple[str, str]], list[str]]] = {
    "unknown key": (
        [("seed: 3", "sed: 3")],
        [
            "3:1: sed: unknown key; did you mean 'seed'? allowed: name, model, seed, metrics, diagnostics, stages, release"  # noqa: E501
        ],
    ),
    "missing key": ([("    kind: cpt\n", "")], ["10:5: stages[0].kind: missing; allowed: cpt, ift, dpo"]),
    "missing data": (
        [("    data: [{path: data/corpus.jsonl}]\n", "")],
        ["10:5: stages[0].data: missing; Training rows; several sources are mixed by their weights or shares"],
    ),
    "text for a number": (
        [("rank: 4", 'rank: "10"')],
        ["18:32: stages[1].method.rank: expected a whole number, found '10'; remove the quotes"],
    ),
    "yes for true": (
        [("max_steps: 12, sequence", "gradient_checkpointing: yes, max_steps: 12, sequence")],
        ["14:58: stages[0].train.gradient_checkpointing: expected true or false, found 'yes'"],
    ),
    "date for a number": (
        [("seed: 3", "seed: 2026-11-25")],
        ["3:7: seed: expected a whole number, found '2026-11-25'"],
    ),
    **{
        f"{value[:8]} for a positive number": (
            [(RATE, f"learning_rate: {value}")],
            [f"14:28: stages[0].train.learning_rate: {found}"],
        )
        for value, found in {
            ".inf": "expected a finite number, found .inf",
            "-.INF": "expected a finite number, found -.INF",
            ".nan": "expected a finite number, found .nan",
            "1e999": "expected a finite number, found 1e999",
            "-1": "expected a number greater than 0, found -1",
            "0": "expected a number greater than 0, found 0",
            "true": "expected a number, found true",
            "[1]": "expected a number, found [1]",
            "1" * 5000: "a number of 5,000 digits is too long: 100 are the most",
        }.items()
    },
    "unknown method": (
        [("kind: lora", "kind: lroa")],
        [
            "18:20: stages[1].method.kind: unknown method 'lroa'; did you mean 'lora'? allowed: "
            + ", ".join(["lora", "qlora", "glora", *(kind for kind in KINDS if kind not in ("lora", "qlora", "glora"))])
        ],
    ),
    "unknown objective": (
        [("kind: ift", "kind: sft")],
        ["17:11: stages[1].kind: unknown kind 'sft'; did you mean 'ift'? allowed: ift, cpt, dpo"],
    ),
    "unknown metric": (
        [("kind: lm_eval", "kind: lmeval")],
        [
            "7:14: metrics.qa.kind: unknown kind 'lmeval'; did you mean 'lm_eval'? "
            "allowed: lm_eval, perplexity, preference, generation, judge"
        ],
    ),
    "stage name twice": (
        [("name: manner", "name: answers")],
        ["22:5: stages[2].name: stage name 'answers' is used twice; stage names are unique"],
    ),
    "stage that names its start": (
        [("    kind: dpo\n", "    kind: dpo\n    from: answers\n")],
        [f"24:5: stages[2].from: unknown key; allowed: {KEYS}"],
    ),
    "gate on a later stage": (
        [("improves_on: base", "improves_on: manner")],
        ["15:30: stages[0].gates[0].improves_on: no earlier stage 'manner'; allowed: base, previous"],
    ),
    "gate on a missing stage": (
        [("improves_on: previous", "improves_on: knowlege")],
        [
            "21:31: stages[1].gates[0].improves_on: no earlier stage 'knowlege'; did you mean 'knowledge'? "
            "allowed: base, previous, knowledge"
        ],
    ),
    "gate on a missing metric": (
        [("metric: answers", "metric: answrs")],
        [
            "21:14: stages[1].gates[0].metric: no metric 'answrs'; did you mean 'answers'? "
            "allowed: domain, answers, qa, pairs"
        ],
    ),
    **{
        f"stage name {written[:12]}": (
            [("name: answers", f"name: {written}")],
            [f"16:11: stages[1].name: {NAME} {found}"],
        )
        for written, found in {
            "../../x": "'../../x'",
            "/etc/x": "'/etc/x'",
            ".": "'.'",
            "''": "''",
            "-a": "'-a'",
            "a.b": "'a.b'",
            "Answers": "'Answers'",
            "é": "'é'",
            '"a\\nb"': "'a\\nb'",
            "a" * 300: f"'{'a' * 58}…",
        }.items()
    },
    "stage name with NUL": (
        [("name: answers", 'name: "a\\0b"')],
        ["16:11: stages[1].name: text cannot hold a NUL or half of a surrogate pair: remove the escape"],
    ),
    "reserved stage name": (
        [("name: answers", "name: base")],
        ["16:5: stages[1].name: stage name 'base' is reserved; rename the stage"],
    ),
    "pipeline name": ([("name: tiny", "name: ../tiny")], [f"1:7: name: {NAME} '../tiny'"]),
    "metric name": ([("  qa:", "  ../qa:")], [f"7:3: metrics['../qa']: {NAME} '../qa'"]),
    "home folder": (
        [("path: base", "path: ~/base")],
        ["2:15: model.path: '~/base': ~ is not expanded in a spec; write the absolute path"],
    ),
    "URL": (
        [(CORPUS, "path: s3://bucket/corpus.jsonl")],
        [
            "13:19: stages[0].data[0].path: 's3://bucket/corpus.jsonl' is a URL, and a path names a file on this "
            "machine: download it, or name what is on the Hugging Face hub by hub and revision"
        ],
    ),
    **{
        f"source {written[:30]}": ([("data: [{path: data/corpus.jsonl}]", f"data: {written}")], [f"13:{found}"])
        for written, found in {
            "": "5: stages[0].data: expected a list, found nothing",
            "[]": "11: stages[0].data: expected 1 or more items, found 0",
            "data/corpus.jsonl": "11: stages[0].data: expected a list, found 'data/corpus.jsonl'",
            "{path: a.txt}": "11: stages[0].data: expected a list, found {'path': 'a.txt'}",
            "[a.txt]": "12: stages[0].data[0]: expected a mapping, found 'a.txt'",
            "[{}]": "12: stages[0].data[0]: a source is either path or hub",
            "[{path: 3}]": "19: stages[0].data[0].path: expected text, found 3",
            "[{path: ''}]": "19: stages[0].data[0].path: expected text of 1 or more characters, found ''",
            "[{path: data}]": "12: stages[0].data[0]: cannot tell the format of 'data'; allowed endings: .jsonl, .txt, "
            ".parquet, .csv",
            "[{path: data/*.csv}]": "12: stages[0].data[0]: {folder}/data/*.csv: no file matches",
            f"[{{path: /{'a' * 5000}.txt}}]": "19: stages[0].data[0].path: expected text of 4096 or fewer characters, "
            f"found '/{'a' * 57}…",
            f"[{{path: /{'a' * 300}.txt}}]": f"12: stages[0].data[0]: {'a' * 60}: cannot be a file: File name too long",
        }.items()
    },
    "token": (
        [("dtype: float32", f"hub: {TOKEN}/x, dtype: float32")],
        [
            "2:8: model: a model is one of path, gguf or hub; found path and hub",
            f"2:26: model.hub: looks like a Hugging Face token: {SECRET}",
        ],
    ),
    "token as a key": (
        [("seed: 3", f"{TOKEN}: 3")],
        [
            f"3:1: [redacted]: looks like a Hugging Face token: {SECRET}",
            "3:1: [redacted]: unknown key; allowed: name, model, seed, metrics, diagnostics, stages, release",
        ],
    ),
    "URL with a password": (
        [("task: tasks/qa.yaml", "task: 'https://me:hunter2@host/qa.yaml'")],
        [
            "7:29: metrics.qa.task: '[redacted]host/qa.yaml' is a URL, and a path names a file on this machine: "
            "download it, or name what is on the Hugging Face hub by hub and revision",
            f"7:29: metrics.qa.task: looks like a URL with a password: {SECRET}",
        ],
    ),
    "everything at once, files too": (
        [("seed: 3", "sed: 3"), ("rank: 4}", "rnak: 4}"), (CORPUS, "path: data/corpse.jsonl"), ("qa.yaml", "qq.yaml")],
        [
            "3:1: sed: unknown key; did you mean 'seed'? allowed: name, model, seed, metrics, diagnostics, stages, release",  # noqa: E501
            "7:23: metrics.qa.task: {folder}/tasks/qq.yaml: no such file",
            "13:12: stages[0].data[0]: {folder}/data/corpse.jsonl: no such file",
            "18:26: stages[1].method.rnak: unknown key; did you mean 'rank'? "
            "allowed: kind, target_modules, rank, alpha, dropout",
        ],
    ),
    "references and files at once": (
        [("name: manner", "name: answers"), (CORPUS, "path: data/corpse.jsonl")],
        [
            "13:12: stages[0].data[0]: {folder}/data/corpse.jsonl: no such file",
            "22:5: stages[2].name: stage name 'answers' is used twice; stage names are unique",
        ],
    ),
    "rows of a stage that is unsound elsewhere": (
        [("max_steps: 12, sequence_length: 64", "max_steps: twelve"), (CORPUS, "path: data/pairs.jsonl")],
        [
            *(
                f"13:12: stages[0].data[0]: {{folder}}/data/pairs.jsonl:{line}: no column 'text'; "
                "columns: prompt, chosen, rejected"
                for line in range(1, 6)
            ),
            "13:12: stages[0].data[0]: data/pairs.jsonl: 60 of 60 rows cannot be used (5 of them shown): correct them, "
            "or let them be left out (on_bad_row: drop)",
            "14:45: stages[0].train.max_steps: expected a whole number, found 'twelve'",
        ],
    ),
}

Refused = Callable[[Path], list[str]]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, data and tasks that are sound. Read only."""
    folder = tmp_path_factory.mktemp("malformed")
    write_headers(folder / "base", llama(), num_attention_heads=4, num_key_value_heads=2, hidden_size=32)
    tiny.write_data(folder)
    return folder


@pytest.fixture(params=["validate", "plan", "run"])
def refused(request: pytest.FixtureRequest, files: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Refused]:
    """Give a spec to each of the commands: it ends with 2, says nothing but the errors, and leaves nothing behind."""

    def give(spec: Path) -> list[str]:
        before = sorted(files.rglob("*"))
        assert _run([request.param, str(spec)]) == 2
        assert sorted(files.rglob("*")) == before
        said = capsys.readouterr()
        assert said.out == ""
        return said.err.replace(f"{spec}:", "").replace(str(files), "{folder}").splitlines()

    yield give
    (files / "spec.yaml").unlink(missing_ok=True)


@pytest.mark.parametrize("case", YAML)
def test_what_is_no_sound_yaml_is_refused_at_its_place(refused: Refused, files: Path, case: str) -> None:
    text, expected = YAML[case]
    spec = files / "spec.yaml"
    spec.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert refused(spec) == expected


@pytest.mark.parametrize("case", EDITS)
def test_what_makes_no_sense_is_refused_at_its_place(refused: Refused, files: Path, case: str) -> None:
    edits, expected = EDITS[case]
    text = tiny.SPEC
    for old, new in edits:
        assert old in text
        text = text.replace(old, new, 1)
    spec = files / "spec.yaml"
    spec.write_text(text)
    found = refused(spec)
    assert found == expected
    assert not any(secret in line for line in found for secret in (TOKEN, "hunter2"))


def test_the_spec_that_the_cases_edit_is_sound(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = files / "spec.yaml"
    for text in (tiny.SPEC, "\ufeff" + tiny.SPEC, tiny.SPEC.replace("\n", "\r\n"), tiny.SPEC.replace("5e-3", "1e-4")):
        spec.write_bytes(text.encode())
        assert _run(["validate", str(spec)]) == 0
        assert capsys.readouterr().err.count(": warning: ") == 1  # of the metric that no gate uses
    spec.unlink()


def test_a_spec_that_is_no_readable_file_is_refused(
    refused: Refused, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fifo, loop, locked = tmp_path / "fifo", tmp_path / "loop", tmp_path / "locked"
    os.mkfifo(fifo)
    loop.symlink_to(loop)
    assert refused(tmp_path / "none") == ["1:1: cannot be read: No such file or directory"]
    assert refused(tmp_path) == ["1:1: is a directory: name the spec file in it"]
    assert refused(fifo) == ["1:1: is not a regular file: a spec is read from a file on disk"]
    assert refused(Path("/dev/zero")) == ["1:1: is not a regular file: a spec is read from a file on disk"]
    assert refused(loop) == ["1:1: cannot be read: Too many levels of symbolic links"]
    assert refused(loop / "spec.yaml") == ["1:1: cannot be read: Too many levels of symbolic links"]
    assert refused(tmp_path / ("a" * 300)) == ["1:1: cannot be read: File name too long"]
    assert refused(tmp_path / "a\0b") == [f"{tmp_path}/a\\x00b:1:1: cannot be read: embedded null byte"]
    locked.write_text("a: 1")

    def deny(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", deny)  # root may read everything, so a mode proves nothing
    assert refused(locked) == ["1:1: cannot be read: Permission denied"]


def test_a_path_leaks_no_descriptor(refused: Refused, tmp_path: Path) -> None:
    descriptors = Path("/proc/self/fd")
    refused(tmp_path)
    before = len(list(descriptors.iterdir()))
    for path in (tmp_path, tmp_path / "none", Path("/dev/null")):
        refused(path)
    assert len(list(descriptors.iterdir())) == before


def test_relative_paths_start_where_a_link_to_the_spec_is(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real/spec.yaml").write_text(tiny.SPEC)
    link = tmp_path / "spec.yaml"
    link.symlink_to("real/spec.yaml")
    assert refused(link)[0] == f"2:1: model: model.path: {tmp_path}/base: no such folder"
