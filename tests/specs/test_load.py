import json
import os
import pickle
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field, RootModel, field_validator, model_validator
from typing_extensions import TypeAliasType

from specs.load import MAX_BYTES, MAX_DEPTH, MAX_DIGITS, MAX_NODES, Document, Problem, SpecError, load, read


class Strict(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


class Full(Strict):
    kind: Literal["full"]


class Lora(Strict):
    kind: Literal["lora"]
    rank: int = Field(gt=0, le=512, description="Rank of the update. Larger costs more memory.")
    alpha: float = 16.0
    init: Literal["zeros", "pissa", "olora"] = "zeros"


class Spectrum(Strict):
    kind: Literal["spectrum"]
    top_percent: float = Field(default=25.0, gt=0, le=100)
    layers: tuple[int, ...] = ()
    pair: tuple[int, str] = (1, "a")


Method = Annotated[Full | Lora | Spectrum, Field(discriminator="kind")]


class Train(Strict):
    learning_rate: float = Field(default=1e-4, gt=0)
    steps: int | Literal["auto"] = "auto"
    resume: bool = True
    betas: tuple[float, ...] | float = 0.9
    lengths: tuple[int, ...] = Field(default=(1,), min_length=1)
    extra: dict[str, Any] = {}

    @field_validator("learning_rate")
    @classmethod
    def _sane(cls, value: float) -> float:
        if value > 1:
            raise ValueError("a learning rate above 1 never converges:\nlower it")
        return value


class Stage(Strict):
    name: str = Field(pattern="^[a-z0-9]+$", max_length=20)
    method: Method
    train: Train | None = None


class Cpt(Stage):
    kind: Literal["cpt"]


class Dpo(Stage):
    kind: Literal["dpo"]
    beta: float = 0.1


Slug = Annotated[str, Field(pattern="^[a-z]+$")]
Tail = TypeAliasType("Tail", Method)


class Names(RootModel[tuple[Slug, ...]]):
    pass


class Pipeline(Strict):
    name: str
    stages: tuple[Annotated[Cpt | Dpo, Field(discriminator="kind")], ...]
    metrics: dict[Slug, Method] = {}
    fallback: Method | Literal["none"] = "none"
    tail: Tail | None = None
    names: Names = Names(())
    root: Path = Path()

    @model_validator(mode="after")
    def _unique(self) -> "Pipeline":
        if len({stage.name for stage in self.stages}) < len(self.stages):
            raise ValueError("two stages have the same name")
        return self


class Loose(Strict):
    a: Any = None
    b: Any = None


GOOD = """\
# a comment
name: tutor
stages:
  - kind: cpt
    name: knowledge
    method: {kind: spectrum, top_percent: 25, layers: [1, 2]}
    train:
      learning_rate: 1e-4
      resume: true
  - kind: dpo
    name: manner
    method:
      kind: lora
      rank: 16
root: data/
"""


def errors(tmp_path: Path, text: str | bytes, model: type[BaseModel] = Pipeline) -> list[str]:
    path = tmp_path / "s.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(SpecError) as caught:
        load(path, model)
    assert list(caught.value.problems) == sorted(caught.value.problems)
    return str(caught.value).replace(f"{path}:", "").split("\n")


def parsed(tmp_path: Path, text: str | bytes) -> dict[str, Any]:
    path = tmp_path / "s.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read(path).data


def stage(body: str) -> str:
    """One sound stage on line 4 whose method (line 7 on) or train is replaced by the test."""
    return f"name: t\nstages:\n  - kind: cpt\n    name: a\n    {body}\n"


def test_a_sound_spec_becomes_the_model(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(GOOD)
    spec = load(path, Pipeline)
    assert spec.stages[0].method == Spectrum(kind="spectrum", top_percent=25, layers=(1, 2))
    assert spec.stages[0].train == Train(learning_rate=1e-4, resume=True)
    assert spec.stages[1].method == Lora(kind="lora", rank=16)
    assert spec.root == Path("data")


def test_scalars_follow_the_core_rules_of_yaml_1_2(tmp_path: Path) -> None:
    text = "a: [010, 0o17, 0x1F, +1, -0, 1e-4, .5, -.5E3, 1., ~, null, True, FALSE]\nb:\n"
    data = parsed(tmp_path, text)
    assert data == {"a": [10, 15, 31, 1, 0, 1e-4, 0.5, -500.0, 1.0, None, None, True, False], "b": None}
    assert list(map(type, data["a"])) == [int] * 5 + [float] * 4 + [type(None)] * 2 + [bool] * 2
    words = ["no", "yes", "on", "y", "1_000", "12:30:45", "2020-01-01", "0b1", "1e", "=", "5%", "٣"]
    assert parsed(tmp_path, f"a: [{', '.join(words)}]")["a"] == words
    assert parsed(tmp_path, "a: ['1', \"true\", '~', '']")["a"] == ["1", "true", "~", ""]
    assert parsed(tmp_path, "a: |\n  1\n") == {"a": "1\n"}


@pytest.mark.parametrize(
    "text",
    [
        "\ufeffa: 1\n",
        "a: 1\r\n",
        "a: 1",
        "---\na: 1\n...\n",
        "%YAML 1.2\n---\na: 1\n",
        "# c\n\na: 1 # d\n",
        "{a: 1}",
    ],
)
def test_harmless_forms_are_accepted(tmp_path: Path, text: str) -> None:
    assert parsed(tmp_path, text) == {"a": 1}


BIG = MAX_BYTES - 20
SLOW = {
    "tag": "a: !" + "x" * BIG,
    "lines of text": 'a: "' + "x\n " * (BIG // 3) + '"',
    "blank lines": "a: >\n" + "\n" * BIG + " x",
    "directives": "%FOO a\n" * (BIG // 7) + "---\na: 1",
    "duplicates": "? a\n" * (BIG // 4),
    "unknown keys": "".join(f"stagess{i}: 1\n" for i in range(2490)),
    "wrong values": "stages:\n- {kind: cpt, train: {betas: [" + "x," * 4900 + "]}}\n",
    "wrong tags": "stages:\n" + "- {kind: cptt}\n" * 1600,
}


def growth(work: Callable[[], object]) -> int:
    """MiB by which a process of its own grows at most while it works; its errors are errors here."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
            work()
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
            os.write(writer, str(grown >> 20).encode())
            code = 0
        finally:
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader) as answer:
        grown = answer.read()
    assert os.waitpid(child, 0)[1] == 0
    return int(grown)


def test_the_costliest_inputs_take_little_memory(tmp_path: Path) -> None:
    def work() -> None:
        for text in SLOW.values():
            assert errors(tmp_path, text)

    assert growth(work) < 64


def test_of_a_file_that_is_far_too_large_only_the_limit_is_read(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    with path.open("wb") as file:
        file.truncate(1 << 34)

    def work() -> None:
        with pytest.raises(SpecError, match="is larger than 256 KiB: a spec names its data, it does not hold it"):
            read(path)

    assert growth(work) < 8


@pytest.mark.parametrize(
    ("most", "beyond"),
    [
        ("a: " + " " * (MAX_BYTES - 4) + "1", "a: " + " " * (MAX_BYTES - 3) + "1"),
        ("a: [" + "1," * (MAX_NODES - 3) + "]", "a: [" + "1," * (MAX_NODES - 2) + "]"),
        ("a: " + "[" * (MAX_DEPTH - 1) + "]" * (MAX_DEPTH - 1), "a: " + "[" * MAX_DEPTH + "]" * MAX_DEPTH),
        ("a: " + "1" * MAX_DIGITS, "a: " + "1" * (MAX_DIGITS + 1)),
    ],
    ids=["bytes", "values", "levels", "digits"],
)
def test_limits_are_where_they_are_said_to_be(tmp_path: Path, most: str, beyond: str) -> None:
    assert parsed(tmp_path, most)
    [error] = errors(tmp_path, beyond)
    assert any(f"{limit:,}" in error for limit in (MAX_BYTES // 1024, MAX_NODES, MAX_DEPTH, MAX_DIGITS))


def test_sound_problems_and_a_syntax_error_come_together(tmp_path: Path) -> None:
    assert errors(tmp_path, "a: 1\na: 2\nb: @\n") == [
        "2:1: a: the key is already on line 1: keep one of the two",
        "3:4: not valid YAML: found character '@' that cannot start any token",
    ]


ALL = "name, stages, metrics, fallback, tail, names, root"
METHODS = "full, lora, spectrum"
INVALID: dict[str, tuple[str, list[str]]] = {
    "nothing there": ("{}", ["1:1: name: missing", "1:1: stages: missing"]),
    "several at once": (
        stage("method: {kind: lora, rnak: 16, alpha: '3', init: pisa}\nnmae: x"),
        [
            "5:13: stages[0].method.rank: missing; Rank of the update",
            "5:26: stages[0].method.rnak: unknown key; did you mean 'rank'? allowed: kind, rank, alpha, init",
            "5:43: stages[0].method.alpha: expected a number, found '3'; remove the quotes",
            "5:54: stages[0].method.init: expected 'zeros', 'pissa' or 'olora', found 'pisa'; did you mean 'pissa'?",
            f"6:1: nmae: unknown key; did you mean 'name'? allowed: {ALL}",
        ],
    ),
    "unknown method": (
        stage("method: {kind: lroa}"),
        ["5:20: stages[0].method.kind: unknown method 'lroa'; did you mean 'lora'? allowed: lora, full, spectrum"],
    ),
    "method is a number": (
        stage("method: {kind: 1}"),
        [f"5:20: stages[0].method.kind: unknown method 1; allowed: {METHODS}"],
    ),
    "no method kind": (
        stage("method: {rank: 1}"),
        [f"5:13: stages[0].method.kind: missing; allowed: {METHODS}"],
    ),
    "method is text": (
        stage("method: lora"),
        ["5:13: stages[0].method: expected a mapping with the key 'kind', found 'lora'"],
    ),
    "unknown stage": (
        "name: 1\nstages: [{kind: ctp}]",
        [
            "1:7: name: expected text, found 1",
            "2:17: stages[0].kind: unknown kind 'ctp'; did you mean 'cpt'? allowed: cpt, dpo",
        ],
    ),
    "zero": (
        stage("method: {kind: spectrum, top_percent: 0, layers: [1, a], pair: [1]}"),
        [
            "5:43: stages[0].method.top_percent: expected a number greater than 0, found 0",
            "5:58: stages[0].method.layers[1]: expected a whole number, found 'a'",
            "5:68: stages[0].method.pair[1]: missing",
        ],
    ),
    "out of bounds": (
        stage("method: {kind: spectrum, top_percent: 101, layers: 3, pair: [1, a, 3]}"),
        [
            "5:43: stages[0].method.top_percent: expected a number less than or equal to 100, found 101",
            "5:56: stages[0].method.layers: expected a list, found 3",
            "5:65: stages[0].method.pair: expected 2 or fewer items, found 3",
        ],
    ),
    "a truth as a number, infinity": (
        stage("method: {kind: lora, rank: true, alpha: .inf}"),
        [
            "5:32: stages[0].method.rank: expected a whole number, found true",
            "5:45: stages[0].method.alpha: expected a finite number, found .inf",
        ],
    ),
    "a fraction as a whole number, overflow": (
        stage("method: {kind: lora, rank: 1.0, alpha: 1e999}"),
        [
            "5:32: stages[0].method.rank: expected a whole number, found 1.0",
            "5:44: stages[0].method.alpha: expected a finite number, found 1e999",
        ],
    ),
    "quoted number, null": (
        stage('method: {kind: lora, rank: "10", alpha: }'),
        [
            "5:32: stages[0].method.rank: expected a whole number, found '10'; remove the quotes",
            "5:44: stages[0].method.alpha: expected a number, found nothing",
        ],
    ),
    "training": (
        stage(
            "method: {kind: full}\n    train:\n      learning_rate: 2.0\n      steps: atuo\n"
            "      resume: yes\n"
            "      betas: [0.1, x]\n      lengths: []\n      extra: {a: .nan}\n      zz: 1"
        ),
        [
            "7:22: stages[0].train.learning_rate: a learning rate above 1 never converges: lower it",
            "8:14: stages[0].train.steps: expected a whole number or 'auto', found 'atuo'; did you mean 'auto'?",
            "9:15: stages[0].train.resume: expected true or false, found 'yes'",
            "10:20: stages[0].train.betas[1]: expected a number, found 'x'",
            "11:16: stages[0].train.lengths: expected 1 or more items, found 0",
            "12:18: stages[0].train.extra.a: expected a finite number, found .nan",
            "13:7: stages[0].train.zz: unknown key; allowed: learning_rate, steps, resume, betas, lengths, extra",
        ],
    ),
    "wrong items are not missing items": (
        stage("method: {kind: full}\n    train: {lengths: [x]}"),
        ["6:23: stages[0].train.lengths[0]: expected a whole number, found 'x'"],
    ),
    "union": (
        stage("method: {kind: full}\n    train: {betas: x, extra: [1]}"),
        [
            "6:20: stages[0].train.betas: expected a list or a number, found 'x'",
            "6:30: stages[0].train.extra: expected a mapping, found [1]",
        ],
    ),
    "long values are cut": (
        f"name: t\nstages: {'x' * 90}",
        [f"2:9: stages: expected a list, found '{'x' * 58}…"],
    ),
    "text": (
        f"name: t\nstages: [{{kind: cpt, name: {'a' * 21}, method: {{kind: full}}}}]",
        [f"2:28: stages[0].name: expected text of 20 or fewer characters, found '{'a' * 21}'"],
    ),
    "pattern": (
        "name: t\nstages: [{kind: cpt, name: A, method: {kind: full}}]",
        ["2:28: stages[0].name: expected text that matches ^[a-z0-9]+$, found 'A'"],
    ),
    "validator of the whole": (
        "# c\nname: t\nstages: [{kind: cpt, name: a, method: {kind: full}}, "
        "{kind: dpo, name: a, method: {kind: full}}]",
        ["2:1: two stages have the same name"],
    ),
    "mapping keys": (
        "name: t\nstages: []\nmetrics:\n  BAD: {kind: lora}\n  ok: {kind: lroa}\n  x: 3\n",
        [
            "4:3: metrics.BAD: expected text that matches ^[a-z]+$, found 'BAD'",
            "4:8: metrics.BAD.rank: missing; Rank of the update",
            "5:14: metrics.ok.kind: unknown kind 'lroa'; did you mean 'lora'? allowed: lora, full, spectrum",
            "6:6: metrics.x: expected a mapping with the key 'kind', found 3",
        ],
    ),
    "nested unions, aliases, root models": (
        "name: t\nstages: []\nfallback: {kind: lora, rank: a}\ntail: {kind: lora, rnk: 1}\nnames: [A, b]\nroot: 3\n",
        [
            "3:30: fallback.rank: expected a whole number, found 'a'",
            "4:7: tail.rank: missing; Rank of the update",
            "4:20: tail.rnk: unknown key; did you mean 'rank'? allowed: kind, rank, alpha, init",
            "5:9: names[0]: expected text that matches ^[a-z]+$, found 'A'",
            "6:7: root: expected text, found 3",
        ],
    ),
    "union of a mapping and a word": (
        "name: t\nstages: []\nfallback: nnoe\n",
        ["3:11: fallback: expected a mapping with the key 'kind' or 'none', found 'nnoe'; did you mean 'none'?"],
    ),
    "odd keys": (
        'name: t\nstages: []\n"a b": 1\n"\\e[31m\\n": 1\n',
        [
            f"3:1: ['a b']: unknown key; allowed: {ALL}",
            f"4:1: ['\\x1b[31m\\n']: unknown key; allowed: {ALL}",
        ],
    ),
}


@pytest.mark.parametrize("name", INVALID)
def test_invalid_specs_name_every_problem(tmp_path: Path, name: str) -> None:
    text, expected = INVALID[name]
    assert errors(tmp_path, text) == expected


def test_a_key_named_like_a_tag_is_not_dropped_from_the_field(tmp_path: Path) -> None:
    text = "name: t\nstages: []\nmetrics:\n  lora: {kind: lora, lora: 1, rank: 1}\n"
    assert errors(tmp_path, text) == [
        "4:22: metrics.lora.lora: unknown key; allowed: kind, rank, alpha, init",
    ]


def test_infinity_is_refused_where_the_model_takes_anything(tmp_path: Path) -> None:
    assert errors(tmp_path, "a: [-.inf]\nb: {c: .NaN}\n", Loose) == [
        "1:5: a[0]: expected a finite number, found -.inf",
        "2:8: b.c: expected a finite number, found .NaN",
    ]


def test_document_gives_positions_and_problems_after_validation(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(GOOD)
    document = read(path)
    assert isinstance(document, Document)
    assert document.position(("stages", 0, "train", "learning_rate")) == (8, 7)
    assert document.position(("stages", 0, "train", "steps", 3)) == (7, 5)
    assert document.position(("stages", 1)) == (10, 5)
    assert document.position(("stages", 9)) == (3, 1)
    assert document.position(("nowhere",)) == (1, 1)
    assert document.position(()) == (1, 1)
    problem = document.problem(("stages", 0, "train", "learning_rate"), "too high")
    assert problem == Problem(str(path), 8, 7, "stages[0].train.learning_rate", "too high")
    assert str(problem) == f"{path}:8:7: stages[0].train.learning_rate: too high"


def test_spec_error_sorts_and_survives_pickling() -> None:
    late, early = Problem("p", 10, 1, "", "late"), Problem("p", 2, 5, "f", "early")
    error = pickle.loads(pickle.dumps(SpecError([late, early, late])))
    assert error.problems == (early, late)
    assert str(error) == "p:2:5: f: early\np:10:1: late"


FUZZ = settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def survive(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "s.yaml"
    path.write_bytes(raw)
    problems: tuple[Problem, ...] = ()
    try:
        load(path, Pipeline)
    except SpecError as error:
        problems = error.problems or pytest.fail("an error without a problem")
    for problem in problems:
        assert problem.line >= 1
        assert problem.column >= 1
        assert "\n" not in str(problem)


@FUZZ
@given(raw=st.binary(max_size=200))
def test_any_bytes_raise_only_spec_errors(tmp_path: Path, raw: bytes) -> None:
    survive(tmp_path, raw)


PIECES = [
    "\n",
    " ",
    "  ",
    "- ",
    ": ",
    "? ",
    "{",
    "}",
    "[",
    "]",
    ",",
    "&a ",
    "*a",
    "<<: ",
    "!!int ",
    "|\n",
    "'",
    '"',
    "#",
]
PIECES += [
    "%YAML 1.1\n",
    "---\n",
    "...\n",
    "\t",
    "\\",
    "~",
    ".inf",
    "1e9",
    "0x",
    "kind",
    "lora",
    "null",
    "é",
    "\x85",
    "@",
]


@FUZZ
@given(
    edits=st.lists(
        st.tuples(st.integers(0, len(GOOD)), st.integers(0, 6), st.sampled_from(PIECES) | st.text(max_size=3)),
        min_size=1,
        max_size=6,
    )
)
def test_any_mutated_spec_raises_only_spec_errors(tmp_path: Path, edits: list[tuple[int, int, str]]) -> None:
    text = GOOD
    for start, length, piece in edits:
        text = text[:start] + piece + text[start + length :]
    survive(tmp_path, text.encode(errors="surrogatepass"))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["lora", "cpt", "auto", "x"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["kind", "rank", "a b"]), inner),
    max_leaves=6,
)


@FUZZ
@given(value=VALUES, key=st.sampled_from([*Pipeline.model_fields, "betas", "steps", "method", "extra"]))
def test_any_value_anywhere_raises_only_spec_errors(tmp_path: Path, value: Any, key: str) -> None:
    written = json.dumps(value).replace("NaN", ".nan").replace("Infinity", ".inf")
    inner = f"method: {{kind: full}}\n    train: {{{key}: {written}}}" if key in Train.model_fields else "method: {}"
    survive(tmp_path, f"{stage(inner)}{key}: {written}\n".encode())
