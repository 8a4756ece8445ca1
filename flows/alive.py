"""Which runs are alive: each holds a lock for as long as its process lives, and the kernel frees it.

A run that is killed cannot tell Prefect; it would stay Running for ever. Whoever comes next (`trivium run`,
`trivium ui`) sees that nobody holds its lock and marks it as crashed. No process ids, no clocks: an id may be
another's by now, and a run may sleep for days.
"""

import fcntl
import os
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import State

_HELD: list[int] = []
"""Descriptors of this process's locks; closed by its end alone."""


def hold(root: Path, run: UUID) -> None:
    """Lock the file of a run until this process ends.

    Args:
        root: The project's folder.
        run: The id of the flow run.

    Raises:
        OSError: The file cannot be written.
    """
    folder = _folder(root)
    folder.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=folder, prefix=".")
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    os.write(descriptor, socket.gethostname().encode())
    Path(name).rename(folder / str(run))  # it appears locked: in between nobody could take it for a dead run's
    _HELD.append(descriptor)


def dead(root: Path) -> list[UUID]:
    """The runs of this machine whose process is gone and that nobody has looked after."""
    return [UUID(file.name) for file in _files(root) if not _is_held(file)]


def mark_crashed(root: Path) -> list[str]:
    """Tell Prefect which runs are dead, with everything in them that was at work.

    Returns:
        The names of the flow runs that were marked.
    """
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound

    marked: list[str] = []
    ended = dead(root)
    if not ended:
        return marked
    with get_client(sync_client=True) as client:
        for run in ended:
            try:
                found = client.read_flow_run(run)
            except ObjectNotFound:  # another database by now
                found = None
            if found is not None and _at_work(found.state):
                _mark(client, run, found.state)
                marked.append(found.name)
            (_folder(root) / str(run)).unlink(missing_ok=True)
    return marked


def _mark(client: "SyncPrefectClient", run: UUID, state: "State[Any] | None") -> None:
    """The tasks first, then the stages, then the run: if this breaks off, the next one starts over."""
    from prefect.client.schemas.filters import (
        FlowRunFilter,
        FlowRunFilterId,
        FlowRunFilterParentFlowRunId,
    )
    from prefect.states import Cancelled, Crashed

    message = (
        "Its process was killed, or its machine went down, before it could report. What it published is kept, and "
        "running again goes on from the last checkpoint"
    )
    end = Cancelled if state is not None and state.is_cancelling() else Crashed
    stages = client.read_flow_runs(
        flow_run_filter=FlowRunFilter(parent_flow_run_id=FlowRunFilterParentFlowRunId(any_=[run]))
    )
    ids = [run, *(stage.id for stage in stages)]
    for task in client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=ids))):
        if _at_work(task.state):
            client.set_task_run_state(task.id, end(message=message), force=True)
    for stage in stages:
        if _at_work(stage.state):
            client.set_flow_run_state(stage.id, end(message=message), force=True)
    client.set_flow_run_state(run, end(message=message), force=True)


def _at_work(state: "State[Any] | None") -> bool:
    """A paused run waits for a person and needs no process; a scheduled one has none yet."""
    return state is not None and (state.is_running() or state.is_pending() or state.is_cancelling())


def _folder(root: Path) -> Path:
    return root.resolve() / ".prefect" / "runs"


def _files(root: Path) -> Iterator[Path]:
    here = socket.gethostname()
    for file in sorted(_folder(root).glob("[0-9a-f]*")):
        # A lock on a shared file system may not reach us: another machine's runs are its own to judge.
        if file.read_text(encoding="utf-8", errors="replace") == here:
            yield file


def _is_held(file: Path) -> bool:
    with file.open("rb") as open_file:
        try:
            fcntl.flock(open_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


if __name__ == "__main__":
    mark_crashed(Path(sys.argv[1]))
