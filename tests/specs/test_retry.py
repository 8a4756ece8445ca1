"""What may be tried when gates refuse: changes of a stage, and what is wrong with one, at its line."""

from pathlib import Path

import pytest
import tiny

from specs.base import identity_fields
from specs.load import SpecError
from stages.job import Job, read_job, write_job
from stages.pipeline import Pipeline, load_pipeline

GATES = "    gates: [{metric: domain, improves_on: base, by: 1%}]\n"
HEAD = tiny.SPEC[: tiny.SPEC.index(GATES) + len(GATES)].count("\n") + 3  # the line of the first change


def load(folder: Path, changes: str, then: str = "") -> Pipeline:
    lines = "".join(f"        - {line}\n" for line in changes.splitlines())
    retry = f"    on_gate_failure:\n      retry:\n{lines}{then}"
    spec = folder / "spec.yaml"
    spec.write_text(tiny.SPEC.replace(GATES, GATES + retry))
    return load_pipeline(spec)[0]


def told(folder: Path, changes: str) -> list[str]:
    with pytest.raises(SpecError) as caught:
        load(folder, changes)
    found = [str(problem).removeprefix(f"{folder}/spec.yaml:") for problem in caught.value.problems]
    return [line.replace("stages[0].on_gate_failure.retry", "retry") for line in found]


@pytest.mark.parametrize(
    ("change", "part", "field", "value", "words"),
    [
        ("train: {learning_rate: 1e-3}", "train", "learning_rate", 1e-3, "learning_rate 0.001"),
        ("train: {learning_rate: x0.5}", "train", "learning_rate", 2.5e-3, "learning_rate 0.0025"),
        ("train: {learning_rate: x.1}", "train", "learning_rate", 5e-4, "learning_rate 0.0005"),
        ("train: {max_steps: x2}", "train", "max_steps", 24, "max_steps 24"),
        ("train: {warmup_ratio: x2}", "train", "warmup_ratio", 0.1, "warmup_ratio 0.1"),  # of the default
        ("train: {max_steps: null, epochs: 2}", "train", "epochs", 2.0, "no max_steps, epochs 2.0"),
        ("train: {batch_size: null}", "train", "batch_size", 16, "batch_size 16"),
        ("train: {extra: {adam_beta2: 0.9}}", "train", "extra", {"adam_beta2": 0.9}, "adam_beta2 0.9"),
        ("method: {top_percent: x0.5}", "method", "top_percent", 25.0, "top_percent 25.0"),
        ("method: {kind: lora, rank: 8}", "method", "rank", 8, "kind lora, rank 8"),
    ],
)
def test_an_attempt_is_the_stage_as_written_but_for_what_the_change_names(tmp_path, change, part, field, value, words):
    stage = load(tmp_path, change).stages[0]
    first, second = stage.attempts()
    assert (first.number, first.of, first.words, first.stage) == (1, 2, "as written", stage)
    assert (second.number, second.of, second.words) == (2, 2, words)
    assert getattr(getattr(second.stage, part), field) == value
    other = {"method", "train"} - {part}
    assert all(getattr(second.stage, name) == getattr(stage, name) for name in (*other, "data", "gates", "name"))


def test_sources_are_changed_by_their_path_or_replaced(tmp_path):
    source = "data/corpus.jsonl"
    stage = load(tmp_path, f"data: {{{source}: {{weight: x2}}}}\ndata: [{{path: data/heldout.jsonl}}]").stages[0]
    _, more, other = stage.attempts()
    assert [(one.path, one.weight) for one in more.stage.data] == [(source, 2.0)]
    assert more.words == f"weight 2.0 of {source}"
    assert [one.path for one in other.stage.data] == ["data/heldout.jsonl"]
    assert other.words == "other data"
    _, moved = load(tmp_path, f"data: {{{source}: {{path: data/heldout.jsonl}}}}").stages[0].attempts()
    assert moved.words == f"path data/heldout.jsonl of {source}"
    assert [one.path for one in moved.stage.data] == ["data/heldout.jsonl"]


def test_more_replay_is_a_multiple_of_its_share(tmp_path):
    spec = tmp_path / "spec.yaml"
    load(tmp_path, "seed: 4")
    spec.write_text(
        spec.read_text()
        .replace("[{path: data/corpus.jsonl}]", "[{path: data/corpus.jsonl}, {path: data/heldout.jsonl, share: 0.1}]")
        .replace(
            "- seed: 4", "- data: {data/heldout.jsonl: {share: x2}}\n        - data: {data/heldout.jsonl: {share: x10}}"
        )
    )
    with pytest.raises(
        SpecError, match=r"retry\[1\].data\['data/heldout.jsonl'\].share: expected a number less than 1"
    ):
        load_pipeline(spec)
    spec.write_text(spec.read_text().replace("x10", "x3"))
    words = [one.words for one in load_pipeline(spec)[0].stages[0].attempts()]
    assert words == ["as written", "share 0.2 of data/heldout.jsonl", "share 0.3 of data/heldout.jsonl"]


def test_changes_are_made_to_the_stage_as_written_and_do_not_add_up(tmp_path):
    stage = load(tmp_path, "train: {learning_rate: x0.5}\ntrain: {weight_decay: 0.1}\nseed: 4").stages[0]
    rates = [(one.stage.train.learning_rate, one.stage.train.weight_decay, one.stage.seed) for one in stage.attempts()]
    assert rates == [(5e-3, 0.0, None), (2.5e-3, 0.0, None), (5e-3, 0.1, None), (5e-3, 0.0, 4)]


