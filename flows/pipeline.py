"""The Prefect layer: a flow per run, a subflow per stage, a task per phase, over an engine that knows none.

Prefect shows and schedules; it neither caches nor retries. What is published is on the disk before Prefect
hears of it, so a lost server or database costs nothing. Outcomes are returned as named states, not raised:
a failed gate is one red line in the UI, not a traceback.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

import httpx
from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State
from prefect.context import FlowRunContext
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, get_current_settings, temporary_settings
from prefect.states import Cancelled, Completed, Crashed, Failed

from flows import alive, suspension
from flows.artifacts import Reporter, report_run, report_stage
from flows.engine import Outcome, Run, run_chain
from flows.process import Event
from flows.report.page import keep_report
from flows.server import ServerError, embedded_died
from specs.load import SpecError
from specs.secrets import redact
from stages.approval import PAST, question_of
from stages.errors import AwaitingApproval, GateRefused, InvalidInput, StageFailed, StageSilent, TriviumError, TryAgain
from stages.faults import explain
from stages.log import redact_logging
from stages.plan import Step

NAMES: dict[type[Exception], str] = {
    GateRefused: "GateFailed",
    InvalidInput: "Invalid",
    StageFailed: "StageFailed",
    TryAgain: "TryAgain",
}
POLL_SECONDS = 5.0
"""How often a run asks whether somebody cancelled it in the UI."""
RUNNER_SECONDS = 1.0
"""How often a run that a runner started looks whether its runner still lives."""

ANSWER_SECONDS = 5.0
"""How long the server may take to say that it is there; a step does not wait longer for it."""

Listener = Callable[[Step, Event], None]
T = TypeVar("T")


@dataclass(frozen=True)
class _Ending:
    """How the work itself ended, whatever Prefect makes of it."""

    error: BaseException | None = None

    @property
    def interrupted(self) -> bool:
        """Whether somebody wanted the run to end."""
        return self.error is not None and not isinstance(self.error, Exception)


_listener: Listener | None = None
_endings: list[_Ending] = []
"""Of the run in this process: the command line wants the error itself, Prefect keeps a state."""


@flow(name="trivium", flow_run_name="{cause}: {spec}", persist_result=False, log_prints=False)
def pipeline(
    spec: str,
    root: str,
    from_stage: str | None = None,
    until_stage: str | None = None,
    cause: str = "run",
) -> State[Any]:
    """Bring every stage of a spec up to date.

    Args:
        spec: Path of the spec file.
        root: Folder of the artifacts.
        from_stage: Run this stage and all after it, published or not.
        until_stage: Leave out the stages after this one, and the release.
        cause: Why the run was started; part of its name.
    """
    redact_logging()
    run = Run(Path(spec), Path(root), from_stage, until_stage)
    hooks = _PrefectHooks(_listener)
    waiting: AwaitingApproval | None = None
    try:
        hooks.hold(run.root)
        run = hooks.resumed(run)
        outcomes = run_chain(run, hooks)
    except (TriviumError, SpecError, OSError) as error:
        reason = explain(error) if isinstance(error, OSError) else error
        _endings.append(_Ending(reason))
        if not isinstance(reason, AwaitingApproval):
            return _failed(reason)
        waiting = reason
    except BaseException as error:  # interrupted, or a fault of ours: the terminal gets it, Prefect its traceback
        _endings.append(_Ending(error))
        raise
    else:
        _endings.append(_Ending())
    finally:
        if not _endings[0].interrupted:
            hooks.report(run)
        hooks.close()
    if waiting is not None:
        hooks.suspend(run, waiting)
        return _failed(waiting)
    kept = sum(outcome.kept for outcome in outcomes)
    return Completed(name="Passed", message=f"{len(outcomes)} steps, {kept} of them kept")


def run_with_prefect(run: Run, listen: Listener) -> None:
    """Run the flow in this process; where Prefect cannot be told how it ended, the terminal is.

    Raises:
        TriviumError: what the run itself raised.
        ServerError: Prefect could not be told that it begins; nothing was done.
    """
    global _listener  # noqa: PLW0603 - a flow's parameters are kept and shown, so it cannot be one
    _listener = listen
    _endings.clear()
    unheard = ""
    try:
        pipeline(
            spec=str(run.spec),
            root=str(run.root),
            from_stage=run.from_stage,
            until_stage=run.until_stage,
            return_state=True,
        )
    except BaseException as lost:
        if not _endings:
            if isinstance(lost, httpx.HTTPError):
                reason = f"Prefect cannot be told that a run begins: {_line(lost)}; --no-prefect does without it"
                raise ServerError(reason) from lost
            raise
        if _endings[0].interrupted and not isinstance(lost, httpx.HTTPError):
            raise
        unheard = _line(lost)
    if not _endings:
        raise StageFailed("Prefect did not start the run; use --no-prefect")
    if unheard:
        sys.stderr.write(f"trivium: the results are safe in {run.root}; reporting to Prefect failed: {unheard}\n")
    ending = _endings[0]
    if ending.interrupted:  # by Prefect's own exception for SIGTERM, which means nothing to the command line
        raise KeyboardInterrupt from ending.error
    if ending.error is not None:
        raise ending.error


class _PrefectHooks:
    """Wraps steps into subflows and phases into tasks, and sends progress from a thread of its own."""

    def __init__(self, listener: Listener | None) -> None:
        self._listener = listener
        self._reporter: Reporter | None = None
        self._step: Step | None = None
        self._asked_to_stop = threading.Event()
        self._done = threading.Event()
        self._impatient = ExitStack()
        context = FlowRunContext.get()
        self._run = None if context is None else context.flow_run

    def hold(self, root: Path) -> None:
        """Let others see that this run is alive, clean up after dead ones, and watch whoever can end it.

        Raises:
            OSError: the root cannot be written.
        """
        if self._run is None:
            return
        alive.hold(root, self._run.id)
        with suppress(Exception):  # a matter of looks: it must not stop the work
            alive.mark_crashed(root)
        watch = self._watch_state if self._run.deployment_id is None else self._watch_runner
        threading.Thread(target=watch, args=(self._run.id,), daemon=True).start()

    def resumed(self, run: Run) -> Run:
        """The run as this process has it to do: one that a person let go on makes nothing anew that was forced."""
        if self._run is None or not suspension.was_suspended(self._run):
            return run
        suspension.take_answers(run, self._run, lambda line: get_run_logger().info(line))
        return replace(run, from_stage=None)

    def suspend(self, run: Run, waiting: AwaitingApproval) -> None:
        """Let a run of a deployment wait in Prefect: this process ends. Others end by themselves."""
        if self._run is not None:
            suspension.suspend(run, self._run, waiting.question)

    def step(self, step: Step, body: Callable[[], Outcome]) -> Outcome:
        """One subflow, named after the stage; while the server is away, the work alone."""
        self._step, self._reporter = step, None
        if not self._reachable():
            self.say(f"the Prefect server does not answer: {step.title} runs all the same, and will not be shown there")
            return body()

        def inside() -> Outcome:
            with Reporter(step) as self._reporter:
                outcome = body()
            if self._reachable():
                report_stage(step, outcome)
            return outcome

        return _shielded(
            flow(name="stage", flow_run_name="{stage}", persist_result=False),
            inside,
            _state_of_step,
            {"stage": step.title, "identity": step.key},
        )

    def phase(self, step: Step, name: str, body: Callable[[], None]) -> None:
        """One task, called directly: in the main thread, where signals reach the stage's process."""

        def inside() -> None:
            try:
                body()
            except BaseException as error:
                if not isinstance(error, Exception):  # whoever interrupts a run waits for no server
                    self._reachable()
                raise

        _shielded(
            task(name=name, task_run_name=name, cache_policy=NO_CACHE, persist_result=False, retries=0),
            inside,
            lambda _: Completed(),
            {},
        )

    def event(self, step: Step, event: Event) -> None:
        """To the terminal, and to the UI."""
        if self._listener is not None:
            self._listener(step, event)
        if self._reporter is not None:
            self._reporter.hear(event)

    def say(self, line: str) -> None:
        """A line for the terminal."""
        if self._step is not None:
            self.event(self._step, {"event": "info", "message": line})

    def cancelled(self) -> bool:
        """Whether the run was cancelled in the UI."""
        return self._asked_to_stop.is_set()

    def report(self, run: Run) -> None:
        """Page and table of the whole chain. A server that is away has some minutes to come back, if it can at all."""
        if self._run is not None and self._run.deployment_id is not None:  # else the command writes it
            with suppress(Exception):  # a full disk, a document of another version
                keep_report(run.plan(), run.spec)
        retries = get_current_settings().client.max_retries
        if not self._reachable() and not embedded_died():
            waits = 2 ** (retries + 1) - 2  # as long as Prefect's client asks
            self.say(
                f"the work is done and safe in {run.root}; the Prefect server does not answer and is waited for, up to "
                f"{waits} s; Ctrl-C leaves at once and loses nothing"
            )
            deadline = time.monotonic() + waits
            while time.monotonic() < deadline and not self._reachable():
                time.sleep(1)
        if self._reachable():
            with suppress(TriviumError, SpecError, OSError):
                report_run(run.plan())

    def close(self) -> None:
        """Stop watching."""
        self._done.set()

    def _reachable(self) -> bool:
        """Whether the server answers. While it does not, Prefect's client asks once, and not for minutes each time."""
        self._impatient.close()
        answers = server_answers()
        if not answers:
            self._impatient.enter_context(temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}))
        return answers

    def _watch_state(self, run: UUID) -> None:
        """A run that a terminal started has no runner that listens for its cancellation: ask for it."""
        with get_client(sync_client=True) as client:
            while not self._done.wait(POLL_SECONDS):
                with suppress(Exception):  # a server that is away must not stop the work
                    state = client.read_flow_run(run).state
                    if state is not None and (state.is_cancelling() or state.is_cancelled()):
                        self._asked_to_stop.set()

    def _watch_runner(self, _: UUID) -> None:
        """A runner ends its runs when it is told to stop; one that is killed cannot, so they end themselves.

        Not by the kernel's parent-death signal: that one follows the thread that started us, which may end earlier.
        """
        runner = os.getppid()
        while not self._done.wait(RUNNER_SECONDS):
            if os.getppid() != runner:
                os.kill(os.getpid(), signal.SIGTERM)
                return


