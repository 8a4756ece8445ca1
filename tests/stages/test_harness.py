"""The harness's tasks: generation, few-shot, filters, groups; every result kept; what its own command line finds."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from specs.metric import LmEvalSpec
from stages.metrics import harness
from stages.metrics.results import BLOCKS, ONE_BY_ONE, measure_name, measures_of

ANSWER = """\
task: tiny_answers
dataset_path: json
dataset_kwargs: {data_files: {test: answers.jsonl, train: answers.jsonl}}
test_split: test
fewshot_split: train
output_type: generate_until
doc_to_text: "{{prompt}}\\nA:"
doc_to_target: " {{completion}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 6, do_sample: false}
filter_list:
  - name: first-word
    filter: [{function: regex, regex_pattern: "(\\\\w+)"}, {function: take_first}]
  - name: whole
    filter: [{function: take_first}]
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true, ignore_case: true}
  - {metric: chrf, aggregation: chrf, higher_is_better: true}
metadata: {version: 2.0}
"""
ROLLING = """\
task: tiny_text
dataset_path: json
dataset_kwargs: {data_files: {test: texts.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: text
metric_list:
  - {metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
  - {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}
metadata: {version: 1.0}
"""


def write_tasks(folder: Path) -> None:
    tiny.write_data(folder)
    chats = [json.loads(line)["messages"] for line in (folder / "data/instructions.jsonl").read_text().splitlines()]
    rows = [{"prompt": question["content"], "completion": answer["content"]} for question, answer in chats[:10]]
    tiny.write_rows(folder / "tasks/answers.jsonl", rows)
    tiny.write_rows(folder / "tasks/texts.jsonl", [{"text": text} for text in tiny.sentences(6, 9)])
    (folder / "tasks/answers.yaml").write_text(ANSWER)
    (folder / "tasks/text.yaml").write_text(ROLLING)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    write_tasks(folder)
    return folder


@pytest.fixture(scope="module")
def measure(base_model, folder):
    import torch

    from stages.model import load_plain, load_tokenizer

    model, tokenizer = load_plain(base_model, torch.float32).eval(), load_tokenizer(base_model)

    def run(*, chat_template: bool = False, **fields):
        given = {"kind": "lm_eval", "task": "tasks/answers.yaml", "metric": "exact_match", "sequence_length": 256}
        spec = LmEvalSpec.model_validate(given | fields)
        return harness.measure(spec, folder, model, tokenizer, chat_template=chat_template)

    return run


@pytest.mark.model
def test_a_generation_task_is_measured_with_every_filter_and_every_example(measure):
    measures, shown = measure()
    assert set(measures) == {
        f"{metric}{name}" for metric in ("exact_match", "chrf") for name in ("", "_first_word", "_whole")
    }
    for name, found in measures.items():
        assert len(found.numerators) == found.n == 10, name
        assert math.fsum(found.numerators) / 10 == pytest.approx(found.value), name
        assert found.standard_error is not None
    assert measures["exact_match"] == measures["exact_match_first_word"]
    assert shown == {"task": "tiny_answers", "version": 2.0, "few_shot": 0}


@pytest.mark.model
def test_a_filter_is_named_as_the_harness_does(measure):
    measures, _ = measure(metric="exact_match,whole", limit=3)
    assert measures["exact_match_whole"].n == 3


@pytest.mark.model
@pytest.mark.parametrize(("given", "wanted"), [({}, 0), ({"few_shot": 2}, 2)])
def test_as_many_examples_stand_before_a_question_as_are_asked_for(given, wanted, measure, monkeypatch):
    from lm_eval.models.huggingface import HFLM

    asked = []
    plain = HFLM.generate_until
    monkeypatch.setattr(
        HFLM, "generate_until", lambda self, requests, **_: (asked.extend(requests), plain(self, requests))[1]
    )
    _, shown = measure(limit=2, **given)
    assert [request.args[0].count("\nA:") for request in asked] == [wanted + 1] * 2
    assert shown["few_shot"] == wanted


@pytest.mark.model
def test_few_shot_examples_and_question_are_one_users_turn_in_a_chat(measure, monkeypatch):
    from lm_eval.models.huggingface import HFLM

    asked = []
    plain = HFLM.generate_until
    monkeypatch.setattr(
        HFLM, "generate_until", lambda self, requests, **_: (asked.extend(requests), plain(self, requests))[1]
    )
    measure(limit=1, few_shot=1, chat_template=True)
    assert asked[0].args[0].startswith("<|im_start|>user\n")
    assert asked[0].args[0].endswith("<|im_start|>assistant\n")


@pytest.mark.model
def test_a_task_says_how_many_examples_it_wants(measure, folder):
    (folder / "tasks/two.yaml").write_text(ANSWER + "num_fewshot: 2\n")
    assert measure(task="tasks/two.yaml", limit=1)[1]["few_shot"] == 2


@pytest.mark.model
def test_rows_that_cannot_be_read_are_told(measure, folder):
    from stages.errors import InvalidInput

    (folder / "tasks/broken.yaml").write_text(ANSWER.replace("test_split: test", "test_split: nowhere"))
    with pytest.raises(InvalidInput, match=r"task tiny_answers: "):
        measure(task="tasks/broken.yaml")


@pytest.mark.model
def test_a_measure_that_is_no_mean_is_taken_apart(measure):
    measures, _ = measure(task="tasks/text.yaml", metric="bits_per_byte")
    bits, words = measures["bits_per_byte"], measures["word_perplexity"]
    assert bits.value == pytest.approx(sum(bits.numerators) / sum(bits.weights))
    assert (bits.n, words.n, bits.better, words.better) == (6, 6, "lower", "lower")
    assert words.standard_error > 0
    assert sum(words.numerators) / 6 == pytest.approx(words.value)


# What the harness's own command line finds on the released model


@pytest.mark.model
def test_the_harness_by_itself_finds_on_the_release_what_was_recorded(tmp_path, run_spec):
    head, _, stages = tiny.SPEC.partition("stages:")
    one_stage = stages.partition("  - name: answers")[0].replace("[{metric: domain, improves_on: base, by: 1%}]", "[]")
    metrics = "".join(
        f"  {name}: {{kind: lm_eval, task: tasks/{name}.yaml, metric: {metric}, sequence_length: 128, batch_size: 4}}\n"
        for name, metric in (("qa", "acc"), ("answers", "exact_match"), ("text", "bits_per_byte"))
    )
    dtyped = head.partition("metrics:")[0].replace("float32", "bfloat16")
    spec = tiny.write_project(tmp_path / "p", f"{dtyped}metrics:\n{metrics}stages:{one_stage}")
    write_tasks(spec.parent)
    plan = run_spec(spec)
    release = plan.steps[-1].artifact
    command = [
        *(sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu", "--batch_size", "4"),
        *("--model_args", f"pretrained={release.model},dtype=auto,max_length=128"),
        *("--tasks", "tiny_qa,tiny_answers,tiny_text", "--include_path", str(spec.parent / "tasks")),
        *("--output_path", str(tmp_path / "found")),
    ]
    done = subprocess.run(
        command, cwd=spec.parent / "tasks", capture_output=True, text=True, check=False, timeout=240, env=os.environ
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (file,) = (tmp_path / "found").rglob("results_*.json")
    by_itself = json.loads(file.read_text())["results"]
    compared = 0
    for metric, task in (("qa", "tiny_qa"), ("answers", "tiny_answers"), ("text", "tiny_text")):
        measures = plan.steps[1].evaluation(metric).measures
        for key, value in by_itself[task].items():
            if "," in key and "_stderr" not in key:
                assert measures[measure_name(key)].value == value, (metric, key)
                compared += 1
    assert compared == 8


# Results that the harness could give


def results_of(parts: dict[str, list], value: float, metric: str = "acc", name: str = "group") -> dict:
    samples = {task: [{"filter": "none", metric: item} for item in items] for task, items in parts.items()}
    return {
        "results": {name: {f"{metric},none": value, f"{metric}_stderr,none": "N/A", "alias": name}},
        "higher_is_better": {name: {metric: True}},
        "samples": samples,
    }


class Task:
    """A task as far as results ask it."""

    def __init__(self, **aggregations):
        self._aggregations = aggregations

    def aggregation(self):
        return self._aggregations


PARTS = {"a": [1, 0, 1, 1], "b": [0, 0]}


@pytest.mark.parametrize("value", [0.5, 0.375], ids=["by examples", "by tasks"])
def test_a_group_keeps_the_examples_of_its_tasks(value):
    found = measures_of(results_of(PARTS, value), "group", dict.fromkeys(PARTS, Task()))["acc"]
    assert (found.value, found.n) == (value, 6)
    assert sum(found.numerators) / sum(found.weights) == pytest.approx(value)


def test_a_group_whose_value_is_another_mean_has_no_examples():
    found = measures_of(results_of(PARTS, 0.9), "group", dict.fromkeys(PARTS, Task()))["acc"]
    assert (found.value, found.standard_error, found.numerators) == (0.9, None, ())


def test_an_example_without_a_result_weighs_nothing():
    found = measures_of(results_of({"a": [1, None, 0]}, 0.5), "group", {"a": Task()})["acc"]
    assert found.weights == (1, 0, 1)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_is_not_kept(value):
    assert measures_of(results_of(PARTS, value), "group", dict.fromkeys(PARTS, Task())) == {}


def test_a_large_set_is_taken_apart_in_blocks():
    items = [float(n // 50) for n in range(ONE_BY_ONE + 40)]  # neighbours are alike

    def root(values):
        return math.sqrt(sum(values) / len(values))

    found = measures_of(results_of({"t": items}, root(items), "root", "t"), "t", {"t": Task(root=root)})["root"]
    mean, n = sum(items) / len(items), len(items)
    spread = math.sqrt(sum((one - mean) ** 2 for one in items) / n / (n - 1))
    assert found.standard_error == pytest.approx(spread / (2 * root(items)), rel=3 / math.sqrt(BLOCKS))
    assert (found.n, found.numerators) == (n, ())


def test_names_of_the_harness_as_gates_write_them():
    names = {"chrf++": "chrfpp", "pass@1": "pass_at_1", "exact_match,strict-match": "exact_match_strict_match"}
    names |= {"acc,none": "acc", "Rouge-L": "rouge_l"}
    for theirs, ours in names.items():
        assert measure_name(theirs) == ours
        assert re.fullmatch(r"[a-z0-9_]+", ours)


def test_the_measures_of_a_task_file_are_known_beforehand(folder):
    spec = LmEvalSpec(kind="lm_eval", task="tasks/answers.yaml", metric="exact_match")
    known = harness.measure_names(spec, folder)
    assert known == (
        *("exact_match", "chrf", "exact_match_first_word", "exact_match_whole", "chrf_first_word", "chrf_whole"),
    )
