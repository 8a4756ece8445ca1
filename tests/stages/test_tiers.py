"""The two tiers: cheap between the stages, in full for the release; what each measures, costs and decides."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from unread import Project, make_project

from flows import engine
from flows.engine import Plain, Run, is_done, nothing_to_do, run_chain
from flows.summary import summarise
from specs.base import identity_fields
from specs.load import SpecError
from specs.metric import GenerationSpec, PerplexitySpec, PreferenceSpec, with_limit
from stages import evaluate
from stages.artifact import MODEL, VERDICT, publish
from stages.documents import read_sealed
from stages.errors import GateRefused
from stages.measure import ratio
from stages.plan import Step
from stages.tiers import duration, tier_lines

SPEC = """\
name: tiny
model: {path: base, dtype: float32}
metrics:
  domain: {kind: perplexity, data: {path: data/heldout.jsonl}, limit: 5}
  general: {kind: perplexity, data: {path: data/instructions.heldout.jsonl}}
  pairs: {kind: preference, data: {path: data/pairs.heldout.jsonl}, limit: 5}
  qa: {kind: lm_eval, task: tasks/qa.yaml, limit: 5}
stages:
  - name: knowledge
    kind: cpt
    method: {kind: spectrum, top_percent: 50}
    data: [{path: data/corpus.jsonl}]
    train: {learning_rate: 5e-3, max_steps: 12}
  - name: manner
    kind: dpo
    method: {kind: lora, rank: 4}
    data: [{path: data/pairs.jsonl}]
    train: {learning_rate: 1e-2, max_steps: 10}
"""
RELEASE = """\
release:
  gates:
    - {metric: domain, improves_on: base, by: 0.5, confidence: null}
    - {metric: general, keeps: base, within: 0.1, confidence: null}
    - {metric: pairs, at_most: 5, confidence: null}
  on_gate_failure: stop
"""


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """A project of which nothing was run."""
    made = make_project(tmp_path / "project")
    made.write(SPEC + RELEASE)
    return made


def work(project: Project, step: Step, values: dict[str, float]) -> None:
    """What the process of a step does: make it, if it is to be made, and measure what is missing."""
    if step.artifact is None:
        folder = project.root / ".fake"
        (folder / "model").mkdir(parents=True)
        (folder / "model/model.safetensors").write_bytes(step.key.encode())
        record = {"model_path": str(project.folder / "base")} if step.name == "base" else {}
        publish(folder, step.target, identity=step.identity, record=record)
    for one in step.missing:
        found = {"x": ratio([values.get(step.name, 1.0)] * 5, [1.0] * 5, "lower")}
        evaluate.save(evaluate.Evaluation(found, "x", {}, {}, 2.0), Path(one.file), one.identity)


@pytest.fixture
def worked(project: Project, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The processes that a run starts, by what they make and measure. The base is 2 on all metrics, the release 1."""
    done: list[str] = []

    def start(plan, step, _hooks) -> None:
        made = "make " if step.artifact is None else ""
        done.append(f"{made}{step.title}: {', '.join(one.metric for one in step.missing)}")
        work(project, step, {"base": 2.0})

    monkeypatch.setattr(engine, "_work", start)
    monkeypatch.setattr(engine, "check_inputs", lambda *_: None)  # the base only looks like a model
    monkeypatch.setattr(engine, "check_base", lambda *_: None)
    return done


def asked(project: Project) -> Run:
    return Run(project.folder / "spec.yaml", project.root)


def link(project: Project) -> Path:
    return project.root / "tiny" / MODEL


def test_the_release_is_measured_in_full_and_so_is_what_it_is_compared_with_once(project, worked):
    run_chain(asked(project), Plain())
    assert worked == [
        "make base: domain, general, pairs, qa",
        "make knowledge: domain, general, pairs, qa",
        "make manner: domain, general, pairs, qa",
        "base (for the release): domain",  # general has no limit: both tiers are the same file
        "knowledge (for the release): pairs",  # the start of the last stage, which its rewards refer to
        "make release: domain, general, pairs",
    ]
    assert link(project).resolve() == project.plan().steps[-1].place / "model"
    assert read_sealed(project.plan().steps[-1].place / VERDICT)["passed"] is True
    worked.clear()
    assert nothing_to_do(asked(project), project.plan())
    run_chain(asked(project), Plain())
    assert worked == []


def test_files_of_both_tiers_lie_side_by_side(project, worked):
    run_chain(asked(project), Plain())
    names = sorted(file.name.partition("-")[0] for file in (project.plan().steps[0].place / "evaluation").iterdir())
    assert names == ["domain", "domain", "general", "pairs", "qa"]


