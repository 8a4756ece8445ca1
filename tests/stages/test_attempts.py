"""Which of several attempts at a stage a plan goes on with, from what is on the disk alone."""

import os
import random
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from unread import Project, make_project

from flows import cli, engine
from flows.engine import Outcome, Plain, Run, is_done, remember_plan, run_chain
from specs.gate import GateSpec
from stages import checkpoint, evaluate
from stages.artifact import VERDICT, publish
from stages.documents import read_sealed
from stages.errors import AwaitingApproval, GateRefused
from stages.garbage import find_garbage
from stages.gate import judge
from stages.measure import Measure, ratio
from stages.plan import Plan, Step
from stages.store import current

SPEC = """\
name: tiny
model: {path: base, dtype: float32}
metrics:
  domain: {kind: perplexity, data: {path: data/heldout.jsonl}}
  general: {kind: perplexity, data: {path: data/instructions.heldout.jsonl}}
stages:
  - name: knowledge
    kind: cpt
    method: {kind: spectrum, top_percent: 50}
    data: [{path: data/corpus.jsonl}]
    train: {learning_rate: 5e-3, max_steps: 12}
    gates:
      - {metric: domain, at_most: 1.0, confidence: null}
      - {metric: general, keeps: base, within: 0.5, confidence: null}
    on_gate_failure:
      retry:
        - train: {learning_rate: x0.5}
        - method: {top_percent: 25}
      then: stop
  - name: answers
    kind: ift
    method: {kind: lora, rank: 4}
    data: [{path: data/instructions.jsonl}]
    train: {learning_rate: 1e-2, max_steps: 12}
"""
GOOD, BAD = 0.5, 2.0


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """A project of which the base is published and measured: 1 on both metrics."""
    made = make_project(tmp_path / "project")
    made.write(SPEC)
    put(made, made.plan().steps[0], 1.0, 1.0)
    return made


def put(project: Project, step: Step, domain: float | None, general: float = 1.0) -> None:
    """Publish a step as it is planned, with what is measured of it."""
    work = project.root / ".fake"
    (work / "model").mkdir(parents=True)
    (work / "model/model.safetensors").write_bytes(step.key.encode())
    record = {"model_path": str(project.folder / "base")} if step.name == "base" else {}
    publish(work, step.target, identity=step.identity, record=record)
    measure(step, domain, general)


def measure(step: Step, domain: float | None, general: float = 1.0) -> None:
    for one in step.measurements:
        value = domain if one.metric == "domain" else general
        measures = {} if value is None else {"x": ratio([value] * 3, [1.0] * 3, "lower")}
        found = evaluate.Evaluation(measures, "x", {}, {}, 0.1)
        evaluate.save(found, Path(one.file), one.identity)


def knowledge(project: Project, **options: str) -> Step:
    return project.plan(**options).steps[1]


def attempt(plan: Plan, number: int) -> Step:
    return next(step for step in plan.named if step.name == "knowledge" and step.attempt == number)


def try_all(project: Project, *values: float | None) -> None:
    for number, value in enumerate(values, start=1):
        put(project, attempt(project.plan(), number), value)


def test_what_was_written_is_tried_first_and_then_each_change_until_one_passes(project):
    assert (knowledge(project).attempt, knowledge(project).attempts) == (1, 3)
    assert knowledge(project).reason == "never run"
    try_all(project, BAD)
    second = knowledge(project)
    assert second.title == "knowledge (attempt 2 of 3: learning_rate 0.0025)"
    assert second.reason == "attempt 2 of 3: learning_rate 0.0025"
    assert second.stage.train.learning_rate == 2.5e-3
    put(project, second, GOOD)
    plan = project.plan()
    assert (plan.steps[1].attempt, plan.steps[1].reason) == (2, "published")
    assert [step.name for step in plan.pending] == ["answers", "release"]


def test_the_next_stage_starts_from_the_attempt_that_is_chosen(project):
    first = project.plan().steps[2].identity["parent"]
    assert first == knowledge(project).key
    try_all(project, BAD, GOOD)
    plan = project.plan()
    assert plan.steps[2].identity["parent"] == plan.steps[1].key != first
    assert plan.job(plan.steps[2]).start == str(plan.steps[1].place)
    assert plan.step("previous", plan.steps[2]) is plan.steps[1]
    assert plan.step("knowledge", plan.steps[2]) is plan.steps[1]


def test_the_process_of_an_attempt_is_told_its_stage(project):
    try_all(project, BAD)
    plan = project.plan()
    assert plan.job(plan.steps[1]).stage.train.learning_rate == 2.5e-3
    assert plan.chosen.stages[0].train.learning_rate == 2.5e-3
    assert plan.pipeline.stages[0].train.learning_rate == 5e-3


