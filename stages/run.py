"""One step, from its job file to its published artifact: ``python -m stages.run JOB``.

Read `run_job` top to bottom: it is the whole life of a stage. With ``--wait`` the process imports the heavy
libraries first and then reads the path of its job from stdin, so that a chain's next stage costs no imports.
"""

import ctypes
import gc
import os
import resource
import shutil
import signal
import sys
import time
import traceback
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specs.pipeline import BASE
from stages import probe
from stages.artifact import ADAPTER, BENEATH, MODEL, Artifact, beneath, publish, read, verified, write_json
from stages.base import prepare_base
from stages.count import refuse_later_stages
from stages.data import mixed
from stages.errors import InvalidInput, StageFailed, TriviumError
from stages.job import STAGE, Job, read_job
from stages.lock import exclusive
from stages.log import event, info, open_channel, phase, so_far
from stages.merge import hand_over, keep_adapter
from stages.methods.base import Prepared, Start
from stages.model import load_plain, load_tokenizer, save_plain, set_stop_tokens, training_device
from stages.objective import ObjectiveSpec
from stages.plan import RELEASE, TRAINING_LIBRARIES, data_digests, versions
from stages.serving import assemble, put_on
from stages.train import Preemption, autocasts, fit

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def run_job(job: Job, preemption: Preemption | None = None) -> Artifact:
    """Make the job's artifact if it is missing, then the measurements that are.

    Raises:
        TriviumError: the reason, for people; whatever was published before stays.
    """
    durations: dict[str, float] = {}
    with exclusive(job.lock):
        artifact = read(Path(job.target)) if Path(job.target).exists() else None
        model = None
        if artifact is None:
            work = Path(job.work)
            work.mkdir(parents=True, exist_ok=True)
            make = {BASE: _make_base, RELEASE: _make_release}.get(job.kind, _make_stage)
            model, artifact = make(job, work, durations, preemption)
        if job.measurements:
            with phase("evaluate", durations):
                _measure(job, artifact, model)
    event("finished", artifact=str(artifact.path), durations=durations, peak_memory=peak_memory())
    return artifact


def _make_base(
    job: Job, work: Path, durations: dict[str, float], _: Preemption | None
) -> tuple["torch.nn.Module", Artifact]:
    with phase("load", durations):
        shutil.rmtree(work)
        work.mkdir()
        model, record = prepare_base(job, work)
        return model, _publish(job, work, durations, record)


def _make_stage(
    job: Job, work: Path, durations: dict[str, float], preemption: Preemption | None
) -> tuple["torch.nn.Module", Artifact]:
    stage = _stage(job)
    parent = _start(job)
    with phase("load", durations):
        refuse_later_stages(job.pipeline, Path(job.folder), stage.name, parent.model)
        tokenizer = load_tokenizer(parent.model)
        rows = mixed(stage.data, Path(job.folder), stage.normalise, job.pipeline.seed_of(stage))
        dataset, masks = stage.dataset(rows, tokenizer)
        masks.checked(stage.name)
        start = Start(
            parent.model,
            spec_folder=Path(job.folder),
            cache=Path(job.target).parent / ".scans",
            seed=job.pipeline.seed_of(stage),
            sequence_length=stage.train.sequence_length,
            rows=lambda: stage.token_rows(dataset, tokenizer),
        )
        prepared, start_record = _prepare(stage, parent, start)
    with phase("train", durations):
        training = fit(
            stage,
            prepared,
            tokenizer,
            dataset,
            seed=job.pipeline.seed_of(stage),
            folder=work / "checkpoints",
            preemption=preemption,
        )
    with phase("merge", durations):
        _same_inputs(job, stage)
        output = work / "output"
        shutil.rmtree(output, ignore_errors=True)
        output.mkdir()
        model, handed = _hand_over(stage, prepared, tokenizer, start, output)
        beside = handed.get("distance_to_trained")
        apart = "" if beside is None else f"; {beside:.1e} from the trained model, on purpose"
        info(f"hand-over of {stage.name}: logits differ by {handed['max_logit_error']:.1e} at most{apart}")
        details = {"training": training, "masks": masks.as_record(), "method": prepared.record}
        write_json(output / "training.json", details)
        _draw(output, training, prepared.record)
        curve = training.pop("curve")
        record = {
            "stage": stage.name,
            "kind": stage.kind,
            "method": stage.method.kind,
            "training": training | {"first_logged_loss": curve[0]["loss"] if curve else None},
            "masks": masks.as_record(),
            "hand_over": handed,
            **start_record,
        }
        if not stage.method.mergeable:
            record[BENEATH] = beneath(parent.identity, parent.model)
        artifact = _publish(job, output, durations, record)
        shutil.rmtree(work, ignore_errors=True)
    del prepared
    gc.collect()
    return model, artifact


