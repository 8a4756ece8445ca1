"""A chain of one stage on a tiny model: what the crash tests break."""

import os
import select
import signal
import traceback
from collections.abc import Callable
from pathlib import Path

from stages.job import Job
from stages.pipeline import load_pipeline
from stages.plan import make_plan
from stages.run import run_job

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


def only_job(spec: Path, root: Path) -> Job:
    """The job of the spec's one stage; the base is published below ``root`` if it is not yet."""
    pipeline, _ = load_pipeline(spec)
    plan = make_plan(pipeline, spec.parent.resolve(), root, until="only")
    if plan.steps[0].artifact is None:
        run_job(plan.job(plan.steps[0]))
        plan = make_plan(pipeline, spec.parent.resolve(), root, until="only")
    return plan.job(plan.steps[1])


def in_a_fork(body: Callable[[], object], seconds: float = 60) -> str:
    """What ``body`` returns or raises in a forked child, as text; limits that it sets end with the child."""
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(ours)
        try:
            # A fork has none of its parent's threads, and loading in several would ask torch for them.
            os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
            said = str(body())
        except BaseException as error:
            traceback.print_exc()
            said = f"{type(error).__name__}: {error}"
        with os.fdopen(theirs, "w") as pipe:
            pipe.write(said)
        os._exit(0)
    os.close(theirs)
    said = b""
    try:
        while select.select([ours], [], [], seconds)[0]:
            part = os.read(ours, 1 << 16)
            if not part:
                return said.decode()
            said += part
        raise AssertionError(f"the child said nothing for {seconds:.0f} s")
    finally:
        os.close(ours)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