def test_each_attempt_is_an_artifact_of_its_own(project):
    plan = project.plan()
    steps = [attempt(plan, number) for number in (1, 2, 3)]
    assert len({step.key for step in steps}) == len({step.target for step in steps}) == 3
    assert all(step.target.name.startswith("01-knowledge-") for step in steps)


def test_where_all_are_refused_the_best_is_the_stage(project):
    try_all(project, 2.0, 1.5, 3.0)
    assert knowledge(project).attempt == 2
    assert not all(one.passed for one in project.plan().verdicts(knowledge(project)))


def test_an_attempt_that_passes_more_gates_is_better_than_one_with_a_larger_margin(project):
    put(project, attempt(project.plan(), 1), 1.1, 9.0)
    put(project, attempt(project.plan(), 2), 2.0, 1.0)
    put(project, attempt(project.plan(), 3), 1.5, 9.0)
    assert knowledge(project).attempt == 2


def test_of_several_that_pass_after_an_edit_the_best_wins_and_nothing_is_made(project):
    try_all(project, 2.0, 1.2, 1.5)
    project.edit(("at_most: 1.0", "at_most: 1.6"))
    plan = project.plan()
    assert plan.steps[1].attempt == 2
    assert plan.steps[1].artifact is not None
    project.edit(("at_most: 1.6", "at_most: 9"))
    assert knowledge(project).attempt == 2


def test_an_attempt_that_passes_is_kept_though_one_before_it_was_never_made(project):
    put(project, attempt(project.plan(), 3), GOOD)
    assert knowledge(project).attempt == 3


def test_equal_attempts_are_taken_in_order(project):
    try_all(project, 2.0, 2.0, 2.0)
    assert knowledge(project).attempt == 1


def test_an_attempt_without_a_value_is_the_worst(project):
    try_all(project, None, 3.0, None)
    assert knowledge(project).attempt == 2


def test_an_attempt_that_was_begun_goes_on_before_any_other(project):
    try_all(project, BAD)
    second = knowledge(project)
    assert second.attempt == 2
    put(project, second, BAD)
    Path(second.measurements[0].file).unlink()
    again = knowledge(project)
    assert (again.attempt, [one.metric for one in again.missing]) == (2, ["domain"])


def test_an_attempt_that_was_interrupted_resumes(project):
    try_all(project, BAD)
    folder = knowledge(project).work / "checkpoints/checkpoint-7"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"half-way")
    checkpoint.seal(folder)
    assert knowledge(project).reason == "attempt 2 of 3: learning_rate 0.0025; resumes at step 7"


def test_no_attempt_is_judged_while_what_it_is_compared_with_is_not_measured(project):
    try_all(project, BAD)
    base = project.plan().steps[0]
    kept = {one.file: Path(one.file).read_bytes() for one in base.measurements}
    for file in kept:
        Path(file).unlink()
    assert knowledge(project).attempt == 1
    for file, content in kept.items():
        Path(file).write_bytes(content)
    assert knowledge(project).attempt == 2


def test_a_damaged_attempt_that_was_refused_is_made_again_only_if_it_is_needed(project):
    try_all(project, BAD, GOOD)
    first = attempt(project.plan(), 1)
    (first.place / "model/model.safetensors").write_bytes(b"torn")
    assert knowledge(project).attempt == 2
    shutil.rmtree(knowledge(project).place)
    assert knowledge(project).attempt == 1
    assert knowledge(project).damaged == first.place


def test_forced_the_attempts_that_pass_are_made_anew_and_refused_ones_stay(project):
    try_all(project, BAD, GOOD)
    plan = project.plan(forced_from="knowledge")
    assert (plan.steps[1].attempt, plan.steps[1].artifact) == (2, None)
    assert plan.steps[1].reason == "forced by --from knowledge"
    assert plan.steps[1].damaged == project.plan().steps[1].place
    assert attempt(plan, 1).artifact is not None
    assert attempt(plan, 1).damaged is None


def test_forced_where_all_were_refused_the_best_is_made_anew(project):
    try_all(project, 2.0, 1.5, 3.0)
    plan = project.plan(forced_from="knowledge")
    assert (plan.steps[1].attempt, plan.steps[1].damaged is not None) == (2, True)
    assert [step.damaged for step in plan.others] == [None, None]


