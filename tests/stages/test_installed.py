"""The harness's tasks, read from its files: the names that there are, the nearest ones, what they have to fetch."""

from pathlib import Path

import pytest
import tiny

from specs.load import SpecError
from stages.advice import undecisive, warnings
from stages.check import read_spec
from stages.metrics import installed

FAMILIES = ("arc", "glue", "mmlu/default", "truthfulqa", "scrolls", "humaneval", "super_glue/boolq")


@pytest.fixture
def project(tmp_path, base_model) -> Path:
    """The tiny project with its base linked in."""
    tiny.write_data(tmp_path)
    (tmp_path / "spec.yaml").write_text(tiny.SPEC.replace("path: base", f"path: {base_model}"))
    return tmp_path / "spec.yaml"


def with_task(spec: Path, task: str) -> Path:
    spec.write_text(spec.read_text().replace("task: tasks/qa.yaml", f"task: {task}"))
    return spec


@pytest.mark.parametrize("family", FAMILIES)
def test_names_kinds_and_files_are_those_of_the_harness(family):
    from lm_eval.tasks import TaskManager

    known = installed.installed()
    kinds = {"TASK": "task", "PY_TASK": "task", "GROUP": "group", "TAG": "tag"}
    index = TaskManager(include_path=str(installed.folder() / family), include_defaults=False).task_index
    assert index
    for name, entry in index.items():
        assert known[name].kind == kinds[entry.kind.name]
        if entry.yaml_path is None:
            assert set(entry.tags) <= set(known[name].members)
        else:
            assert known[name].file == str(entry.yaml_path)
            if entry.kind.name == "TASK":
                assert known[name].dataset == (entry.cfg["dataset_path"], entry.cfg.get("dataset_name") or "")


def test_an_unknown_task_lists_the_nearest_ones_at_validate(project):
    with pytest.raises(SpecError, match=r"spec\.yaml:\d+:\d+: metrics\.qa\.task: no task 'arc_eazy' .*arc_easy, "):
        read_spec(with_task(project, "arc_eazy"))


def test_a_tag_names_its_tasks(project):
    with pytest.raises(SpecError, match=r"metrics\.qa\.task: 'glue' is a tag of 9 tasks .*name one of them: cola, "):
        read_spec(with_task(project, "glue"))


def test_a_task_that_runs_what_the_model_writes_is_refused(project):
    with pytest.raises(SpecError, match=r"metrics\.qa\.task: task 'humaneval' runs what the model writes"):
        read_spec(with_task(project, "humaneval"))


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"])
def test_a_task_that_needs_the_network_is_refused_where_that_is_forbidden(project, monkeypatch, tmp_path, variable):
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    spec = with_task(project, "arc_easy")
    read_spec(spec, to_run=True)
    monkeypatch.setenv(variable, "1")
    read_spec(spec)  # the spec itself is sound
    with pytest.raises(SpecError, match=r"metrics\.qa\.task: task arc_easy needs the network for allenai/ai2_arc, "):
        read_spec(spec, to_run=True)
    (tmp_path / "cache/allenai___ai2_arc/ARC-Challenge/0.0.0/abc").mkdir(parents=True)
    with pytest.raises(SpecError, match="needs the network"):
        read_spec(spec, to_run=True)
    (tmp_path / "cache/allenai___ai2_arc/ARC-Easy/0.0.0/abc").mkdir(parents=True)
    read_spec(spec, to_run=True)


def test_what_a_group_has_to_fetch_is_what_its_tasks_have_to(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    assert installed.not_here("mmlu") == ["cais/mmlu"]
    assert installed.not_here("no such task") == []


def test_what_will_be_fetched_is_told_beforehand(project, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    told = [str(one) for one in warnings(*read_spec(with_task(project, "arc_easy")))]
    assert any("metrics.qa.task: warning: task arc_easy needs the network" in one for one in told)


def test_a_metric_that_no_gate_uses_is_a_warning(project):
    told = [str(one) for one in undecisive(*read_spec(project))]
    assert len(told) == 1
    assert "metrics.qa: warning: no gate uses this metric" in told[0]


@pytest.mark.parametrize(
    ("gate", "wanted"),
    [
        (
            "domain.word_perplexity",
            r"has no measure 'word_perplexity'; gates compare 'bits_per_word', .*allowed: bits_",
        ),
        ("domain.bits_per_bite", r"did you mean 'bits_per_byte'\? allowed: bits_per_byte, bits_per_word, "),
        ("pairs.margin", r"metric pairs has no measure 'margin'; .*allowed: reward_accuracy, "),
        ("qa.f1", r"metric qa has no measure 'f1'; allowed: acc, acc_norm"),
    ],
)
def test_a_gate_over_a_measure_that_there_is_not_is_refused_before_anything_trains(project, gate, wanted):
    text = project.read_text()
    assert "metric: domain, improves_on: base, by: 1%" in text
    project.write_text(text.replace("metric: domain, improves_on: base, by: 1%", f"metric: {gate}, at_least: 0"))
    with pytest.raises(SpecError, match=rf"spec\.yaml:\d+:\d+: stages\S+gates\S+metric: .*{wanted}"):
        read_spec(project)


@pytest.mark.parametrize(
    ("gate", "refused"),
    [
        ("pairs, improves_on: base", True),
        ("pairs.reward_margin, keeps: previous", True),
        ("pairs.policy_accuracy, improves_on: base", False),
    ],
)
def test_rewards_are_not_compared_with_the_base_which_has_none(project, gate, refused):
    text = project.read_text()
    project.write_text(text.replace("metric: domain, improves_on: base, by: 1%", f"metric: {gate}"))
    if not refused:
        read_spec(project)
        return
    with pytest.raises(SpecError, match=r"gates\[0\]\.\w+: the base has no reward_\w+: .*pairs\.policy_accuracy"):
        read_spec(project)


def test_the_metric_of_a_task_file_is_looked_up_in_it(project):
    project.write_text(project.read_text().replace("metric: acc_norm", "metric: f1"))
    with pytest.raises(
        SpecError, match=r"metrics\.qa\.metric: task tasks/qa\.yaml has no metric 'f1'; it has: acc, acc_norm"
    ):
        read_spec(project)
