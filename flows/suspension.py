"""Runs that wait in Prefect for a person: how they are suspended, what the form shows, how they go on.

Only a run of a deployment can be suspended: its process ends, so nothing is held while it waits, and a new one goes
on from the store when it is resumed. The answer is taken into the store first and used from there, so whoever decides
elsewhere meanwhile (`trivium approve`) is not overruled.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowFilter, FlowFilterName, FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.filters import FlowRunFilterName as RunName
from prefect.client.schemas.filters import FlowRunFilterState as RunState
from prefect.client.schemas.filters import FlowRunFilterStateType as RunStateType
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.exceptions import Pause
from prefect.flow_runs import suspend_flow_run
from prefect.input import RunInput
from prefect.input.run_input import keyset_from_paused_state
from prefect.states import Suspended
from pydantic import Field

from flows.engine import Run
from flows.markdown import escaped, table
from flows.project import command
from specs.base import fingerprint
from specs.metric import GenerationSpec
from specs.pipeline import BASE, PREVIOUS
from specs.secrets import redact
from stages.approval import LONGEST, Decision, Question, decide, decision_on, questions
from stages.artifact import short
from stages.errors import InvalidInput
from stages.gate import Verdict
from stages.plan import Plan

FLOW = "trivium"
"""The name of the flow whose runs may be suspended."""
_PREFIX = "approval"
SAMPLES = 3
"""Prompts of each metric that the form shows, from the first on."""
CUT = 300
"""Characters of a prompt or an answer in the form."""


class ApprovalForm(RunInput):
    """What the UI asks for when somebody resumes the run."""

    decision: Literal["approve", "reject"] = Field(
        description="approve: the run goes on from this stage. reject: it ends here."
    )
    reviewer: str = Field(description="Who decides.", pattern=r"\S", max_length=LONGEST["who"])
    why: str = Field(description="The reason; kept with the verdict.", pattern=r"\S", max_length=LONGEST["why"])


def was_suspended(flow_run: FlowRun) -> bool:
    """Whether a person was asked in this run before: then this process goes on where another one left."""
    policy = flow_run.empirical_policy
    return any(key.startswith(f"{_PREFIX}-") for key in policy.pause_keys or ())


def take_answers(run: Run, flow_run: FlowRun, say: Callable[[str], None]) -> None:
    """Bring what was answered in the UI into the store.

    Args:
        run: what is run.
        flow_run: the run of Prefect's, as it was read when this process began.
        say: takes a line for people.
    """
    plan = run.plan()
    keys = flow_run.empirical_policy.pause_keys or set()
    for question in questions(plan):
        for key in sorted(keys):
            if not key.startswith(_key(question, "")):
                continue
            form = _answer(flow_run.id, key)
            if form is None:
                continue
            kept = decide(plan, question, form.decision, who=form.reviewer, why=form.why)
            if (kept.answer, kept.who) != (form.decision, form.reviewer):
                say(f"stage {question.step.name} was decided already: {kept}; this answer came second")


def _answer(flow_run: UUID, key: str) -> ApprovalForm | None:
    keyset = keyset_from_paused_state(Suspended(pause_key=key))
    try:
        return ApprovalForm.load(keyset, flow_run_id=flow_run)  # type: ignore[return-value]
    except httpx.HTTPStatusError as error:
        if error.response.status_code != httpx.codes.NOT_FOUND:
            raise
    except ValueError:  # resumed by hand, past the form
        pass
    return None


def suspend(run: Run, flow_run: FlowRun, question_key: str) -> None:
    """Let the run wait for a person. With a deployment this does not return: the process ends.

    Args:
        run: what is run.
        flow_run: the top-level run of Prefect's; one without a deployment is left alone.
        question_key: `stages.approval.Question.key`.
    """
    if flow_run.deployment_id is None:
        return
    plan = run.plan()
    question = next((one for one in questions(plan) if one.key == question_key), None)
    if question is None:
        return  # a gate was edited this moment; the next run asks what there is to ask
    form = ApprovalForm.with_initial_data(description=description(run, plan, question))
    times = len(flow_run.empirical_policy.pause_keys or ())
    try:
        suspend_flow_run(wait_for_input=form, key=_key(question, str(times)), timeout=None)
    except Pause:
        if (decision := decision_on(question)) is not None:  # `trivium approve` came in between, and saw no wait
            with get_client(sync_client=True) as client:
                _resume(client, flow_run.id, decision)
        raise


def _key(question: Question, end: str) -> str:
    """What Prefect calls a wait: letters, digits and dashes; another one each time, as an old one is passed by."""
    return f"{_PREFIX}-{question.key[:16]}-{_stage(question)}-{end}"


def _stage(question: Question) -> str:
    return short(fingerprint(question.step.name))  # the name itself may hold underscores


def find_run(name: str | UUID) -> tuple[Path, Path]:
    """The spec and the folder of the artifacts of a flow run, by its id or its name.

    Raises:
        InvalidInput: there is none, or several are called so.
    """
    which = FlowRunFilter(
        id=FlowRunFilterId(any_=[name]) if isinstance(name, UUID) else None,
        name=RunName(any_=[name]) if isinstance(name, str) else None,
    )
    with get_client(sync_client=True) as client:
        found = client.read_flow_runs(flow_filter=FlowFilter(name=FlowFilterName(any_=[FLOW])), flow_run_filter=which)
    places = {(one.parameters["spec"], one.parameters["root"]) for one in found if _is_ours(one)}
    if not places:
        raise InvalidInput(f"{name}: the Prefect server knows no run of trivium by this id or name")
    if len(places) > 1:
        raise InvalidInput(f"{name}: {len(places)} runs of different specs are called so; give the id of one")
    spec, root = places.pop()
    return Path(spec), Path(root)


def _is_ours(flow_run: FlowRun) -> bool:
    return all(isinstance(flow_run.parameters.get(name), str) for name in ("spec", "root"))


def resume_all(spec: Path, root: Path, question: Question, decision: Decision) -> tuple[list[str], str]:
    """Resume every suspended run that waits for a decision on this stage.

    Returns:
        A line for each that was resumed, and what went wrong with others.
    """
    paused = FlowRunFilter(state=RunState(type=RunStateType(any_=[StateType.PAUSED])))
    ours = FlowFilter(name=FlowFilterName(any_=[FLOW]))
    resumed: list[str] = []
    refused: list[str] = []
    try:
        with get_client(sync_client=True) as client:
            for flow_run in client.read_flow_runs(flow_filter=ours, flow_run_filter=paused):
                if not _waits_for(flow_run, spec, root, question):
                    continue
                problem = _resume(client, flow_run.id, decision)
                line = redact(f"the flow run {flow_run.name!r} ({flow_run.id})", os.environ)
                (refused if problem else resumed).append(f"{line} {problem or 'was resumed'}")
    except httpx.HTTPError as error:
        refused.append(f"The decision is kept, but the Prefect server could not be asked for suspended runs: {error}")
    return resumed, "; ".join(refused)


def _waits_for(flow_run: FlowRun, spec: Path, root: Path, question: Question) -> bool:
    key = None if flow_run.state is None else flow_run.state.state_details.pause_key
    if key is None or not _is_ours(flow_run) or not key.startswith(f"{_PREFIX}-"):
        return False
    places = [(flow_run.parameters["spec"], spec), (flow_run.parameters["root"], root)]
    return key.split("-")[2] == _stage(question) and all(
        os.path.realpath(theirs) == os.path.realpath(own) for theirs, own in places
    )


def _resume(client: SyncPrefectClient, flow_run: UUID, decision: Decision) -> str:
    """Answer a suspended run; what went wrong, or nothing."""
    given = {"decision": decision.answer, "reviewer": decision.who, "why": decision.why}
    result = client.resume_flow_run(flow_run, given)
    reason = getattr(result.details, "reason", None)
    return "" if result.status == "ACCEPT" else f"was not resumed: {reason}"


def description(run: Run, plan: Plan, question: Question) -> str:
    """What the form shows, as markdown: what the gates came to, some answers side by side, and where to read more."""
    step = question.step
    parts = [
        f"# Stage {escaped(step.title)}: its gates do not pass",
        f"Approve, and {escaped(plan.pipeline.name)} goes on from it as it is; reject, and the run ends here.",
        _gates(question.verdicts),
        *_samples(plan, question),
        f"The artifact: `{step.place}`",
        f'From a terminal: `{command("approve", run.spec, run.root)} --why "..."`',
    ]
    return redact("\n\n".join(parts), os.environ)


def _gates(verdicts: tuple[Verdict, ...]) -> str:
    head = ("gate", "outcome", "value", "compared with", "difference", "interval of the difference", "n")
    rows = [
        (
            escaped(one.gate),
            f"**{one.outcome}**",
            _number(one.value),
            _number(one.reference),
            _number(one.difference),
            "–" if one.low is None and one.high is None else f"{_number(one.low)} to {_number(one.high)}",
            "–" if one.n is None else f"{one.n:,}",
        )
        for one in verdicts
    ]
    # In words first: the form is narrow, and a wide table has to be scrolled.
    reasons = "\n".join(f"- **{one.outcome}**: {escaped(one.reason)}" for one in verdicts)
    return f"{reasons}\n\n{table(head, rows)}"


def _samples(plan: Plan, question: Question) -> list[str]:
    """A table per generation metric: a row per prompt, a column per model."""
    parts = []
    for metric, spec in plan.pipeline.metrics.items():
        if not isinstance(spec, GenerationSpec):
            continue
        columns: dict[str, list[dict[str, Any]]] = {}
        for where in (BASE, PREVIOUS, "here"):
            step = plan.step(where, question.step)
            evaluation = None if step is None else step.evaluation(metric)
            if step is not None and evaluation is not None:
                columns.setdefault(escaped(step.name), evaluation.samples[:SAMPLES])
        rows = [
            (_prompt(answers[0]["prompt"]), *(_cut(one["answer"]) for one in answers))
            for answers in zip(*columns.values(), strict=False)
        ]
        if rows:
            parts += [f"## Answers: {escaped(metric)}", table(("prompt", *columns), rows)]
    return parts


def _prompt(messages: list[dict[str, str]]) -> str:
    return _cut(messages[-1]["content"]) if messages else ""


def _cut(text: str) -> str:
    return escaped(text if len(text) <= CUT else f"{text[:CUT]}…")


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
