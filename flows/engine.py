"""The chain: a loop over the plan. Knows nothing of Prefect, which hooks in through `Hooks`."""

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from flows import process
from flows.project import command
from flows.release_link import point_to_release, withdraw
from stages.approval import Decision, decision_about, question_of, record_verdict, require_approval, verdict_record
from stages.artifact import JOBS, VERDICT, lock_file, set_aside
from stages.check import check_base, check_inputs
from stages.documents import read_sealed
from stages.errors import GateRefused, InvalidInput, TriviumError
from stages.faults import explain
from stages.gate import Verdict
from stages.job import Job, write_job
from stages.lock import ENDINGS, RUN, USE, exclusive, shared
from stages.pipeline import Pipeline, load_pipeline
from stages.plan import RELEASE, Plan, Step, make_plan
from stages.store import remember

PHASES = {
    "base": ("load", "evaluate"),
    "stage": ("load", "train", "merge", "evaluate"),
    "release": ("release", "evaluate"),
}
_WARM_FROM = {"merge", "evaluate"}


@dataclass(frozen=True)
class Outcome:
    """What a step came to."""

    step: Step
    kept: bool
    """Nothing had to be made or measured."""
    verdicts: tuple[Verdict, ...]
    decision: Decision | None = None
    """What a person said to gates that refuse."""
    settled: bool = True
    """Whether the chain goes on from here, or ends; false where its gates refuse an attempt and another is next."""

    @property
    def passed(self) -> bool:
        """Whether every gate passed; true where there is none."""
        return all(verdict.passed for verdict in self.verdicts)

    @property
    def line(self) -> str:
        """One line for people."""
        return self.gates_line if self.decision is None else f"{self.decision}; {self.gates_line}"

    @property
    def gates_line(self) -> str:
        """What the gates came to, in one line."""
        if not self.verdicts:
            return "kept" if self.kept else "done"
        against = [verdict for verdict in self.verdicts if not verdict.passed]
        if not against:
            return f"{len(self.verdicts)} of {len(self.verdicts)} gates passed"
        count = Counter(verdict.outcome for verdict in against)
        said = [f"{count[outcome]} {outcome}" for outcome in ("failed", "undecided") if count[outcome]]
        said[0] = said[0].replace(" ", f" of {len(self.verdicts)} gates ")
        return f"{', '.join(said)}: {' | '.join(verdict.reason for verdict in against)}"


class Hooks(Protocol):
    """Where somebody watches a run, or wraps its parts."""

    def step(self, step: Step, body: Callable[[], Outcome]) -> Outcome:
        """Run one step."""

    def phase(self, step: Step, name: str, body: Callable[[], None]) -> None:
        """Run one phase of a step."""

    def event(self, step: Step, event: process.Event) -> None:
        """Hear what the step's process says."""

    def cancelled(self) -> bool:
        """Whether somebody asked for the run to end."""


@dataclass
class Plain:
    """No wrapping; events go to one function."""

    listen: Callable[[Step, process.Event], None] = field(default=lambda _step, _event: None)

    def step(self, step: Step, body: Callable[[], Outcome]) -> Outcome:
        """Run it."""
        return body()

    def phase(self, step: Step, name: str, body: Callable[[], None]) -> None:
        """Run it."""
        body()

    def event(self, step: Step, event: process.Event) -> None:
        """Pass it on."""
        self.listen(step, event)

    def cancelled(self) -> bool:
        """Nobody can ask."""
        return False


@dataclass(frozen=True)
class Run:
    """What a run is asked to do."""

    spec: Path
    root: Path
    from_stage: str | None = None
    """Run this stage and all after it, published or not."""
    until_stage: str | None = None
    """Leave out the stages after this one, and the release."""

    def plan(self, *, forced: bool = False, pipeline: Pipeline | None = None) -> Plan:
        """Compare the spec with what is published.

        Args:
            forced: plan with `from_stage`.
            pipeline: the spec as it was read before; None reads it.

        Raises:
            SpecError: the spec is invalid.
            InvalidInput: a named stage or a file does not exist.
        """
        if pipeline is None:
            pipeline, _ = load_pipeline(self.spec)
        names = [stage.name for stage in pipeline.stages]
        for option, name in (("--from", self.from_stage), ("--until", self.until_stage)):
            if name is not None and name not in names:
                raise InvalidInput(f"{option} {name}: no such stage; stages: {', '.join(names)}")
        return make_plan(
            pipeline,
            self.spec.parent.resolve(),
            self.root,
            forced_from=self.from_stage if forced else None,
            until=self.until_stage,
        )