def test_another_list_of_changes_keeps_what_is_made(project):
    try_all(project, BAD, BAD)
    project.edit(("        - method: {top_percent: 25}", "        - method: {top_percent: 10}"))
    assert knowledge(project).title == "knowledge (attempt 3 of 3: top_percent 10.0)"
    project.edit(("        - train: {learning_rate: x0.5}\n", ""))
    assert knowledge(project).title == "knowledge (attempt 2 of 2: top_percent 10.0)"


def test_a_run_until_a_stage_tries_again_though_its_spec_is_edited_meanwhile(project, monkeypatch):
    spec = project.folder / "spec.yaml"

    def work(_plan: Plan, step: Step, _hooks: Plain) -> None:
        put(project, step, GOOD if step.attempt == 3 else BAD)
        spec.write_text("stages: [half of a sp")

    monkeypatch.setattr(engine, "_work", work)
    monkeypatch.setattr(engine, "check_inputs", lambda *_: None)
    monkeypatch.setattr(engine, "check_base", lambda *_: None)
    outcomes = run_chain(Run(spec, project.root, until_stage="knowledge"), Plain())
    assert [(outcome.step.attempt, outcome.passed) for outcome in outcomes[1:]] == [(1, False), (2, False), (3, True)]


def test_a_person_is_told_commands_that_find_the_run_that_waits(project, monkeypatch, capsys):
    spec = project.folder / "spec.yaml"
    project.edit(("then: stop", "then: approve"))
    monkeypatch.setattr(engine, "_work", lambda _plan, step, _hooks: put(project, step, BAD))
    monkeypatch.setattr(engine, "check_inputs", lambda *_: None)
    monkeypatch.setattr(engine, "check_base", lambda *_: None)
    with pytest.raises(AwaitingApproval) as caught:
        run_chain(Run(spec, project.root, until_stage="knowledge"), Plain())
    decide, go_on = re.findall(r"`trivium ([^`]+)`", str(caught.value))
    assert cli._run([*shlex.split(decide)[:-1], "as good as it gets"]) == 0
    assert shlex.split(go_on) == ["run", str(spec), "--root", str(project.root), "--until", "knowledge"]
    assert f"go on with: trivium run {spec} --root {project.root}" in capsys.readouterr().out
    assert run_chain(Run(spec, project.root, until_stage="knowledge"), Plain())[-1].decision.approved


def test_what_the_attempts_came_to_is_kept_by_gc_and_what_no_spec_names_is_not(project):
    try_all(project, BAD, BAD, GOOD)
    spec = project.folder / "spec.yaml"
    run = Run(spec, project.root)
    remember_plan(run, run.plan())
    assert find_garbage(project.root).items == []
    third = knowledge(project).place
    project.edit(("        - method: {top_percent: 25}", "        - method: {top_percent: 10}"))
    remember_plan(run, run.plan())
    os.utime(third)
    put(project, attempt(project.plan(), 3), GOOD)
    assert [item.path for item in find_garbage(project.root).items] == [third]


def test_all_is_done_once_the_chosen_attempt_is_judged(project):
    try_all(project, BAD, GOOD)
    for number in (2, 3):
        put(project, project.plan().steps[number], GOOD)
    plan = project.plan()
    assert not is_done(plan)
    engine._judge(plan, plan.steps[1])
    assert is_done(project.plan())
    assert not (attempt(plan, 1).place / VERDICT).exists()  # none was judged here, and none is asked for


def chain(project: Project) -> list[Outcome]:
    return run_chain(Run(project.folder / "spec.yaml", project.root), Plain())


@pytest.fixture
def only_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """The base only looks like a model, so nothing is held against it."""
    monkeypatch.setattr(engine, "check_inputs", lambda *_: None)
    monkeypatch.setattr(engine, "check_base", lambda *_: None)


@pytest.mark.usefixtures("only_files")
def test_where_all_attempts_are_refused_the_run_ends_with_the_best_of_them(project):
    try_all(project, 2.0, 1.5, 3.0)
    with pytest.raises(GateRefused) as caught:
        chain(project)
    assert str(caught.value) == (
        "stage knowledge (attempt 2 of 3: learning_rate 0.0025): all 3 attempts were refused, and this is the best: "
        "1 of 2 gates failed: domain 1.5 is not at most 1; the value alone was judged"
    )
    assert read_sealed(knowledge(project).place / VERDICT)["passed"] is False


@pytest.mark.usefixtures("only_files")
def test_or_goes_on_with_it_where_then_says_warn(project):
    try_all(project, 2.0, 1.5, 3.0)
    project.edit(("then: stop", "then: warn"))
    for number in (2, 3):
        put(project, project.plan().steps[number], GOOD)
    outcomes = chain(project)
    assert [(one.step.name, one.step.attempt, one.settled) for one in outcomes] == [
        ("base", 1, True),
        ("knowledge", 2, True),
        ("answers", 1, True),
        ("release", 1, True),
    ]
    assert not outcomes[1].passed