def server_answers() -> bool:
    """Whether a server is there at all, by one short question: Prefect's own client would ask for minutes."""
    url = get_current_settings().api.url
    if not url:
        return True  # Prefect embeds one where it needs it
    try:
        httpx.get(f"{url}/health", timeout=ANSWER_SECONDS)
    except httpx.HTTPError:
        return False
    return True


def _shielded(
    wrap: Callable[[Callable[..., State[Any]]], Any],
    body: Callable[[], T],
    state_of: Callable[[T], State[Any]],
    parameters: dict[str, Any],
) -> T:
    """Run ``body`` inside a Prefect flow or task that shows its outcome, and give back what it gave or raised."""
    values: list[T] = []
    errors: list[BaseException] = []

    def shielded(**_: Any) -> State[Any]:
        try:
            values.append(body())
        except (TriviumError, OSError) as error:
            errors.append(error)
            return _failed(explain(error))
        except BaseException as error:  # an interruption too: a server that is away must not turn it into another try
            errors.append(error)
            raise
        return state_of(values[0])

    def named(stage: str, identity: str) -> State[Any]:
        """One step of the chain."""
        return shielded()

    try:
        wrap(named if parameters else shielded)(**parameters, return_state=True)
    except httpx.HTTPError:  # the server went away
        if not values and not errors:
            shielded()
    if errors:
        raise errors[0]
    return values[0]


