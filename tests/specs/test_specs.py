import importlib.util
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any, get_args

import pytest
from methods_table import KINDS, METHODS
from pydantic import BaseModel

from specs.base import Spec, fingerprint, identity_fields
from specs.data import DataLimits, DataSpec
from specs.gate import GateSpec, share
from specs.load import SpecError, load
from specs.metric import EndpointSpec, JudgeSpec, LmEvalSpec, PerplexitySpec, PreferenceSpec
from specs.model import ModelSpec
from specs.train import SMOOTHED_LOSSES, CptTrainSpec, DpoLoss, DpoTrainSpec, IftTrainSpec, TrainSpec
from stages.methods.base import MethodSpec
from stages.objective import ObjectiveSpec
from stages.pipeline import Pipeline, load_pipeline

COMMIT = "0123456789abcdef0123456789abcdef01234567"

# Every model of the grammar and of the stages stands here, so that a walk over it sees every field.
FULL = f"""\
name: full
model: {{hub: org/base, revision: {COMMIT}, dtype: float16, chat_template: chat.jinja}}
seed: 3
metrics: {{domain: {{kind: perplexity, data: {{path: data/heldout.jsonl}}, sequence_length: 128}},
  pairs: {{kind: preference, data: {{path: data/pairs.jsonl}}, beta: 0.2}},
  samples: {{kind: generation, data: {{path: data/chats.jsonl}}, temperature: 0.7, top_p: 0.9, chat_template: [base]}},
  qa: {{kind: lm_eval, task: arc_easy, limit: 7, few_shot: 1, chat_template: [base, answers]}}, taste: {{kind: judge, answers: samples, endpoint: {{url: "http://[::1]/v1", model: m}}}} }}
stages:
  - name: knowledge
    kind: cpt
    method: {{kind: spectrum, top_percent: 50}}
    data:
      - {{path: data/corpus.jsonl, columns: {{text: body}}, weight: 2}}
      - {{hub: org/corpus, revision: {COMMIT}, files: "data/*.parquet"}}
    train: {{learning_rate: 1e-4, epochs: 2, document_end: <eod>, extra: {{group_by_length: true}}}}
    seed: 5
    gates:
      - {{metric: domain, improves_on: base, by: 5%}}
      - {{metric: qa.acc_norm, keeps: previous, within: 0.02}}
  - name: answers
    kind: ift
    method: {{kind: lora, rank: 4, alpha: 8, target_modules: [q_proj]}}
    data: [{{path: data/chats.jsonl}}]
    train: {{learning_rate: 1e-4, max_steps: 12}}
  - name: manner
    kind: dpo
    method: {{kind: qlora, rank: 4}}
    data: [{{path: data/pairs.jsonl}}]
    train: {{learning_rate: 1e-6, max_steps: 12, loss: robust, label_smoothing: 0.1}}
    gates: [{{metric: pairs, at_least: 0.6}}]
    on_gate_failure: {{retry: [{{train: {{learning_rate: x0.5}}}}], then: warn}}
  - name: polish
    kind: ift
    method: {{kind: full}}
    data: [{{path: data/chats.jsonl}}]
    train: {{learning_rate: 1e-4, max_steps: 12}}
release: {{gates: [{{metric: domain, at_most: 3}}], metrics: [qa], limit: 500, on_gate_failure: warn}}
"""  # noqa: E501

# What may change without a result changing. A field that joins this list must not alter what a stage computes.
NAME_ONLY = {
    "StageSpec.name": "a label",
    "PipelineSpec.release": "judges the released model, which is what it is",
    "ModelSpec.license": "stands in the model card",
    "ModelSpec.origin": "stands in the model card",
    "StageSpec.seed": "the plan puts the seed that is used in its place",
    "StageSpec.gates": "judges, never trains",
    "StageSpec.on_gate_failure": "judges, never trains",
    "JudgeSpec.answers": "the evaluations that are compared are named by what identifies them",
    "JudgeSpec.against": "the evaluations that are compared are named by what identifies them",
    "EndpointSpec.key": "who pays, not what is answered",
    "EndpointSpec.concurrency": "how fast, not what is answered",
    "EndpointSpec.timeout": "how patient, not what is answered",
    "EndpointSpec.retries": "how patient, not what is answered",
    "StageSpec.data_limits": "refuses a stage or not; what it trains on is the same",
    "TrainSpec.checkpoint_every": "resuming gives the same result",
    "TrainSpec.keep_checkpoints": "disk space",
    "DataSpec.path": "the plan puts the content in its place",
    "DataSpec.max_bad_rows": "refuses a source or not; the rows that are left are the same",
}


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "spec.yaml"
    path.write_text(text)
    return path


def full(tmp_path: Path) -> Pipeline:
    return load_pipeline(write(tmp_path, FULL))[0]


def refusals(tmp_path: Path, model: type[BaseModel], text: str) -> list[str]:
    path = write(tmp_path, text)
    with pytest.raises(SpecError) as caught:
        load(path, model)
    return [str(problem).removeprefix(f"{path}:") for problem in caught.value.problems]


