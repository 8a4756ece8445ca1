"""`trivium approve` and `trivium reject`: a person decides on a stage that its gates refuse.

The decision goes into the store first. A run that Prefect suspended for it is resumed afterwards, where its server
answers; where it does not, the next `trivium run` finds the decision all the same.
"""

import getpass
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from uuid import UUID

from cyclopts import Parameter

from flows.project import ARTIFACTS, DEFAULT_SPEC, Root, command, root_of
from specs.printable import printable_line
from stages.errors import InvalidInput

if TYPE_CHECKING:
    from stages.approval import Answer, Decision, Question
    from stages.plan import Plan

_ID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)

RunName = Annotated[
    str, Parameter(help="A spec, a project folder, or the id, the URL or the name of a flow run in Prefect.")
]
Why = Annotated[str, Parameter(help="The reason; kept with the verdict.")]
StageName = Annotated[str | None, Parameter(name="--stage", help="Which stage, where several wait.")]
Who = Annotated[str | None, Parameter(help="Who decides; the login name by default.")]


def approve(run: RunName, *, why: Why, stage: StageName = None, who: Who = None, root: Root = None) -> None:
    """Let a run go on from a stage that its gates refuse and whose spec says `on_gate_failure: approve`."""
    _decide("approve", run, why, stage, who, root)


def reject(run: RunName, *, why: Why, stage: StageName = None, who: Who = None, root: Root = None) -> None:
    """End a run at a stage that its gates refuse and whose spec says `on_gate_failure: approve`."""
    _decide("reject", run, why, stage, who, root)


def _decide(answer: "Answer", name: str, why: str, stage: str | None, who: str | None, root: Path | None) -> None:
    from flows.engine import Run
    from stages.approval import decide, decision_on, unbelievable

    spec, place = _spec_and_root(name, root)
    plan = Run(spec, place).plan()
    question = _chosen(plan, stage, spec)
    known = decision_on(question)
    if (wrong := unbelievable(question)) != "":
        print(printable_line(wrong))  # noqa: T201
    kept = known or decide(plan, question, answer, who=_login() if who is None else who, why=why)
    ours = known is None and kept.answer == answer
    resumed, note = _resumed(place, spec, question, kept)
    if not ours and not (resumed and kept.answer == answer):
        raise InvalidInput(
            f"stage {question.step.name} was decided already: {kept}. The first decision counts; a gate that is "
            "edited, or a new measurement, asks again"
        )
    print(f"stage {question.step.name}: {kept}")  # noqa: T201
    for line in resumed:
        print(line)  # noqa: T201
    if note:
        print(note)  # noqa: T201
    if not resumed and kept.approved:
        print(f"go on with: {command('run', spec, place)}")  # noqa: T201


def _spec_and_root(name: str, root: Path | None) -> tuple[Path, Path]:
    """The spec and the artifacts' folder that a run is named by.

    Raises:
        InvalidInput: there is no such file, folder or flow run.
    """
    path = Path(name)
    try:
        is_folder, is_there = path.is_dir(), path.exists()
    except (OSError, ValueError):  # a name that no file can have
        is_folder = is_there = False
    spec = path / DEFAULT_SPEC if is_folder else path
    if is_there:
        if not spec.is_file():
            raise InvalidInput(f"{spec}: no such file; name a spec, a project folder or a flow run")
        return spec.absolute(), root_of(spec, root)
    if path.suffix in {".yaml", ".yml"} or ("/" in name and not _ID.search(name)):
        raise InvalidInput(f"{name}: no such file; name a spec, a project folder or a flow run")
    return _of_flow_run(name, Path(ARTIFACTS) if root is None else root)


def _of_flow_run(name: str, root: Path) -> tuple[Path, Path]:
    if not _has_server(root):
        raise InvalidInput(
            f"{name}: no spec or folder is called so, and no Prefect server answers that could know a run of this "
            "name; name the spec, or say this in the project's folder while `trivium ui` runs there"
        )
    from flows.suspension import find_run

    found = _ID.search(name)
    return find_run(UUID(found[0]) if found else name)


def _chosen(plan: "Plan", stage: str | None, spec: Path) -> "Question":
    """The question that is meant.

    Raises:
        InvalidInput: none waits, or several do.
    """
    from stages.approval import decision_on, questions

    asked = questions(plan)
    names = [step.name for step in plan.steps if step.stage is not None or step.gates]
    if stage is not None:
        if stage not in names:
            raise InvalidInput(f"--stage {stage}: no such stage; stages: {', '.join(names)}")
        asked = [one for one in asked if one.step.name == stage]
    waiting = [one for one in asked if decision_on(one) is None]
    if len(waiting) > 1:
        listed = ", ".join(one.step.name for one in waiting)
        raise InvalidInput(f"{spec}: {len(waiting)} stages wait for a decision; choose one with --stage: {listed}")
    if not waiting and not asked:
        raise InvalidInput(f"{spec}: nothing waits for a decision: {_why_nothing(plan, stage)}")
    return waiting[0] if waiting else asked[-1]


def _why_nothing(plan: "Plan", stage: str | None) -> str:
    askers = [step for step in plan.steps if step.policy == "approve" and stage in (None, step.name)]
    if not askers:
        return "on_gate_failure is not approve" + ("" if stage is None else f" for stage {stage}")
    pending = [step.name for step in askers if step.artifact is None or step.missing]
    if pending:
        return f"{', '.join(pending)} has not run yet, or is not measured; see `trivium plan`"
    return "every gate passes"


def _login() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError) as error:  # a container whose user has no name
        raise InvalidInput("nobody is logged in by a name; say who decides with --who") from error


def _resumed(root: Path, spec: Path, question: "Question", decision: "Decision") -> tuple[list[str], str]:
    """A line for each suspended run that goes on now, and what to know where Prefect could not be asked."""
    if not (root / ".prefect").is_dir() and not os.environ.get("PREFECT_API_URL"):
        return [], ""
    if not _has_server(root):
        return [], (
            "No Prefect server answers. If a suspended run waits there, say this again while the server runs (trivium "
            "ui), and it is resumed"
        )
    from flows.suspension import resume_all

    return resume_all(spec, root, question, decision)


def _has_server(root: Path) -> bool:
    """Point Prefect at the user's server or the project's own; whether one is there."""
    if not (root / ".prefect").is_dir() and not os.environ.get("PREFECT_API_URL"):
        return False
    from flows.server import use_project_server

    url = use_project_server(root)
    if not url:
        return False
    from flows.pipeline import server_answers

    return server_answers()
