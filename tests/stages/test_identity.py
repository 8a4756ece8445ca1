"""What identifies a stage, field by field: a table over every field of every method and objective."""

from pathlib import Path

import pytest
from methods_table import KINDS, method_of
from unread import SPEC, make_project, rewrite_unnoticed

from specs.base import Spec, identity_fields
from specs.model import ModelSpec
from stages.cpt import Cpt
from stages.dpo import Dpo
from stages.errors import StageFailed
from stages.identity import changes, require_same_inputs
from stages.ift import Ift
from stages.pipeline import Pipeline

STAGES = {"cpt": Cpt, "ift": Ift, "dpo": Dpo}
NO_PART: dict[str, set[str]] = {
    "stage": {"name", "data_limits", "gates", "on_gate_failure", "seed"},
    "train": {"checkpoint_every", "keep_checkpoints"},
    "source": {"path", "max_bad_rows"},
    "method": set(),
}
"""What cannot change a result. The seed that is used counts by itself; a path counts by the content at its end, and a
cap on bad rows refuses or changes nothing. Whoever adds a field here says why."""
BY_CONTENT = {"scores", "unfrozen"}
"""Fields of methods that name files."""
OTHER = "another value"


def stage_of(kind: str):
    """A stage, built without its defaults being spelt out."""
    train = {"learning_rate": 1e-3, "max_steps": 2}
    return STAGES[kind].model_validate(
        {
            "name": "one",
            "kind": kind,
            "method": {"kind": "full"},
            "data": [{"path": "data/corpus.jsonl"}],
            "train": train,
        },
        strict=False,
    )


def differs(spec: Spec, field: str) -> bool:
    return identity_fields(spec) != identity_fields(spec.model_copy(update={field: OTHER}))


def fields_of(spec: Spec) -> set[str]:
    return set(type(spec).model_fields) - {"kind"}


