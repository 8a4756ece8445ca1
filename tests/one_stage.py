"""A chain of one stage on a tiny model: what the crash tests break."""

import json
import os
import select
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from stages import run
from stages.errors import StageFailed
from stages.job import Job, write_job
from stages.pipeline import load_pipeline
from stages.plan import make_plan

CPT = "kind: cpt\ndata: [{path: data/corpus.jsonl}]"
IFT = "kind: ift\ndata: [{path: data/instructions.jsonl}]"
DPO = "kind: dpo\ndata: [{path: data/pairs.jsonl}]"
TRAIN = "learning_rate: 1e-3, max_steps: 3, batch_size: 4, micro_batch_size: 2, sequence_length: 48"


def write_spec(folder: Path, objective: str = CPT, method: str = "full", train: str = TRAIN, head: str = "") -> Path:
    """A spec of one stage, `only`, on the model in ``folder / "base"``."""
    lines = [*objective.splitlines(), f"method: {{kind: {method}}}", f"train: {{{train}}}"]
    stage = "\n".join(f"    {line}" for line in lines)
    spec = folder / "spec.yaml"
    spec.write_text(
        f"name: it\nmodel: {{path: base, dtype: float32}}\nseed: 5\n{head}stages:\n  - name: only\n{stage}\n"
    )
    return spec


def only_job(spec: Path, root: Path, folder: Path | None = None) -> Job:
    """The job of the spec's one stage; the base is published below ``root`` if it is not yet.

    ``folder`` is what the spec's paths start from, where that is not the spec's own.
    """
    pipeline, _ = load_pipeline(spec)
    folder = folder or spec.parent.resolve()
    plan = make_plan(pipeline, folder, root, until="only")
    if plan.steps[0].artifact is None:
        run.run_job(plan.job(plan.steps[0]))
        plan = make_plan(pipeline, folder, root, until="only")
    return plan.job(plan.steps[1])


def at_each_call(module: ModuleType, name: str, act: Callable[[], object]) -> Callable[[], None]:
    """A harm: each call of the named function begins with ``act``."""
    call = getattr(module, name)

    def harm() -> None:
        def harmed(*given: Any, **named: Any) -> Any:
            act()
            return call(*given, **named)

        setattr(module, name, harmed)

    return harm


def in_a_fork(job: Job, harm: Callable[[], object], seconds: float = 60) -> tuple[int, list[dict]]:
    """The exit code and the events of a step's process, forked, in which ``harm`` is done first.

    Limits that it sets, and what it patches, end with the child.
    """
    file = Path(job.work).with_suffix(".json")
    write_job(job, file)
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        code = 99
        try:
            os.close(ours)
            os.dup2(theirs, 1)
            sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # noqa: SIM115
            # A fork has none of its parent's threads, and loading in several would ask torch for them.
            os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
            harm()
            code = run.main([str(file)])
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(theirs)
    said = b""
    try:
        while select.select([ours], [], [], seconds)[0]:
            part = os.read(ours, 1 << 16)
            if not part:
                break
            said += part
        else:
            raise AssertionError(f"the child said nothing for {seconds:.0f} s, after {said[-500:]!r}")
    finally:
        os.close(ours)
        os.kill(child, signal.SIGKILL if not said.endswith(b"\n") else 0)
        _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), [json.loads(line) for line in said.splitlines()]


def reason(job: Job, harm: Callable[[], object]) -> str:
    """Why a step's process failed in which ``harm`` was done first; it must end with 4, and say so."""
    code, events = in_a_fork(job, harm)
    assert code == StageFailed.exit_code, events
    assert events[-1]["event"] == "failed", events
    assert events[-1]["exit_code"] == code
    return str(events[-1]["reason"])