def run_chain(run: Run, hooks: Hooks) -> list[Outcome]:
    """Bring everything up to date, step by step, and judge it.

    Raises:
        TriviumError: the reason why it ended early; what was published stays.
    """
    try:
        return _run_chain(run, hooks)
    except OSError as error:  # a full or read-only disk: in this process as bad as in a stage's
        raise explain(error) from error


def _run_chain(run: Run, hooks: Hooks) -> list[Outcome]:
    plan = run.plan(forced=True)
    remember_plan(run, plan)
    if plan.pending:
        check_inputs(plan.pipeline, plan.folder)
    _set_aside(run, plan, forced=True)
    outcomes: list[Outcome] = []
    try:
        for number in range(len(plan.steps)):
            if plan.steps[number].name == RELEASE:
                _compare(run, plan, hooks, outcomes)
            plan = _bring_up(run, plan, number, hooks, outcomes)
            try:
                _stop_if_refused(run, plan, outcomes[-1])
            except TriviumError:
                _keep_card(run, plan)  # of a release that was made when the gates still passed
                raise
    finally:
        process.dismiss()
    if run.until_stage is None:
        point_to_release(plan)
        _keep_card(run, plan)
    return outcomes


def _bring_up(run: Run, before: Plan, number: int, hooks: Hooks, outcomes: list[Outcome]) -> Plan:
    """Do a step; where its gates refuse it and another attempt is left, that one next. Returns the plan as it is then.

    Args:
        run: what was asked for.
        before: the plan as it was.
        number: the step's place in it.
        hooks: are told.
        outcomes: is added to, an outcome for each attempt.
    """
    while True:
        # Anew, for the files under a step may have changed while others ran; of the spec as it was: who edits it
        # meanwhile means the next run.
        plan = run.plan(pipeline=before.pipeline)
        if plan.steps != before.steps and plan.steps[number].attempts > 1:
            _set_aside(run, plan)
            remember_plan(run, plan)

        def body(plan: Plan = plan) -> Outcome:
            outcome = _run_step(plan, plan.steps[number], hooks)
            return replace(outcome, settled=_is_settled(run, plan, outcome))

        outcomes.append(hooks.step(plan.steps[number], body))
        if outcomes[-1].settled:
            return plan
        before = plan


def _compare(run: Run, before: Plan, hooks: Hooks, outcomes: list[Outcome]) -> None:
    """Measure in full what the release will be compared with: late, so that no attempt that is refused costs it."""
    for number in range(len(before.references)):
        plan = run.plan(pipeline=before.pipeline)
        step = plan.references[number]
        if step.missing:
            outcomes.append(hooks.step(step, lambda plan=plan, step=step: _run_step(plan, step, hooks)))  # type: ignore[misc]


def _is_settled(run: Run, plan: Plan, outcome: Outcome) -> bool:
    """Whether the chain goes on with an attempt, now that it was judged."""
    step = outcome.step
    return outcome.passed or run.plan(pipeline=plan.pipeline).steps[step.order].key == step.key


def _stop_if_refused(run: Run, plan: Plan, outcome: Outcome) -> None:
    """End the run where gates refuse a stage, or the release, and the spec says stop, or a person does.

    Raises:
        GateRefused: they do.
        AwaitingApproval: a person has to decide.
    """
    step = outcome.step
    if outcome.passed or step.policy == "warn":
        return
    best = "" if step.attempts == 1 else f"all {step.attempts} attempts were refused, and this is the best: "
    who = f"stage {step.title}" if step.name != RELEASE else "the release is made and not let out"
    approved = outcome.decision is not None and outcome.decision.approved
    withdrawn = "" if approved or step.name != RELEASE else withdraw(plan)
    if (asked := question_of(step, outcome.verdicts)) is not None:
        until = [] if run.until_stage is None else ["--until", run.until_stage]
        require_approval(
            asked,
            best + outcome.gates_line + withdrawn,
            approve=command("approve", run.spec, run.root),
            run=command("run", run.spec, run.root, *until),
        )
    else:
        raise GateRefused(f"{who}: {best}{outcome.line}{withdrawn}")


def _set_aside(run: Run, plan: Plan, *, forced: bool = False) -> None:
    """Move away what is to be made anew, unless another run makes it, or makes something from it.

    Args:
        run: what was asked for.
        plan: what is damaged, or forced.
        forced: whether it was planned with `from_stage`.

    Raises:
        TryAgain: one does; nothing was moved.
    """
    with ExitStack() as locks:
        held = {step.key for step in plan.named if step.damaged is not None}
        for step in plan.named:
            if step.key in held:
                for ending in ENDINGS:
                    locks.enter_context(exclusive(_lock(plan, step, ending), step.target.name))
        # Planned again under the locks: another run may have made it anew since.
        for step in run.plan(forced=forced, pipeline=plan.pipeline).named if held else ():
            if step.damaged is not None and step.key in held:
                set_aside(step.damaged)