@pytest.mark.usefixtures("only_files")
def test_a_run_tries_one_attempt_after_the_other_and_goes_back_to_the_best(project, monkeypatch):
    values = iter((1.5, 2.0, 3.0))
    monkeypatch.setattr(engine, "_work", lambda plan, step, _: put(project, step, next(values)))
    seen: list[Outcome] = []

    class Watching(Plain):
        def step(self, step: Step, body: Callable[[], Outcome]) -> Outcome:
            seen.append(body())
            return seen[-1]

    with pytest.raises(GateRefused, match="attempt 1 of 3"):
        run_chain(Run(project.folder / "spec.yaml", project.root), Watching())
    assert [(one.step.attempt, one.kept, one.settled) for one in seen] == [
        (1, True, True),  # the base
        (1, False, False),
        (2, False, False),
        (3, False, False),
        (1, True, True),
    ]
    assert all((attempt(project.plan(), number).place / VERDICT).is_file() for number in (1, 2, 3))
    assert {step.key for step in project.plan().named} <= set(current(project.plan().store).works)


@pytest.mark.usefixtures("only_files")
def test_what_is_damaged_below_an_attempt_that_became_next_is_set_aside(project, monkeypatch):
    try_all(project, BAD)
    put(project, knowledge(project), GOOD)
    after = project.plan().steps[2].target
    after.mkdir()  # of a crash: no manifest
    shutil.rmtree(knowledge(project).place)
    shutil.rmtree(attempt(project.plan(), 1).place)
    values = iter((BAD, GOOD, GOOD, GOOD))
    monkeypatch.setattr(engine, "_work", lambda plan, step, _: put(project, step, next(values)))
    chain(project)
    assert (project.plan().store / ".set-aside" / f"{after.name}.1").is_dir()


# How often trying often buys a pass


def hits(pick: random.Random, right: float, n: int) -> Measure:
    return ratio([float(pick.random() < right) for _ in range(n)], [1.0] * n, "higher")


@pytest.mark.parametrize("attempts", [1, 3, 5])
def test_that_any_of_several_attempts_passes_wrongly_is_no_likelier_than_one_in_twenty(attempts):
    """Each attempt is exactly on the threshold, and judged on answers of its own: the worst that can be."""
    gate = GateSpec(metric="quiz", at_least=0.6)
    pick = random.Random(f"attempts/{attempts}")
    trials, n = 400, 150
    alone, together = 0, 0
    for _ in range(trials):
        tried = [hits(pick, 0.6, n) for _ in range(attempts)]
        alone += any(judge((gate,), lambda *_, one=one: one)[0].passed for one in tried)
        together += any(judge((gate,), lambda *_, one=one: one, attempts)[0].passed for one in tried)
    assert together / trials <= 0.05 + 0.025  # two standard errors of 400 trials
    if attempts == 5:
        assert alone / trials > 0.12  # without sharing, trying often does buy a pass


def test_a_verdict_says_that_the_doubt_is_shared():
    gate = GateSpec(metric="quiz", at_least=0.5)
    alone = GateSpec(metric="quiz", at_least=0.5, confidence=None)
    measured = ratio([1.0] * 70 + [0.0] * 30, [1.0] * 100, "higher")
    shared, plain = judge((gate, alone), lambda *_: measured, 3)
    assert shared.confidence == pytest.approx(1 - 0.05 / 3)
    assert shared.gate == "quiz at least 0.5, at 98.33%"
    assert shared.reason.endswith("at 98.33% over 100 examples; 3 attempts share the doubt of 95%")
    assert (plain.confidence, plain.reason.count("share")) == (None, 0)
    assert judge((gate,), lambda *_: measured) == judge((gate,), lambda *_: measured, 1)


def test_the_margin_is_how_far_a_value_is_beyond_what_is_asked_for():
    def margin(here: float, **rule: object) -> float:
        measures = {"here": ratio([here] * 3, [1.0] * 3, "lower"), "base": ratio([2.0] * 3, [1.0] * 3, "lower")}
        gate = GateSpec(metric="m", confidence=None, **rule)
        return judge((gate,), lambda where, *_: measures[where])[0].margin

    assert margin(1.0, at_most=1.5) == 0.5
    assert margin(2.0, at_most=1.5) == -0.5
    assert margin(1.0, improves_on="base", by=0.25) == 0.75
    assert margin(1.0, improves_on="base", by="25%") == 0.5
    assert margin(2.25, keeps="base", within=0.5) == 0.25