def pipeline_refusals(tmp_path: Path, text: str) -> list[str]:
    path = write(tmp_path, text)
    with pytest.raises(SpecError) as caught:
        load_pipeline(path)
    return [str(problem).removeprefix(f"{path}:") for problem in caught.value.problems]


HUB_ID = "expected an id on the hub, owner/name"
HEX = "expected a commit, 40 hex digits (a branch or tag may mean something else tomorrow)"
ONE_RULE = "a gate has one of at_least, at_most, improves_on, keeps; found"
AMOUNT = "or a percentage such as 5%"
BASIC = "learning_rate: 1, epochs: 1"

REFUSED: dict[str, tuple[type[BaseModel], str, list[str]]] = {
    "no model": (ModelSpec, "{}", ["1:1: a model is one of path, gguf or hub; found none of them"]),
    "two models": (
        ModelSpec,
        "{path: a, gguf: b}",
        ["1:1: a model is one of path, gguf or hub; found path and gguf"],
    ),
    "hub without revision": (
        ModelSpec,
        "{hub: a/b}",
        ["1:1: hub and revision go together: the revision is the commit, 40 hex digits"],
    ),
    "revision without hub": (
        ModelSpec,
        f"{{path: a, revision: {COMMIT}}}",
        ["1:1: hub and revision go together: the revision is the commit, 40 hex digits"],
    ),
    "hub id without owner": (ModelSpec, f"{{hub: a, revision: {COMMIT}}}", [f"1:7: hub: {HUB_ID}, found 'a'"]),
    "branch as revision": (
        ModelSpec,
        "{hub: a/b, revision: main}",
        [f"1:22: revision: {HEX}, found 'main'"],
    ),
    "unknown dtype": (
        ModelSpec,
        "{path: a, dtype: float33}",
        ["1:18: dtype: expected 'float32', 'bfloat16' or 'float16', found 'float33'; did you mean 'float32'?"],
    ),
    "no source": (DataSpec, "{}", ["1:1: a source is either path or hub"]),
    "two sources": (DataSpec, "{path: a.txt, hub: a/b}", ["1:1: a source is either path or hub"]),
    "hub source without files": (
        DataSpec,
        f"{{hub: a/b, revision: {COMMIT}}}",
        ["1:1: a hub source needs its revision (the commit, 40 hex digits) and files (a glob)"],
    ),
    "hub source without revision": (
        DataSpec,
        "{hub: a/b, files: x}",
        ["1:1: a hub source needs its revision (the commit, 40 hex digits) and files (a glob)"],
    ),
    "files above the dataset": (
        DataSpec,
        f"{{hub: a/b, revision: {COMMIT}, files: data/../../*.txt}}",
        ["1:1: files 'data/../../*.txt' leads out of the dataset; write a glob within it, data/*.parquet"],
    ),
    "files of this machine": (
        DataSpec,
        f"{{hub: a/b, revision: {COMMIT}, files: /etc/*.txt}}",
        ["1:1: files '/etc/*.txt' leads out of the dataset; write a glob within it, data/*.parquet"],
    ),
    "files beside path": (
        DataSpec,
        "{path: a.txt, files: x}",
        ["1:1: revision and files go with hub, not with path"],
    ),
    "revision beside path": (
        DataSpec,
        f"{{path: a.txt, revision: {COMMIT}}}",
        ["1:1: revision and files go with hub, not with path"],
    ),
    "unknown format": (
        DataSpec,
        "{path: a.json}",
        ["1:1: cannot tell the format of 'a.json'; allowed endings: .jsonl, .txt, .parquet, .csv"],
    ),
    "weight of nothing": (
        DataSpec,
        "{path: a.txt, weight: 0}",
        ["1:23: weight: expected a number greater than 0, found 0"],
    ),
    "weight too large": (
        DataSpec,
        "{path: a.txt, weight: 101}",
        ["1:23: weight: expected a number less than or equal to 100, found 101"],
    ),
    "column that is no name": (
        DataSpec,
        "{path: a.txt, columns: {text: 1}}",
        ["1:31: columns.text: expected text, found 1"],
    ),
    "limit of bad rows without leave to drop any": (
        DataSpec,
        "{path: a.txt, max_bad_rows: 3}",
        ["1:1: max_bad_rows goes with on_bad_row: drop; add that, or remove max_bad_rows"],
    ),
    "more than all rows": (
        DataSpec,
        "{path: a.txt, on_bad_row: drop, max_bad_rows: 100.5%}",
        ["1:1: max_bad_rows 100.5% is more than all rows; 100% are the most"],
    ),
    "no bad row to drop": (
        DataSpec,
        "{path: a.txt, on_bad_row: drop, max_bad_rows: 0}",
        ["1:47: max_bad_rows: expected a number greater than 0 or text, found 0"],
    ),
    "unknown way with bad rows": (
        DataSpec,
        "{path: a.txt, on_bad_row: skip}",
        ["1:27: on_bad_row: expected 'fail' or 'drop', found 'skip'"],
    ),
    "a day that no calendar has": (
        ModelSpec,
        "{path: a, template_date: 2026-02-30}",
        [
            "1:26: template_date: expected a valid date in the format YYYY-MM-DD, day value is outside expected "
            "range, found '2026-02-30'"
        ],
    ),
    "code without a digest": (
        ModelSpec,
        "{path: a, allow_remote_code: true}",
        ["1:30: allow_remote_code: expected text, found true"],
    ),
    "code of a GGUF file": (
        ModelSpec,
        f"{{gguf: a.gguf, allow_remote_code: {'0a' * 32}}}",
        ["1:1: allow_remote_code goes with path or hub: a GGUF file brings no code; remove it"],
    ),
    "no length of training": (TrainSpec, "{learning_rate: 1}", ["1:1: give either epochs or max_steps"]),
    "two lengths of training": (
        TrainSpec,
        "{learning_rate: 1, epochs: 1, max_steps: 1}",
        ["1:1: give either epochs or max_steps"],
    ),
    "no learning rate": (TrainSpec, "{epochs: 1}", ["1:1: learning_rate: missing; Peak learning rate"]),
    "micro batch that does not divide": (
        TrainSpec,
        f"{{{BASIC}, batch_size: 6, micro_batch_size: 4}}",
        ["1:1: micro_batch_size 4 does not divide batch_size 6"],
    ),
    "micro batch above the batch": (
        TrainSpec,
        f"{{{BASIC}, batch_size: 2, micro_batch_size: 4}}",
        ["1:1: micro_batch_size 4 does not divide batch_size 2"],
    ),
    "one checkpoint": (
        TrainSpec,
        f"{{{BASIC}, keep_checkpoints: 1}}",
        ["1:49: keep_checkpoints: expected a number greater than or equal to 2, found 1"],
    ),
    "unknown optimizer": (
        TrainSpec,
        f"{{{BASIC}, optimizer: adamw8bit}}",
        [
            "1:42: optimizer: expected 'adamw', 'adamw_8bit', 'paged_adamw', 'paged_adamw_8bit', 'adafactor' "
            "or 'sgd', found 'adamw8bit'; did you mean 'adamw_8bit'?"
        ],
    ),
    "unknown key": (
        IftTrainSpec,
        f"{{{BASIC}, pakcing: true}}",
        [f"1:31: pakcing: unknown key; did you mean 'packing'? allowed: {', '.join(IftTrainSpec.model_fields)}"],
    ),
    "packing of instructions is on or off": (
        IftTrainSpec,
        f"{{{BASIC}, packing: split}}",
        ["1:40: packing: expected true or false, found 'split'"],
    ),
    "packing of text is a strategy": (
        CptTrainSpec,
        f"{{{BASIC}, packing: true}}",
        ["1:40: packing: expected 'split', 'wrapped' or 'none', found true"],
    ),
    "exo_pair without smoothing": (
        DpoTrainSpec,
        f"{{{BASIC}, loss: exo_pair}}",
        ["1:1: loss exo_pair needs label_smoothing above 0, for example 1e-3"],
    ),
    "smoothing where it has no effect": (
        DpoTrainSpec,
        f"{{{BASIC}, label_smoothing: 0.1}}",
        ["1:1: label_smoothing has no effect on loss sigmoid: remove it"],
    ),
    "half of the labels flipped": (
        DpoTrainSpec,
        f"{{{BASIC}, loss: robust, label_smoothing: 0.5}}",
        ["1:62: label_smoothing: expected a number less than 0.5, found 0.5"],
    ),
    "no rule": (GateSpec, "{metric: a}", [f"1:1: {ONE_RULE} none of them"]),
    "two rules": (
        GateSpec,
        "{metric: a, at_least: 1, keeps: base}",
        [f"1:1: {ONE_RULE} at_least and keeps"],
    ),
    "by without improves_on": (
        GateSpec,
        "{metric: a, keeps: base, by: 1}",
        ["1:1: by goes with improves_on"],
    ),
    "by of nothing without improves_on": (
        GateSpec,
        "{metric: a, keeps: base, by: 0%}",
        ["1:1: by goes with improves_on"],
    ),
    "within without keeps": (
        GateSpec,
        "{metric: a, improves_on: base, within: 5%}",
        ["1:1: within goes with keeps"],
    ),
    "negative amount": (
        GateSpec,
        "{metric: a, improves_on: base, by: -1}",
        ["1:36: by: expected a number greater than or equal to 0 or text, found -1"],
    ),
    "amount that is no percentage": (
        GateSpec,
        "{metric: a, improves_on: base, by: five}",
        [f"1:36: by: expected a number {AMOUNT}, found 'five'"],
    ),
    "confidence of a coin": (
        GateSpec,
        "{metric: a, at_least: 1, confidence: 0.5}",
        ["1:38: confidence: expected a number greater than 0.5, found 0.5"],
    ),
    "confidence beyond what a bootstrap can tell": (
        GateSpec,
        "{metric: a, at_least: 1, confidence: 1}",
        ["1:38: confidence: expected a number less than or equal to 0.999, found 1"],
    ),
    "share and weight": (
        DataSpec,
        "{path: a.csv, share: 0.1, weight: 2}",
        ["1:1: share and weight exclude one another: share says how much of the stage, weight how often"],
    ),
    "share of everything": (
        DataSpec,
        "{path: a.csv, share: 1}",
        ["1:22: share: expected a number less than 1, found 1"],
    ),
    "share as a percentage": (DataSpec, "{path: a.csv, share: 10%}", ["1:22: share: expected a number, found '10%'"]),
    "limit of more than all": (
        DataLimits,
        "{overlap: 101%}",
        ["1:1: overlap 101% is more than all rows; 100% are the most"],
    ),
    "limit that is neither": (
        DataLimits,
        "{duplicates: 0.05}",
        ["1:14: duplicates: expected a whole number or text, found 0.05"],
    ),
    "confidence as a percentage": (
        GateSpec,
        "{metric: a, at_least: 1, confidence: 95%}",
        ["1:38: confidence: expected a number, found '95%'"],
    ),
    "standard errors, as gates had them once": (
        GateSpec,
        "{metric: a, at_least: 1, standard_errors: 2}",
        [
            "1:1: standard_errors is now confidence, 0.95 where a gate does not say: write `confidence: 0.977` for 2 "
            "standard errors, `confidence: null` for 0"
        ],
    ),
    "metric that is no name": (
        GateSpec,
        "{metric: a.b.c, at_least: 1}",
        [
            "1:10: metric: expected the name of a metric, or name.measure, found 'a.b.c'",
        ],
    ),
    "infinite threshold": (
        GateSpec,
        "{metric: a, at_least: -.inf}",
        ["1:23: at_least: expected a finite number, found -.inf"],
    ),
    "chat template that is neither": (
        LmEvalSpec,
        "{kind: lm_eval, task: a, chat_template: base}",
        ["1:41: chat_template: expected true or false or a list, found 'base'"],
    ),
    "negative examples": (
        LmEvalSpec,
        "{kind: lm_eval, task: a, few_shot: -1}",
        ["1:36: few_shot: expected a number greater than or equal to 0, found -1"],
    ),
    "no rows": (
        LmEvalSpec,
        "{kind: lm_eval, task: a, limit: 0}",
        ["1:33: limit: expected a number greater than 0, found 0"],
    ),
    "preference without pull": (
        PreferenceSpec,
        "{kind: preference, data: {path: a.csv}, beta: 0}",
        ["1:47: beta: expected a number greater than 0, found 0"],
    ),
    "perplexity without data": (
        PerplexitySpec,
        "{kind: perplexity}",
        ["1:1: data: missing; Held-out rows: `text`, or `messages`, `prompt` and `completion`, or Alpaca columns"],
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_part_that_makes_no_sense_is_refused_with_its_reason(tmp_path: Path, name: str) -> None:
    model, text, expected = REFUSED[name]
    assert refusals(tmp_path, model, text) == expected


POSITIVE = {
    TrainSpec: ("learning_rate", "epochs", "max_steps", "max_grad_norm", "checkpoint_every"),
    CptTrainSpec: ("sequence_length", "batch_size", "micro_batch_size"),
    DpoTrainSpec: ("beta",),
    PerplexitySpec: ("sequence_length", "batch_size"),
    PreferenceSpec: ("beta", "sequence_length", "batch_size"),
    LmEvalSpec: ("limit", "sequence_length", "batch_size"),
    JudgeSpec: ("limit", "sequence_length", "batch_size"),
    EndpointSpec: ("concurrency", "timeout"),
}
NOT_NEGATIVE = {
    TrainSpec: ("warmup_ratio", "weight_decay"),
    DpoTrainSpec: ("label_smoothing",),
    LmEvalSpec: ("few_shot",),
    EndpointSpec: ("retries",),
}


@pytest.mark.parametrize(
    ("model", "name", "value", "bound"),
    [(model, name, 0, "greater than 0") for model, names in POSITIVE.items() for name in names]
    + [(model, name, -1, "greater than or equal to 0") for model, names in NOT_NEGATIVE.items() for name in names]
    + [(TrainSpec, "warmup_ratio", 1, "less than 1")],
)
def test_numbers_have_bounds(tmp_path: Path, model: type[BaseModel], name: str, value: int, bound: str) -> None:
    found = refusals(tmp_path, model, f"{name}: {value}\n")
    assert f"1:{len(name) + 3}: {name}: expected a number {bound}, found {value}" in found


ACCEPTED: dict[str, tuple[type[BaseModel], str]] = {
    "folder": (ModelSpec, "{path: base}"),
    "GGUF file": (ModelSpec, "{gguf: base.gguf}"),
    "hub model": (ModelSpec, f"{{hub: org/base-1.5_b, revision: {COMMIT}}}"),
    "glob": (DataSpec, "{path: 'data/**/*.parquet', weight: 100}"),
    "hub data": (DataSpec, f"{{hub: a/b, revision: {COMMIT}, files: '*'}}"),
    "share": (DataSpec, "{path: a.csv, share: 0.1}"),
    "limits": (DataLimits, "{duplicates: 5%, overlap: 0, truncated: 100 %, dropped: 12}"),
    "dropped rows, by number": (DataSpec, "{path: a.csv, on_bad_row: drop, max_bad_rows: 3}"),
    "dropped rows, by share": (DataSpec, "{path: a.csv, on_bad_row: drop, max_bad_rows: 0.5 %}"),
    "code and a day": (ModelSpec, f"{{path: a, template_date: 2026-01-05, allow_remote_code: {'0a' * 32}}}"),
    "whole number for a fraction": (TrainSpec, "{learning_rate: 1, epochs: 1, warmup_ratio: 0}"),
    "smoothed": (DpoTrainSpec, f"{{{BASIC}, loss: exo_pair, label_smoothing: 1e-3}}"),
    "robust without smoothing": (DpoTrainSpec, f"{{{BASIC}, loss: robust}}"),
    "percent with a blank": (GateSpec, "{metric: a-b.c_d, keeps: base, within: 0.5 %}"),
    "nothing": (GateSpec, "{metric: a, at_most: 0, by: 0, within: 0, confidence: null}"),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_a_part_that_makes_sense_is_accepted(tmp_path: Path, name: str) -> None:
    model, text = ACCEPTED[name]
    assert isinstance(load(write(tmp_path, text), model), model)


def test_specs_are_frozen_and_hold_documentation_of_every_field(tmp_path: Path) -> None:
    pipeline = full(tmp_path)
    with pytest.raises(ValueError, match="frozen"):
        pipeline.name = "other"
    bare = {
        f"{type(spec).__name__}.{name}"
        for _, spec in walk(pipeline)
        for name, field in type(spec).model_fields.items()
        if not field.description and name not in {"kind", "method", "train"}
    }
    assert not bare


def test_labels_of_sources() -> None:
    assert DataSpec(path="data/*.csv").label == "data/*.csv"
    assert DataSpec(hub="a/b", revision=COMMIT, files="x/*").label == "a/b@01234567/x/*"


def test_a_stage_without_a_seed_has_the_pipelines(tmp_path: Path) -> None:
    pipeline = full(tmp_path)
    assert [pipeline.seed_of(stage) for stage in pipeline.stages] == [5, 3, 3, 3]
    zero = pipeline.stages[0].model_copy(update={"seed": 0})
    assert pipeline.seed_of(zero) == 0


def test_how_many_rows_may_be_dropped() -> None:
    assert DataSpec(path="a.csv").droppable(1000) == 0
    assert DataSpec(path="a.csv", on_bad_row="drop").droppable(1099) == 10
    assert DataSpec(path="a.csv", on_bad_row="drop", max_bad_rows="0.07%").droppable(10_000) == 7
    assert DataSpec(path="a.csv", on_bad_row="drop", max_bad_rows=3).droppable(1) == 3


# Identity


Place = tuple[str | int, ...]


def walk(value: object, place: Place = ()) -> Iterator[tuple[Place, BaseModel]]:
    """Every model within a value, with its place."""
    if isinstance(value, BaseModel):
        yield place, value
        for name in type(value).model_fields:
            yield from walk(getattr(value, name), (*place, name))
    elif isinstance(value, tuple | dict):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from walk(item, (*place, key))


def replaced(value: Any, place: Place, new: object) -> Any:
    """A copy of a value with another one at a place; nothing is validated, so any value will do."""
    if not place:
        return new
    key, rest = place[0], place[1:]
    if isinstance(value, BaseModel):
        return value.model_copy(update={str(key): replaced(getattr(value, str(key)), rest, new)})
    if isinstance(value, dict):
        return value | {key: replaced(value[key], rest, new)}
    return tuple(replaced(item, rest, new) if number == key else item for number, item in enumerate(value))


def owner(model: type[BaseModel], name: str) -> str:
    """The class that declares a field, and the field."""
    return f"{[cls for cls in model.__mro__ if name in vars(cls).get('__annotations__', {})][-1].__name__}.{name}"


def steps(value: Any, place: Place) -> Iterator[str]:
    """The fields that a place leads through."""
    for part in place:
        if isinstance(value, BaseModel):
            yield owner(type(value), str(part))
        value = getattr(value, str(part)) if isinstance(value, BaseModel) else value[part]


def specs_of(cls: type[Spec]) -> set[type[Spec]]:
    return {cls}.union(*(specs_of(child) for child in cls.__subclasses__()))


def test_the_full_spec_holds_every_kind_of_spec(tmp_path: Path) -> None:
    seen = {type(spec) for _, spec in walk(full(tmp_path))}
    leaves = {
        cls
        for cls in specs_of(Spec)
        if not cls.__subclasses__()
        and (cls.__module__.startswith("specs.") or issubclass(cls, Pipeline | ObjectiveSpec | MethodSpec))
    }
    assert seen | set(KINDS.values()) == leaves


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.kind)
def test_every_field_of_a_method_is_part_of_an_identity(method) -> None:
    before = fingerprint(identity_fields(method))
    for name in type(method).model_fields:
        assert fingerprint(identity_fields(method.model_copy(update={name: "changed"}))) != before, name


def test_identity_changes_with_every_field_but_those_that_only_name(tmp_path: Path) -> None:
    pipeline = full(tmp_path)
    before = fingerprint(identity_fields(pipeline))
    silent: set[str] = set()
    for place, spec in walk(pipeline):
        hidden = any(step in NAME_ONLY for step in steps(pipeline, place))
        for name in type(spec).model_fields:
            field = owner(type(spec), name)
            changed = fingerprint(identity_fields(replaced(pipeline, (*place, name), "changed"))) != before
            assert changed == (field not in NAME_ONLY and not hidden), (*place, name)
            alone = fingerprint(identity_fields(spec.model_copy(update={name: "changed"})))
            if alone == fingerprint(identity_fields(spec)):
                silent.add(field)
    assert silent == set(NAME_ONLY)


def test_a_field_that_came_later_leaves_identities_as_they_were_until_it_is_set() -> None:
    bare = {"hub": None, "revision": None, "files": None, "columns": {}, "weight": 1.0}
    assert identity_fields(DataSpec(path="a.csv")) == bare
    assert identity_fields(DataSpec(path="a.csv", on_bad_row="drop")) == bare | {"on_bad_row": "drop"}
    assert identity_fields(DataSpec(path="a.csv", share=0.1)) == bare | {"share": 0.1}
    assert not {"template_date", "allow_remote_code"} & set(identity_fields(ModelSpec(path="a")))
    day = ModelSpec(path="a", template_date=date(2026, 1, 5))
    assert identity_fields(day)["template_date"] == "2026-01-05"


def test_identity_sees_lists_and_mappings_inside(tmp_path: Path) -> None:
    pipeline = full(tmp_path)
    before = fingerprint(identity_fields(pipeline))
    inside: list[tuple[Place, object]] = [
        (("stages", 0, "data"), pipeline.stages[0].data[::-1]),
        (("stages", 0, "data", 0, "columns", "text"), "content"),
        (("stages", 0, "train", "extra", "group_by_length"), False),
        (("stages", 1, "method", "target_modules"), ("k_proj",)),
        (("metrics", "qa", "chat_template"), ("base",)),
        (("stages",), pipeline.stages[:2]),
    ]
    after = {fingerprint(identity_fields(replaced(pipeline, place, new))) for place, new in inside}
    assert len(after | {before}) == len(inside) + 1


def test_identity_does_not_depend_on_how_a_spec_is_written(tmp_path: Path) -> None:
    train = load(write(tmp_path, "{learning_rate: 1, epochs: 2}"), TrainSpec)
    spelled = load(write(tmp_path, "{epochs: 2.0, learning_rate: 1.0, schedule: cosine}"), TrainSpec)
    assert identity_fields(train) == identity_fields(spelled)
    assert fingerprint(identity_fields(train)) == fingerprint(identity_fields(spelled))


def test_fingerprints_are_canonical() -> None:
    # The digest of '{"a":[1,null,true],"é":0.5}' by sha256sum: it must never change, or no stage is found again.
    expected = "98806af6c6a68d6074ed47a3568e65467515861a5ad0d7b2089b626c0ab6b680"
    assert fingerprint({"é": 0.5, "a": [1, None, True]}) == expected
    assert fingerprint({"a": (1, None, True), "é": 0.5}) == expected
    assert fingerprint({"b": {"y": 1, "x": 2}}) == fingerprint({"b": {"x": 2, "y": 1}})


def test_fingerprints_tell_values_apart() -> None:
    documents: list[Any] = [
        None,
        0,
        1,
        0.0,
        1.0,
        True,
        False,
        "",
        "0",
        "1",
        "null",
        [],
        {},
        [1],
        [[1]],
        ["1"],
        {"1": 1},
    ]
    documents += [{"a": None}, {"b": None}, 1e-4, 0.1, 0.1 + 1e-17 * 2, "é", "e\u0301", [1, 2], [2, 1]]
    assert len({fingerprint(document) for document in documents}) == len(documents)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_fingerprint_refuses_what_is_not_finite(value: float) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        fingerprint({"a": [value]})


@pytest.mark.parametrize("value", [{1}, b"a", Path("a"), object(), 1j])
def test_a_fingerprint_refuses_what_has_no_json_form(value: object) -> None:
    with pytest.raises(TypeError, match="not JSON serializable"):
        fingerprint({"a": value})


# Between the parts


def test_a_whole_spec_is_loaded(tmp_path: Path) -> None:
    path = write(tmp_path, FULL)
    pipeline, document = load_pipeline(path)
    assert document.path == path
    assert pipeline.problems() == []
    assert [type(stage).__name__ for stage in pipeline.stages] == ["Cpt", "Ift", "Dpo", "Ift"]
    assert [type(stage.method).__name__ for stage in pipeline.stages] == ["Spectrum", "Lora", "Qlora", "Full"]


SHARED_CHATS = "rank: 4, alpha: 8, target_modules: [q_proj]}\n    data: [{path: data/chats.jsonl, share: 0.5}]"
WEIGHED_PAIRS = "{path: data/pairs.jsonl, weight: 2}, beta"
BETWEEN: dict[str, tuple[list[tuple[str, str]], list[str]]] = {
    "duplicate": (
        [("name: polish", "name: answers")],
        ["32:5: stages[3].name: stage name 'answers' is used twice; stage names are unique"],
    ),
    "reserved": (
        [("name: polish", "name: release")],
        ["32:5: stages[3].name: stage name 'release' is reserved; rename the stage"],
    ),
    "reserved, twice": (
        [("name: polish", "name: base"), ("name: manner", "name: base")],
        [
            "25:5: stages[2].name: stage name 'base' is reserved; rename the stage",
            "32:5: stages[3].name: stage name 'base' is reserved; rename the stage",
            "32:5: stages[3].name: stage name 'base' is used twice; stage names are unique",
        ],
    ),
    "unknown metric": (
        [("metric: pairs", "metric: pair")],
        [
            "30:14: stages[2].gates[0].metric: no metric 'pair'; did you mean 'pairs'? "
            "allowed: domain, pairs, samples, qa, taste"
        ],
    ),
    "unknown metric with a measure": (
        [("qa.acc_norm", "zzz.acc_norm")],
        ["19:10: stages[0].gates[1].metric: no metric 'zzz'; allowed: domain, pairs, samples, qa, taste"],
    ),
    "unknown reference": (
        [("keeps: previous", "keeps: perfect")],
        [
            "19:31: stages[0].gates[1].keeps: no earlier stage 'perfect'; allowed: base, previous",
        ],
    ),
    "misspelt reference": (
        [("at_least: 0.6", "improves_on: anwsers")],
        [
            "30:29: stages[2].gates[0].improves_on: no earlier stage 'anwsers'; did you mean 'answers'? "
            "allowed: base, previous, knowledge, answers",
        ],
    ),
    "later stage": (
        [("improves_on: base", "improves_on: answers")],
        [
            "18:26: stages[0].gates[0].improves_on: no earlier stage 'answers'; allowed: base, previous",
        ],
    ),
    "the stage itself": (
        [("improves_on: base", "improves_on: knowledge")],
        [
            "18:26: stages[0].gates[0].improves_on: no earlier stage 'knowledge'; allowed: base, previous",
        ],
    ),
    "chat template of an unknown stage": (
        [("[base, answers]", "[base, anwsers]")],
        [
            "7:84: metrics.qa.chat_template[1]: no stage 'anwsers'; did you mean 'answers'? "
            "allowed: base, knowledge, answers, manner, polish",
        ],
    ),
    "no stage": (
        [(FULL[FULL.index("stages:") :], "stages: []\n")],
        ["8:9: stages: expected 1 or more items, found 0"],
    ),
    "no source": (
        [
            (
                "name: manner\n    kind: dpo\n    method: {kind: qlora, rank: 4}\n    data: [{path: data/pairs.jsonl}]",
                "name: manner\n    kind: dpo\n    method: {kind: qlora, rank: 4}\n    data: []",
            )
        ],
        ["28:11: stages[2].data: expected 1 or more items, found 0"],
    ),
    "shares that leave nothing": (
        [
            (
                "train: {learning_rate: 1e-4, epochs: 2",
                "  - {path: a.csv, share: 0.7}\n      - {path: b.csv, share: 0.3}\n"
                "    train: {learning_rate: 1e-4, epochs: 2",
            )
        ],
        [
            "16:23: stages[0].data[3].share: the shares of this stage come to 1, and leave nothing to the sources "
            "without one; they must come to less than 1"
        ],
    ),
    "shares of nothing": (
        [("rank: 4, alpha: 8, target_modules: [q_proj]}\n    data: [{path: data/chats.jsonl}]", SHARED_CHATS)],
        [
            "23:37: stages[1].data[0].share: every source of this stage has a share, so nothing says how large the "
            "stage is; take it from one"
        ],
    ),
    "a share of a metric": (
        [("data/heldout.jsonl}", "data/heldout.jsonl, share: 0.5}"), ("{path: data/pairs.jsonl}, beta", WEIGHED_PAIRS)],
        [
            "4:71: metrics.domain.data.share: a metric measures each row once; remove share",
            "5:60: metrics.pairs.data.weight: a metric measures each row once; remove weight",
        ],
    ),
    "everything at once": (
        [("metric: pairs", "metric: pair"), ("name: polish", "name: answers"), ("keeps: previous", "keeps: x")],
        [
            "19:31: stages[0].gates[1].keeps: no earlier stage 'x'; allowed: base, previous",
            "30:14: stages[2].gates[0].metric: no metric 'pair'; did you mean 'pairs'? "
            "allowed: domain, pairs, samples, qa, taste",
            "32:5: stages[3].name: stage name 'answers' is used twice; stage names are unique",
        ],
    ),
}


@pytest.mark.parametrize("name", BETWEEN)
def test_parts_that_do_not_fit_together_are_refused_at_their_place(tmp_path: Path, name: str) -> None:
    edits, expected = BETWEEN[name]
    text = FULL
    for old, new in edits:
        assert text.count(old) == 1
        text = text.replace(old, new)
    assert pipeline_refusals(tmp_path, text) == expected


def test_without_metrics_no_gate_finds_one(tmp_path: Path) -> None:
    text = (
        "name: t\nmodel: {path: a}\nstages:\n- {name: a, kind: cpt, method: {kind: full}, data: [{path: a.txt}],\n"
        "   train: {learning_rate: 1, epochs: 1},\n   gates: [{metric: x, at_least: 1}]}\n"
    )
    assert pipeline_refusals(tmp_path, text) == [
        "6:13: stages[0].gates[0].metric: no metric 'x'; allowed: none are defined"
    ]


def test_a_gate_may_look_back_at_any_earlier_stage(tmp_path: Path) -> None:
    for reference in ("base", "previous", "knowledge", "answers"):
        text = FULL.replace("at_least: 0.6", f"improves_on: {reference}")
        assert load_pipeline(write(tmp_path, text))[0].stages[2].gates[0].reference == reference


def test_reading_a_spec_imports_no_torch() -> None:
    script = (
        "import sys, stages.pipeline, stages.arguments\n"
        "print([name for name in ('torch', 'transformers', 'trl', 'datasets') if name in sys.modules])"
    )
    root = Path(__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


# Gates

WORDS: dict[str, dict[str, Any]] = {
    "a at least 0.6, at 95%": {"at_least": 0.6},
    "a at least 0, by its value alone": {"at_least": 0.0, "confidence": None},
    "a at most 1e+06, at 99.5%": {"at_most": 1e6, "confidence": 0.995},
    "a improves on base, at 95%": {"improves_on": "base"},
    "a improves on base by 5%, at 95%": {"improves_on": "base", "by": "5%"},
    "a improves on previous by 0.02, by its value alone": {"improves_on": "previous", "by": 0.02, "confidence": None},
    "a keeps base within 0.0, at 95%": {"keeps": "base"},
    "a keeps knowledge within 5%, at 80%": {"keeps": "knowledge", "within": "5%", "confidence": 0.8},
}


@pytest.mark.parametrize("words", WORDS)
def test_a_gate_in_words(words: str) -> None:
    assert str(GateSpec(metric="a", **WORDS[words])) == words


def test_what_a_gate_refers_to() -> None:
    gate = GateSpec(metric="qa.acc_norm", keeps="base")
    assert (gate.metric_name, gate.measure, gate.reference) == ("qa", "acc_norm", "base")
    gate = GateSpec(metric="qa", improves_on="previous")
    assert (gate.metric_name, gate.measure, gate.reference) == ("qa", None, "previous")
    assert GateSpec(metric="qa", at_least=1).reference is None


def test_amounts_are_absolute_or_shares_of_the_reference() -> None:
    assert share(0.02) is None
    assert share("5%") == pytest.approx(0.05)
    assert share("2.5 %") == pytest.approx(0.025)
    assert share("0%") == 0


# What the grammar says about TRL


def losses_in_trl() -> dict[str, str]:
    """The loss names that the DPO trainer handles, each with the code of its branch."""
    package = importlib.util.find_spec("trl")
    assert package is not None
    assert package.origin is not None
    source = (Path(package.origin).parent / "trainer/dpo_trainer.py").read_text()
    _, *parts = re.split(r'\n +(?:el)?if loss_type == "(\w+)":\n', source)
    # The last branch ends where `else` refuses an unknown name.
    return dict(zip(parts[::2], (part.split("\n            else:")[0] for part in parts[1::2]), strict=True))


def test_the_losses_are_those_that_trl_handles() -> None:
    assert set(losses_in_trl()) == set(get_args(DpoLoss))


def test_the_smoothed_losses_are_those_in_which_trl_smooths() -> None:
    smoothed = {name for name, branch in losses_in_trl().items() if "self.label_smoothing" in branch}
    assert smoothed == set(SMOOTHED_LOSSES)


@pytest.mark.parametrize("loss", get_args(DpoLoss))
def test_smoothing_is_accepted_only_where_it_counts(loss: str) -> None:
    settings: dict[str, Any] = {"learning_rate": 1, "epochs": 1, "loss": loss, "label_smoothing": 0.1}
    if loss in SMOOTHED_LOSSES:
        assert DpoTrainSpec(**settings).label_smoothing == 0.1
    else:
        with pytest.raises(ValueError, match=f"label_smoothing has no effect on loss {loss}: remove it"):
            DpoTrainSpec(**settings)