def _lock(plan: Plan, step: Step, ending: str) -> Path:
    return lock_file(plan.store, step.work.name, ending)


def nothing_to_do(run: Run, plan: Plan) -> bool:
    """Whether all is published and passed; then only what a killed run did not come to is made good."""
    if not is_done(plan):
        return False
    remember_plan(run, plan)
    point_to_release(plan)
    _keep_card(run, plan)
    return True


def _keep_card(run: Run, plan: Plan) -> None:
    """Bring the model card beside the release up to date: a gate that was edited gives another one."""
    from flows.model_card import keep_card

    keep_card(run.plan(pipeline=plan.pipeline), run.spec)


def _run_step(plan: Plan, step: Step, hooks: Hooks) -> Outcome:
    kept = step.artifact is not None and not step.missing
    if not kept:
        _work(plan, step, hooks)
    if step.order == 0:
        check_base(plan.pipeline, step)
    verdicts: list[Verdict] = []
    if step.gates:
        hooks.phase(step, "gate", lambda: verdicts.extend(_judge(plan, step)))
    return Outcome(step, kept, tuple(verdicts), decision_about(step, verdicts))


def _work(plan: Plan, step: Step, hooks: Hooks) -> None:
    job = plan.job(step)
    # The step's process takes the job's lock. This one is for what is written before: a second run of the same step
    # must leave the job file and the log of the first alone.
    name = Path(job.target).name
    start = plan.steps[step.order - 1] if step.order else None
    used = nullcontext() if start is None else shared(_lock(plan, start, USE), start.place.name)
    with used, exclusive(_lock(plan, step, RUN), name):
        with exclusive(job.lock, name):
            pass  # nobody does the step by hand, and no process of a killed run is still saving its checkpoint
        _work_alone(plan, step, job, hooks)


def _work_alone(plan: Plan, step: Step, job: Job, hooks: Hooks) -> None:
    file = plan.store / JOBS / f"{step.name}-{step.key[:16]}.json"
    write_job(job, file)
    phases = [name for name in PHASES[job.kind] if name != "evaluate" or job.measurements]
    if not job.make:
        phases = ["evaluate"]
    offline = plan.pipeline.is_offline
    following = next((later for later in plan.steps[step.order + 1 :] if later in plan.pending), None)

    def say(line: str) -> None:
        hooks.event(step, {"event": "info", "message": line})

    child = process.start(job.kind, file, step.title, offline=offline)
    events = child.events(hooks.cancelled, say)

    def until_done(phase: str | None) -> None:
        for event in events:
            hooks.event(step, event)
            if event["event"] == "phase_started" and event["phase"] in _WARM_FROM and following is not None:
                process.warm(plan.job(following).kind, offline=offline)
            if event["event"] == "phase_done" and event["phase"] == phase:
                return
        # It ended well without this phase: another run has published the step meanwhile.

    try:
        for phase in phases:
            hooks.phase(step, phase, lambda phase=phase: until_done(phase))  # type: ignore[misc]
        until_done(None)
    finally:
        child.stop(say)


def is_done(plan: Plan) -> bool:
    """Whether nothing is left to do: all is published, measured and accepted, and the kept verdict says so."""
    return not plan.pending and all(_is_judged(step, plan.verdicts(step)) for step in plan.steps)


def _is_judged(step: Step, verdicts: list[Verdict]) -> bool:
    if not verdicts:
        return True
    try:
        decision = decision_about(step, verdicts)
        accepted = all(one.passed for one in verdicts) or (decision is not None and decision.approved)
        return accepted and read_sealed(step.place / VERDICT) == verdict_record(step, verdicts)
    except InvalidInput:
        return False


def remember_plan(run: Run, plan: Plan) -> None:
    """Keep which steps the whole spec names, so that `trivium gc` leaves them alone."""
    whole = (
        plan
        if run.until_stage is None
        else replace(run, from_stage=None, until_stage=None).plan(pipeline=plan.pipeline)
    )
    remember(whole, run.spec)


def _judge(plan: Plan, step: Step) -> list[Verdict]:
    """Judge a step and keep the verdict beside its artifact."""
    verdicts = plan.verdicts(step)
    record_verdict(step, verdicts)
    return verdicts