def _hand_over(
    stage: ObjectiveSpec, prepared: Prepared, tokenizer: "PreTrainedTokenizerBase", start: Start, output: Path
) -> tuple["torch.nn.Module", dict[str, Any]]:
    if not stage.method.mergeable:
        return keep_adapter(stage.method, prepared.model, start, output)
    stage.method.keep(prepared.model, output / ADAPTER)
    return hand_over(stage.method, prepared.model, tokenizer, start, output)


def _make_release(
    job: Job, work: Path, durations: dict[str, float], _: Preemption | None
) -> tuple["torch.nn.Module", Artifact]:
    """Cast the last stage's model to the dtype of the spec and prove that nothing else changed."""
    import torch

    with phase("release", durations):
        shutil.rmtree(work)
        work.mkdir()
        start = _start(job)
        dtype = getattr(torch, job.pipeline.model.dtype)
        record: dict[str, Any] = {"dtype": job.pipeline.model.dtype}
        tokenizer = load_tokenizer(start.model)
        plain = load_plain(start.model, dtype)
        set_stop_tokens(plain, tokenizer)
        save_plain(plain, tokenizer, work / MODEL)
        adapter = None
        if start.adapter is not None:
            adapter = shutil.copytree(start.adapter, work / ADAPTER)
            record[BENEATH] = beneath(start.identity, work / MODEL)
        again, _ = assemble(work / MODEL, adapter, dtype)
        ids = probe.probe_ids(again)
        found = probe.logits(again, ids)
        if not torch.equal(found, probe.logits(put_on(plain, start.adapter), ids)):
            raise StageFailed("the released model is not the last stage's; nothing is released")
        probe.record(work, ids, found)
        return again, _publish(job, work, durations, record)


def _stage(job: Job) -> ObjectiveSpec:
    return next(stage for stage in job.pipeline.stages if stage.name == job.name)


def _start(job: Job) -> Artifact:
    artifact = read(Path(str(job.start)))
    if artifact is None:
        raise StageFailed(f"{job.start}: the step before was not published; run `trivium run` on the whole spec")
    return verified(artifact)


def _prepare(stage: ObjectiveSpec, parent: Artifact, start: Start) -> tuple[Prepared, dict[str, Any]]:
    """Load the start, prove that it is what was published, adapt it, and prove that this changed nothing."""
    import torch
    from transformers import set_seed

    set_seed(start.seed)
    plain = load_plain(start.model, torch.float32)
    start_error = probe.check_start(plain, parent.path)
    if (reason := stage.method.unsupported(plain.config.to_dict())) is not None:
        raise InvalidInput(f"stage {stage.name}: {reason}")
    ids = probe.probe_ids(plain)
    before = probe.logits(plain, ids)
    dtype = getattr(torch, stage.train.weights_dtype)
    exact = stage.method.starts_exactly and dtype == torch.float32
    if exact:
        model = plain.to(training_device())
    else:
        if not stage.method.mergeable and dtype != torch.float32:
            _refuse_rounding(stage, plain, dtype)
        del plain
        gc.collect()
        compute = torch.bfloat16 if autocasts(stage) else torch.float32
        model = stage.method.load(start.model, dtype, compute)
    prepared = stage.method.prepare(model, start)
    after = probe.logits(prepared.model, ids, autocast=dtype == torch.bfloat16).float()
    difference, allowed = probe.distance(after, before, probe.TOLERANCE)
    if exact and not difference <= allowed:
        raise StageFailed(
            f"stage {stage.name}: preparing method {stage.method.kind} moved the model by {difference:.2g} in logits "
            f"before the first step, allowed {allowed:.2g}; this is a fault of ours, please report it"
        )
    record = {"start": {"reload_error": start_error, "adapted_difference": difference, "exact": exact}}
    return prepared, record