@pytest.mark.parametrize("kind", STAGES)
def test_every_field_of_a_stage_counts_but_for_those_that_cannot_change_a_result(kind):
    stage = stage_of(kind)
    for part, spec in (("stage", stage), ("train", stage.train), ("source", stage.data[0])):
        inert = {field for field in fields_of(spec) if not differs(spec, field)}
        assert inert == NO_PART[part] & fields_of(spec), part


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_of_every_method_counts(kind):
    method = method_of(kind)
    assert {field for field in fields_of(method) if not differs(method, field)} == NO_PART["method"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_change_of_any_field_of_a_method_is_named_with_both_values(kind):
    method = method_of(kind)
    old = {"stage": {"method": identity_fields(method)}}
    for field in fields_of(method):
        new = {"stage": {"method": identity_fields(method.model_copy(update={field: OTHER}))}}
        before = getattr(method, field)
        if isinstance(before, list | tuple | dict):
            assert any(line.startswith(f"method.{field}") for line in changes(old, new))
        else:
            assert changes(old, new) == [f"method.{field}: {before!r:.60} -> {OTHER!r}"]


def test_no_field_was_added_to_a_pipeline_or_a_model_without_a_thought_for_identity():
    """These are put into identities one by one: whoever adds a field says in `stages.identity` what it changes."""
    assert set(Pipeline.model_fields) == {"name", "model", "seed", "metrics", "diagnostics", "stages", "release"}
    assert set(ModelSpec.model_fields) == {
        "path", "gguf", "hub", "revision", "dtype", "chat_template", "template_date", "allow_remote_code", "license",
        "origin",
    }  # fmt: skip


@pytest.fixture
def project(tmp_path):
    made = make_project(tmp_path / "project")
    (made.folder / "scan.json").write_text('{"a": {"snr": 1.0, "type": "x"}}')
    made.write(SPEC.replace("{kind: spectrum, top_percent: 50}", "{kind: spectrum, scores: scan.json}"))
    return made


def keys(project) -> list[str]:
    return [step.key for step in project.plan().steps]


def test_a_file_of_a_method_may_be_called_otherwise_and_counts_by_its_content(project):
    before = keys(project)
    (project.folder / "scan.json").rename(project.folder / "scores.json")
    project.edit(("scan.json", "scores.json"))
    assert keys(project) == before
    project.publish("base", "knowledge")
    rewrite_unnoticed(project.folder / "scores.json", b'{"a": {"snr": 2.0, "type": "x"}}')
    step = project.plan().steps[1]
    assert step.key != before[1]
    assert step.reason == "changed: content of method.scores"


def test_the_files_of_methods_are_those_that_the_table_knows():
    named = {field for kind in KINDS for field in fields_of(method_of(kind)) if field in BY_CONTENT}
    assert named == BY_CONTENT
    for kind in KINDS:
        fields = {field: f"{field}.json" for field in BY_CONTENT & fields_of(method_of(kind))}
        for field, name in fields.items():
            assert method_of(kind).model_copy(update={field: name}).files() == (name,)


# Hashed again before it is published


def job_of(project, name: str):
    plan = project.plan()
    return plan.job(next(step for step in plan.steps if step.name == name))


CHANGED = {
    "data": ("knowledge", "data/corpus.jsonl"),
    "a method's file": ("knowledge", "scan.json"),
    "the base's weights": ("base", "base/model.safetensors"),
    "the base's config": ("base", "base/config.json"),
}


@pytest.mark.parametrize(("name", "file"), CHANGED.values(), ids=CHANGED)
def test_what_changed_since_the_plan_is_named_though_size_and_time_are_equal(project, name, file):
    job = job_of(project, name)
    require_same_inputs(job)
    place = project.folder / file
    rewrite_unnoticed(place, place.read_bytes().swapcase())
    with pytest.raises(StageFailed) as caught:
        require_same_inputs(job)
    assert str(caught.value) == (
        f"{name}: changed since this run was planned: {place}. Nothing is published; put back what was there, or run "
        "again: the step is then made from what is there now"
    )


@pytest.mark.parametrize("harm", [Path.unlink, lambda file: file.with_name("tokenizer.model").touch()])
def test_a_file_of_the_base_that_came_or_went_is_named(project, harm):
    (project.folder / "base/tokenizer.json").write_text("{}")
    job = job_of(project, "base")
    harm(project.folder / "base/tokenizer.json")
    with pytest.raises(StageFailed, match=r"base/tokenizer\.(json \(it went\)|model)\. Nothing is published"):
        require_same_inputs(job)


@pytest.mark.parametrize(("name", "file"), [("knowledge", "scan.json"), ("base", "own.jinja")])
def test_a_file_beside_base_and_data_that_went_is_named_with_the_remedy(project, name, file):
    (project.folder / "own.jinja").write_text("{{ messages }}")
    project.edit(("path: base,", "path: base, chat_template: own.jinja,"))
    job = job_of(project, name)
    (project.folder / file).unlink()
    with pytest.raises(StageFailed, match=rf"planned: \S+/{file} \(No such file or directory\)\. Nothing is published"):
        require_same_inputs(job)


def test_of_several_files_of_a_source_the_one_that_changed_is_named(project):
    project.edit(("data: [{path: data/corpus.jsonl}]", "data: [{path: data/*.txt}]"))
    for name in ("a", "b", "c"):
        (project.folder / f"data/{name}.txt").write_text(name)
    job = job_of(project, "knowledge")
    (project.folder / "data/b.txt").write_text("B")
    with pytest.raises(StageFailed, match=r"planned: \S+/data/b\.txt\. Nothing is published"):
        require_same_inputs(job)
    (project.folder / "data/b.txt").write_text("c")
    (project.folder / "data/c.txt").write_text("b")
    with pytest.raises(StageFailed, match=r"planned: \S+/data/\*\.txt \(its files changed places\)"):
        require_same_inputs(job)
    (project.folder / "data/b.txt").unlink()
    with pytest.raises(StageFailed, match=r"planned: \S+/data/\*\.txt \(a file went\)"):
        require_same_inputs(job)
