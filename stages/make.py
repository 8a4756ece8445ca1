"""What a step makes: the base as a plain checkpoint, a trained stage, the release.

Read `make_stage` top to bottom: it is the whole life of a stage, from its start to its published artifact.
"""

import gc
import resource
import shutil
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages import probe, remote_code
from stages.artifact import ADAPTER, BENEATH, MODEL, Artifact, beneath, publish, read, verified
from stages.base import prepare_base
from stages.count import refuse_later_stages
from stages.data import tell_what_was_left_out
from stages.data_limits import judged, summary
from stages.data_report import DATA_REPORT, Material, kept_or_made
from stages.diagnostics import update as diagnostics
from stages.diagnostics.stage import TRAINABLE, Preparation, diagnose_stage
from stages.documents import write_json
from stages.errors import InvalidInput, StageFailed
from stages.identity import TRAINING_LIBRARIES, require_same_inputs, versions
from stages.job import Job
from stages.log import info, phase, so_far
from stages.merge import hand_over, keep_adapter
from stages.methods.base import Prepared, Start
from stages.mixing import mixed
from stages.model import load_plain, load_tokenizer, save_plain, set_stop_tokens, training_device
from stages.objective import ObjectiveSpec
from stages.preemption import Preemption
from stages.serving import assemble, put_on
from stages.train import autocasts, fit

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


def make_base(
    job: Job, work: Path, durations: dict[str, float], _: Preemption | None
) -> tuple["torch.nn.Module", Artifact]:
    """Turn whatever the spec names into a plain checkpoint, or refer to it where it is one."""
    with phase("load", durations):
        shutil.rmtree(work)
        work.mkdir()
        model, record = prepare_base(job, work)
        require_same_inputs(job)
        return model, _publish(job, work, durations, record)


def make_stage(
    job: Job, work: Path, durations: dict[str, float], preemption: Preemption | None
) -> tuple["torch.nn.Module", Artifact]:
    """Load, train, merge and publish one stage; whatever is in ``work`` from before is gone on with."""
    stage = job.stage
    parent = _start(job)
    with phase("load", durations):
        refuse_later_stages(job.pipeline, Path(job.folder), stage.name, parent.model)
        tokenizer = load_tokenizer(parent.model)
        mixture = mixed(
            stage.data,
            Path(job.folder),
            stage.normalise,
            job.pipeline.seed_of(stage),
            lambda own: stage.sizes(own, tokenizer),
        )
        require_same_inputs(job)  # once they were read: checkpoints are then of what was planned
        for count in mixture.counts:
            tell_what_was_left_out(count)
        dataset, masks = stage.dataset(mixture.rows, tokenizer)
        masks.checked(stage.name, mixture.counts)
        material = Material(stage, job.pipeline.metrics_in_full, Path(job.folder), mixture, dataset, masks, tokenizer)
        report = _reported(material, work / DATA_REPORT, job)
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
        output = work / "output"
        shutil.rmtree(output, ignore_errors=True)
        output.mkdir()
        try:
            model, handed = _hand_over(stage, prepared, tokenizer, start, output)
        except Exception as error:
            if getattr(error, "errno", None) is None:  # a full disk is told without reading what is on it
                verified(parent)  # the merge reads it again: where it went meanwhile, that is the reason
            raise
        beside = handed.get("distance_to_trained")
        apart = "" if beside is None else f"; {beside:.1e} from the trained model, on purpose"
        info(f"hand-over of {stage.name}: logits differ by {handed['max_logit_error']:.1e} at most{apart}")
        details = {
            "training": training,
            "masks": masks.as_record(),
            "method": prepared.record,
            TRAINABLE: sorted(prepared.trainable),
        }
        write_json(output / "training.json", details)
        write_json(output / DATA_REPORT, report)
        needed = peak_memory()  # before whole models are compared: that is no part of what the stage needs
        diagnosed = _diagnose(job, parent, output, Preparation(prepared.trainable, prepared.record))
        _draw(output, training, prepared.record)
        curve = training.pop("curve")
        record = {
            "stage": stage.name,
            "kind": stage.kind,
            "method": stage.method.kind,
            "training": training | {"first_logged_loss": curve[0]["loss"] if curve else None},
            "data": [count.as_record(Path(job.folder)) for count in mixture.counts],
            "masks": masks.as_record(),
            "hand_over": handed,
            "peak_memory": needed,
            **diagnosed,
            **start_record,
        }
        if not stage.method.mergeable:
            record[BENEATH] = beneath(parent.identity, parent.model)
        require_same_inputs(job)
        verified(parent)
        artifact = _publish(job, output, durations, record)
        shutil.rmtree(work, ignore_errors=True)
    del prepared
    gc.collect()
    return model, artifact


def _reported(material: Material, file: Path, job: Job) -> dict[str, Any]:
    """The data report, told in short; what it finds surely wrong, or beyond the spec's limits, ends the stage here."""
    report = kept_or_made(material, file, job.identity)
    info(summary(report))
    for line in report["warnings"]:
        info(f"warning: {line}")
    judged(report, job.stage)
    return report


def _diagnose(job: Job, parent: Artifact, output: Path, preparation: Preparation) -> dict[str, Any]:
    """Keep what training did to the weights; a stage that is trained and merged is never lost over it.

    Returns:
        What the record says of it: how long it took.
    """
    depth = job.pipeline.diagnostics
    if depth == "off":
        return {}
    began = time.monotonic()
    try:
        found = diagnose_stage(job.name, job.stage.method, preparation, parent, output / MODEL, depth)
        write_json(output / diagnostics.FILE, found)
    except Exception as error:  # whatever it is: memory, an architecture that is split in another way
        reason = str(error).partition("\n")[0] or type(error).__name__
        info(f"diagnostics of {job.name} are left out: {reason}; `trivium diagnose` tries again")
        return {}
    seconds = time.monotonic() - began
    info(f"update of {job.name}: {diagnostics.in_words(found)} ({seconds:.0f} s to find out)")
    return {"diagnostics": {"seconds": round(seconds, 3)}}


def _hand_over(
    stage: ObjectiveSpec, prepared: Prepared, tokenizer: "PreTrainedTokenizerBase", start: Start, output: Path
) -> tuple["torch.nn.Module", dict[str, Any]]:
    if not stage.method.mergeable:
        return keep_adapter(stage.method, prepared.model, start, output)
    stage.method.keep(prepared.model, output / ADAPTER)
    return hand_over(stage.method, prepared.model, tokenizer, start, output)


def make_release(
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
        save_plain(plain, tokenizer, work / MODEL, code_of=start.model)
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


def _draw(output: Path, training: dict[str, Any], method: dict[str, Any]) -> None:
    from stages import plots

    if training["curve"]:
        plots.draw_loss(training["curve"], output / plots.LOSS)
    if "spectrum" in method:
        plots.draw_spectrum(method["spectrum"], output / plots.SPECTRUM)


def _publish(job: Job, folder: Path, durations: dict[str, float], record: dict[str, Any]) -> Artifact:
    record = {
        "published": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(TRAINING_LIBRARIES),
        "durations": {name: round(seconds, 3) for name, seconds in (durations | so_far()).items()},
        "peak_memory": peak_memory(),
        **remote_code.record(),
        **record,
    }
    return publish(folder, Path(job.target), identity=job.identity, record=record)


def peak_memory() -> int:
    """The largest amount of memory in bytes that this process held: on the GPU if there is one, else RSS."""
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
