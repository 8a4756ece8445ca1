"""The Prefect layer: a flow per run, a subflow per stage, a task per phase, over an engine that knows none.

Prefect shows and schedules; it neither caches nor retries. What is published is on the disk before Prefect
hears of it, so a lost server or database costs nothing. Outcomes are returned as named states, not raised:
a failed gate is one red line in the UI, not a traceback.
"""

import os
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State
from prefect.context import FlowRunContext
from prefect.states import Cancelled, Completed, Failed

from flows.artifacts import Reporter, report_run, report_stage
from flows.engine import Outcome, Run, run_chain
from flows.process import Event
from flows.summary import summarise
from specs.load import SpecError
from specs.secrets import redact
from stages.errors import GateRefused, InvalidInput, StageFailed, TriviumError, TryAgain
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

Listener = Callable[[Step, Event], None]
T = TypeVar("T")
_listener: Listener | None = None
_error: TriviumError | SpecError | None = None


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
    global _error  # noqa: PLW0603 - the command line wants the error itself, Prefect keeps a state
    redact_logging()
    run = Run(Path(spec), Path(root), from_stage, until_stage)
    hooks = _PrefectHooks(_listener)
    try:
        outcomes = run_chain(run, hooks)
    except (TriviumError, SpecError) as error:
        _error = error
        return _failed(error)
    finally:
        hooks.close()
        with suppress(TriviumError, SpecError):
            report_run(summarise(run.plan()))
    kept = sum(outcome.kept for outcome in outcomes)
    return Completed(name="Passed", message=f"{len(outcomes)} steps, {kept} of them kept")


def run_with_prefect(run: Run, listen: Listener) -> None:
    """Run the flow in this process.

    Raises:
        TriviumError: what the run itself raised.
    """
    global _listener, _error
    _listener, _error = listen, None
    state: State[Any] = pipeline(
        spec=str(run.spec),
        root=str(run.root),
        from_stage=run.from_stage,
        until_stage=run.until_stage,
        return_state=True,
    )
    if _error is not None:
        raise _error
    if not state.is_completed():
        raise StageFailed(f"the flow ended as {state.name}: {state.message}")


class _PrefectHooks:
    """Wraps steps into subflows and phases into tasks, and sends progress from a thread of its own."""

    def __init__(self, listener: Listener | None) -> None:
        self._listener = listener
        self._reporter: Reporter | None = None
        self._asked_to_stop = threading.Event()
        self._done = threading.Event()
        context = FlowRunContext.get()
        if context is not None and context.flow_run is not None:
            threading.Thread(target=self._watch, args=(context.flow_run.id,), daemon=True).start()

    def step(self, step: Step, body: Callable[[], Outcome]) -> Outcome:
        """One subflow, named after the stage."""

        def inside() -> Outcome:
            with Reporter(step) as self._reporter:
                outcome = body()
            report_stage(step, outcome)
            return outcome

        return _shielded(
            flow(name="stage", flow_run_name="{stage}", persist_result=False),
            inside,
            _state_of_step,
            {"stage": step.name, "identity": step.key},
        )

    def phase(self, step: Step, name: str, body: Callable[[], None]) -> None:
        """One task, called directly: in the main thread, where signals reach the stage's process."""
        _shielded(
            task(name=name, task_run_name=name, cache_policy=NO_CACHE, persist_result=False, retries=0),
            body,
            lambda _: Completed(),
            {},
        )

    def event(self, step: Step, event: Event) -> None:
        """To the terminal, and to the UI."""
        if self._listener is not None:
            self._listener(step, event)
        if self._reporter is not None:
            self._reporter.hear(event)

    def cancelled(self) -> bool:
        """Whether the run was cancelled in the UI."""
        return self._asked_to_stop.is_set()

    def close(self) -> None:
        """Stop watching."""
        self._done.set()

    def _watch(self, flow_run_id: Any) -> None:
        """A run that a terminal started has no runner that listens for its cancellation: ask for it."""
        with get_client(sync_client=True) as client:
            while not self._done.wait(POLL_SECONDS):
                with suppress(Exception):  # a server that is away must not stop the work
                    state = client.read_flow_run(flow_run_id).state
                    if state is not None and (state.is_cancelling() or state.is_cancelled()):
                        self._asked_to_stop.set()


def _shielded(
    wrap: Callable[[Callable[..., State[Any]]], Any],
    body: Callable[[], T],
    state_of: Callable[[T], State[Any]],
    parameters: dict[str, Any],
) -> T:
    """Run ``body`` inside a Prefect flow or task that shows its outcome, and give back what it gave or raised."""
    values: list[T] = []
    errors: list[TriviumError] = []

    def shielded(**_: Any) -> State[Any]:
        try:
            values.append(body())
        except TriviumError as error:
            errors.append(error)
            return _failed(error)
        return state_of(values[0])

    def named(stage: str, identity: str) -> State[Any]:
        """One step of the chain."""
        return shielded()

    wrap(named if parameters else shielded)(**parameters, return_state=True)
    if errors:
        raise errors[0]
    return values[0]


def _failed(error: TriviumError | SpecError) -> State[Any]:
    line = redact(str(error), os.environ).splitlines()[0] if str(error) else type(error).__name__
    if isinstance(error, TryAgain) and line.startswith("cancelled"):
        return Cancelled(message=line)
    return Failed(name=NAMES.get(type(error), "Invalid"), message=line)


def _state_of_step(outcome: Outcome) -> State[Any]:
    if not outcome.passed:
        warned = outcome.step.stage is not None and outcome.step.stage.on_gate_failure == "warn"
        state = Completed if warned else Failed
        return state(name="GateWarned" if warned else "GateFailed", message=outcome.line)
    return Completed(name="Cached" if outcome.kept else "Passed", message=outcome.line)