def test_without_a_release_block_nothing_of_it_is_measured_or_judged(project, worked):
    project.write(SPEC)
    plan = project.plan()
    assert (plan.references, plan.steps[-1].measurements, plan.steps[-1].gates) == ((), (), ())
    run_chain(asked(project), Plain())
    assert worked[-1] == "make release: "
    assert link(project).is_symlink()
    project.write(SPEC + RELEASE)
    assert [step.title for step in project.plan().pending] == [
        "base (for the release)",
        "knowledge (for the release)",
        "release",
    ]


def test_a_release_that_is_refused_is_not_let_out_and_a_lower_threshold_lets_it_out_unmeasured(project, worked):
    project.edit(("by: 0.5", "by: 1.5"))
    with pytest.raises(GateRefused) as caught:
        run_chain(asked(project), Plain())
    assert caught.value.exit_code == 3
    assert str(caught.value) == (
        "the release is made and not let out: 1 of 3 gates failed: domain 1 is 1 better than 2 (base); needed a gain "
        "of 1.5; the value alone was judged"
    )
    assert not link(project).is_symlink()
    assert not is_done(project.plan())
    summary = summarise(project.plan())
    assert (summary.release, summary.withheld) == (
        None,
        "the release is made and not let out: 1 of 3 gates refuse it",
    )
    worked.clear()
    project.edit(("by: 1.5", "by: 0.5"))
    run_chain(asked(project), Plain())
    assert worked == []
    assert link(project).resolve() == project.plan().steps[-1].place / "model"
    assert summarise(project.plan()).release == link(project)


def test_a_link_to_an_earlier_release_stays_where_the_new_one_is_refused(project, worked):
    run_chain(asked(project), Plain())
    before = link(project).resolve()
    project.edit(("rank: 4", "rank: 8"), ("by: 0.5", "by: 1.5"))
    with pytest.raises(GateRefused):
        run_chain(asked(project), Plain())
    assert link(project).resolve() == before
    assert summarise(project.plan()).withheld.endswith(f"; {link(project)} leads to an earlier release")


def test_a_stricter_gate_takes_the_link_off_the_release_that_it_led_to(project, worked):
    run_chain(asked(project), Plain())
    worked.clear()
    project.edit(("by: 0.5", "by: 1.5"))
    with pytest.raises(GateRefused, match=r"model led to it, since before the gates were stricter, and was removed"):
        run_chain(asked(project), Plain())
    assert worked == []
    assert not link(project).is_symlink()


def test_warn_lets_it_out_with_its_verdict(project, worked):
    project.edit(("by: 0.5", "by: 1.5"), ("on_gate_failure: stop", "on_gate_failure: warn"))
    outcomes = run_chain(asked(project), Plain())
    assert not outcomes[-1].passed
    assert link(project).is_symlink()
    assert summarise(project.plan()).release == link(project)


def test_the_rewards_of_the_release_are_over_the_start_of_the_last_stage(project):
    plan = project.plan()
    pairs = next(one for one in plan.steps[-1].measurements if one.metric == "pairs")
    (start,) = [one for step in plan.references if step.name == "knowledge" for one in step.measurements]
    assert pairs.reference == start.file
    assert pairs.identity["reference"] == plan.steps[1].key
    assert (start.reference, start.tier) == (None, "release")  # log-likelihoods are all that is needed of it


def test_rewards_of_a_stage_that_the_release_is_compared_with_are_over_its_own_start(project):
    project.edit(("{metric: pairs, at_most: 5, confidence: null}", "{metric: pairs, keeps: knowledge, within: 1}"))
    plan = project.plan()
    measured = {step.name: {one.metric: one for one in step.measurements} for step in plan.references}
    assert measured["knowledge"]["pairs"].reference == measured["base"]["pairs"].file
    assert set(measured["base"]) == {"domain", "general", "pairs"}


def test_a_limit_of_the_release_holds_for_all_its_metrics(project):
    project.edit(("release:\n", "release:\n  limit: 7\n  metrics: [qa]\n"))
    plan = project.plan()
    limits = {one.metric: one.identity["metric"].get("limit") for one in plan.steps[-1].measurements}
    assert limits == {"domain": 7, "general": 7, "pairs": 7, "qa": 7}
    assert [one.tier for one in plan.steps[-1].measurements] == ["release"] * 4
    job = plan.job(plan.steps[-1])
    assert [job.pipeline.metric(one.metric, one.tier).limit for one in job.measurements] == [7] * 4
    assert [job.pipeline.metric(one.metric, "stages").limit for one in job.measurements] == [5, None, 5, 5]