@pytest.mark.parametrize(("then", "policy"), [("", "stop"), ("      then: warn\n", "warn")])
def test_in_the_end_it_is_as_then_says(tmp_path, then, policy):
    stage = load(tmp_path, "seed: 4", then).stages[0]
    assert [one.stage.policy for one in stage.attempts()] == [policy, policy]
    assert [len(one.stage.changes) for one in stage.attempts()] == [1, 0]


def test_attempts_that_are_planned_do_not_change_what_a_stage_is(tmp_path):
    plain = load_pipeline(tiny_spec(tmp_path))[0].stages[0]
    assert identity_fields(load(tmp_path, "seed: 4").stages[0]) == identity_fields(plain)


def tiny_spec(folder: Path) -> Path:
    spec = folder / "plain.yaml"
    spec.write_text(tiny.SPEC)
    return spec


def test_a_job_tells_its_process_the_attempt_and_nothing_that_was_not_given(tmp_path):
    pipeline = load(tmp_path, "train: {max_steps: null, epochs: 2}")
    chosen = pipeline.with_stages([pipeline.stages[0].attempts()[1].stage])
    job = Job(
        kind="stage", pipeline=chosen, folder="f", name="knowledge", identity={}, target="t", work="w", start=None,
        make=True, measurements=(),
    )  # fmt: skip
    write_job(job, tmp_path / "job.json")
    again = read_job(tmp_path / "job.json").stage
    assert (again.train.max_steps, again.train.epochs) == (None, 2.0)
    assert again == chosen.stages[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("train: {learning_rat: 1}", "retry[0].train.learning_rat: unknown key; did you mean 'learning_rate'?"),
        ("train: {learning_rate: x0}", "retry[0].train.learning_rate: expected a number greater than 0, found 0.0"),
        ("train: {learning_rate: half}", "retry[0].train.learning_rate: expected a number, found 'half'"),
        ("train: {learning_rate: x-1}", "retry[0].train.learning_rate: expected a number, found 'x-1'"),
        ("train: {learning_rate: null}", "retry[0].train.learning_rate: missing"),
        ("train: {epochs: 2}", "retry[0].train: give either epochs or max_steps"),
        ("train: {epochs: x2}", "retry[0].train.epochs: x2 multiplies a number, and the stage has none here"),
        (
            f"train: {{learning_rate: x{'9' * 400}}}",
            "retry[0].train.learning_rate: x9999999999999999999… makes a number",
        ),
        (
            f"train: {{batch_size: x{'9' * 5000}}}",
            "retry[0].train.batch_size: x9999999999999999999 makes a whole number of 4 that is too large",
        ),
        ("train: {batch_size: x0.3}", "retry[0].train.batch_size: x0.3 makes 1.2 of 4, and it must be a whole number"),
        ("method: {rank: 4}", "retry[0].method.rank: unknown key; allowed: kind, top_percent"),
        ("method: {kind: lorra}", "retry[0].method.kind: unknown method 'lorra'; did you mean 'lora'?"),
        ("method: {kind: bottleneck}", "retry[0].method.kind: what method bottleneck trains cannot be merged"),
        ("data: {data/corpu.jsonl: {weight: 2}}", "retry[0].data['data/corpu.jsonl']: no source of the stage is"),
        (
            "data: {data/corpus.jsonl: {weight: x200}}",
            "retry[0].data['data/corpus.jsonl'].weight: expected a number less than or equal to 100, found 200.0",
        ),
        ("data: [{path: data/x.pdf}]", "retry[0].data[0]: cannot tell the format of 'data/x.pdf'"),
        ("seed: 3", "retry[0]: makes the same of the stage as the stage as written; change something else"),
        ("train: {learning_rate: x1}", "retry[0]: makes the same of the stage as the stage as written"),
        ("train: {checkpoint_every: 3}", "retry[0]: makes the same of the stage as the stage as written"),
        ("{}", "retry[0]: changes nothing: name fields of method, data, train, seed"),
        ("kind: ift", "retry[0].kind: unknown key"),
        ("gates: []", "retry[0].gates: unknown key"),
    ],
)
def test_a_change_that_makes_no_stage_is_told_at_its_line(tmp_path, change, message):
    (line,) = told(tmp_path, change)
    assert line.startswith(f"{HEAD}:")
    assert line.partition(": ")[2].startswith(message)


def test_every_change_that_is_wrong_is_told_at_once(tmp_path):
    found = told(tmp_path, "train: {epochs: 2}\nseed: 4\nseed: 4\nmethod: {rank: 4}")
    assert [line.partition(":")[0] for line in found] == [str(HEAD), str(HEAD + 2), str(HEAD + 3)]
    assert "makes the same of the stage as change 2" in found[1]


def test_where_nothing_refuses_nothing_is_tried_again(tmp_path):
    spec = tmp_path / "spec.yaml"
    spec.write_text(tiny.SPEC.replace(GATES, "    on_gate_failure: {retry: [{seed: 4}]}\n"))
    with pytest.raises(
        SpecError, match=r"on_gate_failure: nothing refuses this stage: retry goes with gates; add some"
    ):
        load_pipeline(spec)


def test_attempts_whose_shared_doubt_no_resample_can_tell_are_refused(tmp_path):
    changes = "\n".join(f"seed: {number}" for number in range(4, 9))
    spec = tmp_path / "spec.yaml"
    load(tmp_path, changes)
    spec.write_text(spec.read_text().replace("by: 1%}", "by: 1%, confidence: 0.999}"))
    with pytest.raises(SpecError, match=r"6 attempts share the doubt of 99.9%, and each would be judged at 99.9833%"):
        load_pipeline(spec)
