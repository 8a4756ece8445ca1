"""`trivium verify` and `trivium gc` as people meet them: what is printed, the exit code, what is imported."""

import subprocess
import sys
from pathlib import Path

import pytest
from unread import NAMES, Project, flip, make_project

from flows.engine import Run, is_done, remember_plan
from stages.artifact import VERDICT
from stages.documents import write_sealed

ALLOWED = {
    "annotated_types", "attr", "attrs", "cyclopts", "docstring_parser", "flows", "markdown_it", "mdurl", "pydantic",
    "pydantic_core", "pygments", "rich", "rich_rst", "ruamel", "_ruamel_yaml", "specs", "stages", "typing_extensions",
    "typing_inspection",
}  # fmt: skip
"""As for `plan`, see test_cli.py."""
OWN = ("__editable__", "_sysconfigdata", "_cython", "cython_runtime")


def trivium(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "flows.cli", *map(str, arguments)],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip


@pytest.fixture
def edited(tmp_path: Path) -> Project:
    """A project that was run, edited and run again."""
    project = make_project(tmp_path / "project")
    project.publish(*NAMES)
    project.edit(("learning_rate: 5e-3", "learning_rate: 1e-3"))
    project.publish(*NAMES[1:])
    spec = project.folder / "spec.yaml"
    remember_plan(Run(spec, project.root), project.plan())
    return project


def place(project: Project, name: str) -> Path:
    return next(step.place for step in project.plan().steps if step.name == name)


@pytest.mark.parametrize("command", ["verify", "gc"])
def test_neither_command_imports_torch_or_prefect(edited: Project, command: str) -> None:
    script = (
        "import sys; before = set(sys.modules); import flows.cli; "
        f"code = flows.cli._run([{command!r}, {str(edited.root)!r}]); assert code == 0, code; "
        "names = {name.partition('.')[0] for name in set(sys.modules) - before}; "
        "print('IMPORTED', *sorted(names - set(sys.stdlib_module_names)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    line = next(line for line in done.stdout.splitlines() if line.startswith("IMPORTED"))
    assert {name for name in line.split()[1:] if not name.startswith(OWN)} <= ALLOWED


def test_verify_of_a_whole_store_says_what_it_looked_at(edited: Project) -> None:
    done = trivium("verify", edited.root)
    assert (done.returncode, done.stderr) == (0, "")
    counted, verdict = done.stdout.splitlines()
    assert counted.startswith("looked at 9 artifacts, 28 measurements, 1 base elsewhere: ")
    assert verdict == "all is as it was recorded"


def test_verify_of_a_damaged_store_ends_with_4_and_names_everything(edited: Project) -> None:
    folder = place(edited, "answers")
    flip(folder / "model/model.safetensors")
    done = trivium("verify", edited.root)
    assert done.returncode == 4
    assert done.stdout.splitlines()[:4] == [
        f"damaged tiny/{folder.name}",
        "        model/model.safetensors was changed",
        f"        depends on it: {place(edited, 'manner').name}, {place(edited, 'release').name}",
        "        to do: `trivium run` on its spec sets it aside and makes it anew; where no spec needs it any more, "
        "remove it",
    ]
    assert done.stderr == "trivium: 1 thing damaged; what to do is said above\n"


def test_gc_lists_and_removes_only_with_yes(edited: Project) -> None:
    before = sorted(path.name for path in (edited.root / "tiny").iterdir())
    kept = {step.place.name for step in edited.plan().steps}
    listed = trivium("gc", edited.root)
    assert listed.returncode == 0
    assert "4 items, " in listed.stdout
    assert f"nothing was removed: `trivium gc {edited.root} --yes` removes it" in listed.stdout
    assert sorted(path.name for path in (edited.root / "tiny").iterdir()) == before
    removed = trivium("gc", edited.root, "--yes")
    assert removed.returncode == 0
    assert "removed 4 items, " in removed.stdout
    assert {path.name for path in (edited.root / "tiny").glob("[0-9]*")} == kept
    assert trivium("gc", edited.root).stdout == "nothing to remove\n"


@pytest.mark.parametrize("command", ["verify", "gc"])
def test_a_folder_without_artifacts_is_refused_and_not_called_whole(tmp_path: Path, command: str) -> None:
    refused = trivium(command, tmp_path)
    assert refused.returncode == 2
    assert f"{tmp_path}: no artifacts there; name the folder that holds them" in refused.stderr


def test_a_run_until_a_stage_protects_the_stages_after_it(edited: Project) -> None:
    spec = edited.folder / "spec.yaml"
    asked = Run(spec, edited.root, until_stage="knowledge")
    remember_plan(asked, asked.plan())
    assert "4 items, " in trivium("gc", edited.root).stdout


def test_nothing_is_left_to_do_only_when_the_kept_verdicts_are_those_of_todays_gates(edited: Project) -> None:
    edited.edit(
        (
            "gates: [{metric: domain, improves_on: base, by: 5%}]",
            "gates: [{metric: domain, at_most: 2, confidence: null}]",
        ),
        ("    gates: [{metric: answers, improves_on: previous}]\n", ""),
        ("    gates: [{metric: pairs, at_least: 0.6}]\n", ""),
    )
    plan = edited.plan()
    step = plan.steps[1]
    assert not is_done(plan), "nothing was judged yet"
    verdicts = [verdict.as_record() for verdict in plan.verdicts(step)]
    write_sealed(step.place / VERDICT, {"gates": verdicts, "passed": True})
    assert is_done(plan)
    old = {"gate": "domain at most 2", "passed": True, "value": 1.5, "reference": 2.0, "change": -0.5, "n": 1}
    write_sealed(step.place / VERDICT, {"gates": [old], "passed": True})
    assert not is_done(edited.plan()), "judged by gates of an older version"
    write_sealed(step.place / VERDICT, {"gates": verdicts, "passed": True})
    edited.edit(("at_most: 2", "at_most: 3"))
    assert not is_done(edited.plan()), "judged by another threshold"
    edited.edit(("at_most: 3", "at_most: 2"))
    flip(step.place / VERDICT, -20)
    assert not is_done(edited.plan()), "a verdict that was edited is none"