def _refuse_rounding(stage: ObjectiveSpec, plain: "torch.nn.Module", dtype: "torch.dtype") -> None:
    """What stays an adapter belongs on the base as it is kept; rounded weights are another base."""
    import torch

    name = next((name for name, p in plain.named_parameters() if not torch.equal(p, p.to(dtype).to(p.dtype))), None)
    if name is not None:
        raise InvalidInput(
            f"stage {stage.name}: train.weights_dtype {str(dtype)[6:]} would round the base ({name}), and the adapter "
            f"of method {stage.method.kind} stays beside the base as it is; set train.weights_dtype: float32"
        )


def _same_inputs(job: Job, stage: ObjectiveSpec) -> None:
    """A file that changed while the stage ran must not be recorded as what it trained on."""
    if data_digests(stage, Path(job.folder)) != job.identity["data"]:
        raise InvalidInput(
            f"stage {stage.name}: a data file changed while the stage ran; nothing is published, run again"
        )


def _draw(output: Path, training: dict[str, Any], method: dict[str, Any]) -> None:
    from stages import plots

    if training["curve"]:
        plots.draw_loss(training["curve"], output / plots.LOSS)
    if "spectrum" in method:
        plots.draw_spectrum(method["spectrum"], output / plots.SPECTRUM)


def _publish(job: Job, folder: Path, durations: dict[str, float], record: dict[str, Any]) -> Artifact:
    record = record | {
        "published": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(TRAINING_LIBRARIES),
        "durations": {name: round(seconds, 3) for name, seconds in (durations | so_far()).items()},
        "peak_memory": peak_memory(),
    }
    return publish(folder, Path(job.target), identity=job.identity, record=record)


def _measure(job: Job, artifact: Artifact, model: "torch.nn.Module | None") -> None:
    """Measure in the precision of the release, so that what gates judge is what people get."""
    import torch

    from stages import evaluate

    tokenizer = load_tokenizer(artifact.model)
    dtype = getattr(torch, job.pipeline.model.dtype)
    if model is None:
        model, _ = assemble(verified(artifact).model, artifact.adapter, dtype)
    model = model.to(device=training_device(), dtype=dtype).eval()
    for one in job.measurements:
        reference = None if one.reference is None else evaluate.load(Path(one.reference))
        found = evaluate.evaluate(
            job.pipeline.metrics[one.metric],
            one.metric,
            Path(job.folder),
            model,
            tokenizer,
            chat_template=one.chat_template,
            reference=reference,
        )
        evaluate.save(found, Path(one.file), one.identity)
        chosen = found.measure(None)
        event("measured", metric=one.metric, value=None if chosen is None else chosen.value)


def peak_memory() -> int:
    """The largest amount of memory in bytes that this process held: on the GPU if there is one, else RSS."""
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


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
    waiting = arguments[:1] == ["--wait"]
    if waiting:
        _die_with(int(arguments[1]))
        open_channel(Path(os.devnull))
        import_ahead(arguments[2])
        event("ready")
        line = sys.stdin.readline().strip()
        if not line:
            return 0
        arguments = [line]
    job_file = Path(arguments[0])
    open_channel(job_file.with_suffix(".log"))
    event("started", pid=os.getpid(), at=time.time())
    try:
        job = read_job(job_file)
        if not waiting:
            import_ahead(job.kind)
        run_job(job, Preemption())
    except TriviumError as error:
        event("failed", exit_code=error.exit_code, reason=str(error))
        return error.exit_code
    except MemoryError:
        return _out_of_memory()
    except Exception as error:
        traceback.print_exc()
        if "out of memory" in str(error).lower() or "can't allocate memory" in str(error):
            return _out_of_memory()
        event("failed", exit_code=StageFailed.exit_code, reason=f"{type(error).__name__}: {error}"[:2000])
        return StageFailed.exit_code
    return 0


def _die_with(parent: int) -> None:
    """Ask the kernel for a SIGTERM when the parent ends, however it ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            sys.exit(0)


def _out_of_memory() -> int:
    with suppress(Exception):
        gc.collect()
    reason = (
        "out of memory; lower train.micro_batch_size (batch_size stays), lower train.sequence_length, or set "
        "train.gradient_checkpointing, then run again: it resumes"
    )
    event("failed", exit_code=StageFailed.exit_code, reason=reason)
    return StageFailed.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