def _failed(error: Exception) -> State[Any]:
    line = _line(error)
    if isinstance(error, AwaitingApproval):  # neither a success nor a failure, and no process that goes on
        return Cancelled(name="AwaitingApproval", message=line)
    if isinstance(error, TryAgain) and line.startswith("cancelled"):
        return Cancelled(message=line)
    if isinstance(error, StageSilent):
        return Crashed(message=line)
    return Failed(name=NAMES.get(type(error), "Invalid"), message=line)


def _line(error: BaseException) -> str:
    """The first line of an error, without secrets."""
    lines = redact(str(error), os.environ).splitlines()
    return lines[0] if lines else type(error).__name__


def _state_of_step(outcome: Outcome) -> State[Any]:
    if outcome.settled and question_of(outcome.step, outcome.verdicts) is not None:
        if outcome.decision is None:
            return Cancelled(name="AwaitingApproval", message=f"waits for a person: {outcome.line}")
        decided = Completed if outcome.decision.approved else Failed
        return decided(name=PAST[outcome.decision.answer].capitalize(), message=outcome.line)
    if not outcome.passed:
        warned = outcome.settled and outcome.step.policy == "warn"
        state = Completed if warned else Failed
        return state(name="GateWarned" if warned else "GateFailed", message=outcome.line)
    return Completed(name="Cached" if outcome.kept else "Passed", message=outcome.line)
