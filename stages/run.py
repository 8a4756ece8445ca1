"""The process of one step, from its job file to its published artifact: ``python -m stages.run JOB``.

With ``--wait`` the process imports the heavy libraries first and then reads the path of its job from stdin, so that a
chain's next stage costs no imports.
"""

import os
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from specs.metric import JudgeSpec
from specs.pipeline import BASE
from stages import evaluate, heartbeat
from stages.artifact import Artifact, read, verified
from stages.documents import make_folder
from stages.errors import TriviumError
from stages.faults import explain
from stages.job import STAGE, Job, Measurement, read_job
from stages.judging import judge_of
from stages.lock import exclusive
from stages.log import event, open_channel, phase, phase_at_work
from stages.make import make_base, make_release, make_stage, peak_memory
from stages.model import load_tokenizer, training_device
from stages.plan import RELEASE
from stages.preemption import Preemption, die_with
from stages.remote_code import allowing
from stages.serving import assemble
from stages.template import dated

if TYPE_CHECKING:
    import torch


def run_job(job: Job, preemption: Preemption | None = None) -> Artifact:
    """Make the job's artifact if it is missing, then the measurements that are.

    Raises:
        TriviumError: the reason, for people; whatever was published before stays.
    """
    durations: dict[str, float] = {}
    model = job.pipeline.model
    with exclusive(job.lock, Path(job.target).name), allowing(model.allow_remote_code), dated(model.template_date):
        artifact = read(Path(job.target)) if Path(job.target).exists() else None
        made = None
        if artifact is None:
            work = Path(job.work)
            make_folder(work)
            make = {BASE: make_base, RELEASE: make_release}.get(job.kind, make_stage)
            made, artifact = make(job, work, durations, preemption)
        if job.measurements:
            with phase("evaluate", durations):
                judged = [one for one in job.measurements if one.answers is not None]
                if own := [one for one in job.measurements if one.answers is None]:
                    _measure(job, own, artifact, made)
                made = None  # a judge may be as large
                _let_judges_compare(job, judged)
    event("finished", artifact=str(artifact.path), durations=durations, peak_memory=peak_memory())
    return artifact


def _measure(job: Job, wanted: list[Measurement], artifact: Artifact, model: "torch.nn.Module | None") -> None:
    """Measure in the precision of the release, so that what gates judge is what people get."""
    import torch

    tokenizer = load_tokenizer(artifact.model)
    dtype = getattr(torch, job.pipeline.model.dtype)
    if job.kind == RELEASE:
        import_ahead(BASE)
    if model is None:
        model, _ = assemble(verified(artifact).model, artifact.adapter, dtype)
    model = model.to(device=training_device(), dtype=dtype).eval()
    for one in wanted:
        spec = job.pipeline.metric(one.metric, one.tier)
        assert not isinstance(spec, JudgeSpec)  # noqa: S101 - those read answers
        reference = None if one.reference is None else evaluate.load(Path(one.reference))
        found = evaluate.evaluate(
            spec,
            one.metric,
            Path(job.folder),
            model,
            tokenizer,
            chat_template=one.chat_template,
            reference=reference,
        )
        _keep(found, one)


def _let_judges_compare(job: Job, wanted: list[Measurement]) -> None:
    """What judges say of answers that were measured before, here and on other steps."""
    for one in wanted:
        spec = job.pipeline.metric(one.metric, one.tier)
        assert isinstance(spec, JudgeSpec)  # noqa: S101 - only these read answers
        ours, theirs = (evaluate.load(Path(str(file))) for file in (one.answers, one.reference))
        with judge_of(spec, one.metric, Path(job.folder), Path(job.target).parent) as ask:
            _keep(evaluate.evaluate_answers(spec, one.metric, ours, theirs, ask), one)


def _keep(found: evaluate.Evaluation, measurement: Measurement) -> None:
    evaluate.save(found, Path(measurement.file), measurement.identity)
    chosen = found.measure(None)
    event("measured", metric=measurement.metric, value=None if chosen is None else chosen.value)


def import_ahead(kind: str) -> None:
    """Import what a step of this kind needs: longer than a short stage's merge, unless another one works meanwhile."""
    import torch
    import transformers

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    _ = transformers.AutoModelForCausalLM, transformers.AutoTokenizer
    if kind == RELEASE:
        return
    import datasets
    import lm_eval.models.huggingface

    datasets.disable_progress_bars()
    datasets.disable_caching()
    if kind == STAGE:
        import peft
        import trl

        _ = (peft.PeftModel, trl.SFTTrainer, trl.DPOTrainer)
    _ = lm_eval.models.huggingface.HFLM


def main(arguments: list[str]) -> int:
    """Run one job; the exit code is that of `stages.errors`, and the reason is the last event."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")
    if arguments[:1] != ["--wait"]:
        return _run(Path(arguments[0]), imported=False)
    parent = int(arguments[1])
    die_with(parent)
    open_channel(Path(os.devnull))
    heartbeat.start(parent)
    try:
        import_ahead(arguments[2])
    except Exception as error:  # before there is a log: what is not told now is told nowhere
        return _fail(error, None)
    event("ready")
    line = sys.stdin.readline().strip()
    try:
        return _run(Path(line), imported=True) if line else 0
    finally:
        heartbeat.end_children()


def _run(job_file: Path, *, imported: bool) -> int:
    open_channel(job_file.with_suffix(".log"))
    event("started", pid=os.getpid(), at=time.time())
    job = None
    try:
        job = read_job(job_file)
        if not imported:
            import_ahead(job.kind)
        run_job(job, Preemption())
    except Exception as error:
        return _fail(error, job)
    return 0


def _fail(error: Exception, job: Job | None) -> int:
    if not isinstance(error, TriviumError):
        traceback.print_exc()
    reason = explain(error, job, phase_at_work())
    event("failed", exit_code=reason.exit_code, reason=str(reason))
    return reason.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