def test_until_a_stage_nothing_is_measured_for_the_release(project):
    plan = project.plan(until="knowledge")
    assert (plan.references, [step.name for step in plan.steps]) == ((), ["base", "knowledge"])


def test_questions_are_put_to_the_release_as_to_the_last_stage(project):
    project.edit(
        ("qa: {kind: lm_eval, task: tasks/qa.yaml", "qa: {kind: lm_eval, chat_template: [manner], task: tasks/qa.yaml")
    )
    project.edit(("release:\n", "release:\n  metrics: [qa]\n"))
    assert next(one for one in project.plan().steps[-1].measurements if one.metric == "qa").chat_template


def test_an_edited_release_block_makes_nothing_anew(project, worked):
    run_chain(asked(project), Plain())
    keys = [step.key for step in project.plan().steps]
    project.edit(("by: 0.5", "by: 0.4"), ("release:\n", "release:\n  limit: 3\n"))
    plan = project.plan()
    assert [step.key for step in plan.steps] == keys
    assert [step.artifact is not None for step in plan.steps] == [True] * 4


# What it costs


def test_the_plan_counts_rows_and_says_what_was_never_timed(project):
    assert tier_lines(project.plan()) == [
        "measured of the base and after each stage: domain (5 examples, not timed yet); general (20 examples, not "
        "timed yet); pairs (5 examples, not timed yet); qa (5 examples, not timed yet)",
        "measured before the release, of base, knowledge, the released model: domain (20 examples, not timed yet); "
        "general (20 examples, not timed yet); pairs (20 examples, not timed yet)",
        "to measure now: 17 measurements, none of which was timed yet",
    ]


def test_what_was_timed_between_stages_tells_what_the_release_will_take(project):
    work(project, project.plan().steps[0], {})
    found = tier_lines(project.plan())
    assert "domain (5 examples, about 2 s)" in found[0]
    assert "domain (20 examples, about 8 s)" in found[1]
    assert found[2] == "to measure now: 13 measurements, about 56 s"


def test_without_metrics_nothing_is_said(project):
    text = SPEC[: SPEC.index("metrics:")] + SPEC[SPEC.index("stages:") :]
    project.write(text)
    assert tier_lines(project.plan()) == []


@pytest.mark.parametrize(("seconds", "said"), [(0.2, "1 s"), (119, "119 s"), (600, "10 min"), (9000, "2.5 h")])
def test_times_for_people(seconds, said):
    assert duration(seconds) == said


# The grammar


def test_every_metric_that_reads_rows_has_a_limit_and_full_means_all_that_it_can_have():
    data = {"path": "a.jsonl"}
    texts = PerplexitySpec(kind="perplexity", data=data, limit=3)
    pairs = PreferenceSpec(kind="preference", data=data)
    asked_for = GenerationSpec(kind="generation", data=data, limit=10)
    assert [with_limit(one, None).limit for one in (texts, pairs, asked_for)] == [None, None, 2000]
    assert [with_limit(one, 30).limit for one in (texts, pairs, asked_for)] == [30, 30, 30]
    assert with_limit(asked_for, 9999).limit == 2000
    assert "limit" not in identity_fields(pairs)  # what was measured before there was one is kept
    assert identity_fields(texts)["limit"] == 3


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            ("keeps: base", "keeps: previous"),
            "release.gates[1].keeps: the step before the release is the same model; name",
        ),
        (("keeps: base", "keeps: bas"), "release.gates[1].keeps: no step 'bas'; did you mean 'base'?"),
        (
            ("{metric: general", "{metric: generl"),
            "release.gates[1].metric: no metric 'generl'; did you mean 'general'?",
        ),
        (("release:\n", "release:\n  metrics: [qaa]\n"), "release.metrics[0]: no metric 'qaa'; did you mean 'qa'?"),
        (("release:\n", "release:\n  limit: 0\n"), "release.limit: expected a number greater than 0, found 0"),
        (("release:\n", "release:\n  gate: []\n"), "release.gate: unknown key; did you mean 'gates'?"),
        ((RELEASE, "release: {on_gate_failure: stop}\n"), "release: names nothing to measure: add gates or metrics"),
        ((RELEASE, "release: {}\n"), "release: names nothing to measure: add gates or metrics, or remove release"),
    ],
)
def test_what_is_wrong_with_a_release_is_told_at_its_place(project, edit, message):
    project.edit(edit)
    with pytest.raises(SpecError, match=re.escape(message)):
        project.plan()
