"""What a run does beside others, and beside somebody who edits its spec."""

import os
from pathlib import Path
from typing import Any

import pytest
import tiny
from running import SPEC
from unread import NAMES, Project, make_project

from flows import engine
from flows.engine import Plain, Run, nothing_to_do, run_chain
from stages.artifact import LOCKS, MODEL
from stages.errors import TryAgain
from stages.lock import exclusive, shared
from stages.plan import Step


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """A project of which everything is published, without gates."""
    made = make_project(tmp_path / "project")
    spec = made.folder / "spec.yaml"
    made.write("\n".join(line for line in spec.read_text().splitlines() if "gates:" not in line))
    made.publish(*NAMES)
    return made


def lock(project: Project, name: str, ending: str) -> Path:
    step = next(step for step in project.plan().steps if step.name == name)
    return project.plan().store / LOCKS / f"{step.work.name}{ending}"


@pytest.mark.parametrize("harm", ["never made", "another release", "nowhere"])
def test_the_link_leads_to_the_release_of_the_spec_though_nothing_changed(project: Project, harm: str) -> None:
    plan = project.plan()
    link = plan.store / MODEL
    if harm != "never made":
        other = plan.store / "04-release-00000000/model"
        if harm == "another release":
            other.mkdir(parents=True)
        link.symlink_to(other.relative_to(plan.store))
    assert nothing_to_do(Run(project.folder / "spec.yaml", project.root), plan)
    assert link.resolve() == plan.steps[-1].target / "model"


@pytest.mark.parametrize("ending", [".used", ".run", ".lock"])
def test_nothing_is_set_aside_that_another_run_makes_or_works_from(
    project: Project, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    monkeypatch.setattr(engine, "check_inputs", lambda *_: None)  # its base only looks like a model
    run = Run(project.folder / "spec.yaml", project.root, "knowledge", "answers")
    before = sorted(project.plan().store.glob("0*"))
    take = shared if ending == ".used" else exclusive
    with (
        take(lock(project, "answers", ending)),
        pytest.raises(TryAgain, match=rf"02-answers-\w+ is being worked on by process {os.getpid()} "),
    ):
        run_chain(run, Plain())
    assert sorted(project.plan().store.glob("0*")) == before
    assert not (project.plan().store / ".set-aside").exists()


@pytest.mark.model
@pytest.mark.crash
def test_a_run_goes_on_with_the_spec_that_it_began_with_and_holds_what_it_works_from(tmp_path: Path) -> None:
    spec = tiny.write_project(tmp_path, SPEC)
    run = Run(spec, tmp_path / "runs", None, None)
    held: list[str] = []

    def edit(step: Step, event: dict[str, Any]) -> None:
        if (event["event"], event.get("phase"), step.name) == ("phase_started", "train", "knowledge"):
            base = Run(spec, run.root).plan().steps[0]
            with (
                pytest.raises(TryAgain) as caught,
                exclusive(run.root / "tiny" / LOCKS / f"{base.work.name}.used"),
            ):
                pytest.fail("the base of a stage that trains can be moved away")
            held.append(str(caught.value))
            spec.write_text("stages: [half of a sp")

    outcomes = run_chain(run, Plain(edit))
    assert len(held) == 1
    assert [outcome.step.name for outcome in outcomes] == ["base", "knowledge", "release"]
    assert (run.root / "tiny" / MODEL).resolve().parent == outcomes[-1].step.place
