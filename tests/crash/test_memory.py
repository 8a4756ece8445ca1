"""Memory that runs out: told with the phase, the batch and what helps, in an order; nothing is shrunk in silence."""

import os
import re
import resource
from pathlib import Path

import pytest
import torch
from one_stage import CPT, TRAIN, at_each_call, only_job, reason, write_spec
from tiny import write_data, write_model

from stages import checkpoint, evaluate, make
from stages.errors import InvalidInput, StageFailed
from stages.faults import explain
from stages.pipeline import load_pipeline
from stages.plan import make_plan
from stages.run import import_ahead, run_job

pytestmark = [pytest.mark.model, pytest.mark.crash]

LARGE = "learning_rate: 1e-3, max_steps: 2, batch_size: 64, micro_batch_size: 64, sequence_length: 512, packing: none"
METRIC = "metrics:\n  held: {kind: perplexity, data: {path: data/long.jsonl}, sequence_length: 512, batch_size: 512}\n"


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    import_ahead("stage")
    folder = tmp_path_factory.mktemp("project")
    write_model(folder / "base")
    write_data(folder)
    line = (folder / "data/corpus.jsonl").read_text().splitlines()[0]
    words = line.partition(": ")[2].strip('"}') + " "
    rows = [f'{{"text": "{number} {words * 20}"}}\n' for number in range(512)]  # one row over and over is refused
    (folder / "data/long.jsonl").write_text("".join(rows))
    return folder


def leave(number: int) -> None:
    """Let this process have ``number`` more bytes of address space than it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + number
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def short_of_memory_in(module, name: str, number: int = 30_000_000):
    """A harm: the named function finds little memory left."""
    return at_each_call(module, name, lambda: leave(number))


def test_out_of_memory_in_training_names_the_batch_and_three_remedies(project, tmp_path):
    objective = CPT.replace("corpus", "long")
    job = only_job(write_spec(project, objective, "full", LARGE), tmp_path)
    told = reason(job, short_of_memory_in(make, "fit"))
    assert re.fullmatch(
        r"stage only, train: out of memory, with 64 sequences of 512 tokens in a micro batch"
        r"( \(it tried to allocate [\d.]+ [kM]B\))?\. What helps, in this order: "
        r"\(1\) lower train\.micro_batch_size \(now 64; batch_size 64 stays, so each step sees the same rows, and a "
        r"rerun resumes\); \(2\) set train\.gradient_checkpointing: true \(slower, the same result, and a "
        r"rerun resumes\); \(3\) lower train\.sequence_length \(now 512; the stage starts anew\)\. "
        r"Then run again: it starts this step from its beginning",
        told,
    )
    assert not Path(job.target).exists()


def test_what_cannot_be_lowered_any_more_is_not_advised(project, tmp_path):
    settings = LARGE.replace("micro_batch_size: 64", "micro_batch_size: 1, gradient_checkpointing: true")
    job = only_job(write_spec(project, CPT.replace("corpus", "long"), "lora, rank: 2", settings), tmp_path)
    told = str(explain(MemoryError(), job, "train"))
    assert told.startswith(
        "stage only, train: out of memory, with 1 sequence of 512 tokens in a micro batch. What helps"
    )
    assert re.findall(r"\(\d\) (\w+ [\w.]+)", told) == [
        "lower train.sequence_length",
        "set train.weights_dtype",
        "use method",
    ]


def test_a_rerun_with_a_smaller_micro_batch_resumes_and_has_the_same_rows_per_step(project, tmp_path):
    settings = f"{TRAIN}, checkpoint_every: 1"
    job = only_job(write_spec(project, train=settings), tmp_path)
    seal = checkpoint.seal

    def harm() -> None:
        def then_ask_for_much(folder):
            seal(folder)
            leave(0)
            torch.empty(1 << 28)

        checkpoint.seal = then_ask_for_much

    assert "Then run again: it resumes at step 1" in reason(job, harm)
    smaller = settings.replace("micro_batch_size: 2", "micro_batch_size: 1")
    again = only_job(write_spec(project, train=smaller), tmp_path)
    assert again.work == job.work
    assert run_job(again).manifest["record"]["training"]["resumed_at"] == 1


def test_out_of_memory_while_loading_is_no_invalid_model(project, tmp_path):
    job = only_job(write_spec(project), tmp_path)
    told = reason(job, short_of_memory_in(make, "load_plain", 0))
    assert told.startswith("stage only, load: out of memory")
    assert "(1) use method qlora" in told
    assert "cannot be loaded" not in told


def test_out_of_memory_in_an_evaluation_names_the_metric_and_keeps_what_was_trained(project, tmp_path):
    small = "learning_rate: 1e-3, max_steps: 1, batch_size: 2, sequence_length: 48"
    spec = write_spec(project, CPT, "full", small, METRIC)
    pipeline, _ = load_pipeline(spec)
    first = make_plan(pipeline, project, tmp_path, until="only")
    run_job(first.job(first.steps[0]).model_copy(update={"measurements": ()}))
    second = make_plan(pipeline, project, tmp_path, until="only")
    job = second.job(second.steps[1])
    told = reason(job, short_of_memory_in(evaluate, "evaluate"))
    assert told.startswith("stage only, evaluate: out of memory")
    assert "(1) lower metrics.held.batch_size (now 512); (2) lower metrics.held.sequence_length (now 512" in told
    assert told.endswith("Then run again: what is published is kept, only what was not measured is measured")
    assert Path(job.target).exists()


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(12, "Cannot allocate memory"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 8 GiB"),
        RuntimeError("could not create a primitive"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you "
                     "tried to allocate 400000000 bytes. Error code 12 (Cannot allocate memory)"),
    ],
)  # fmt: skip
def test_every_way_in_which_memory_runs_out_is_known(error):
    found = explain(error)
    assert isinstance(found, StageFailed)
    assert str(found).startswith("out of memory")
    if "Tried to allocate" in str(error):
        assert "(it tried to allocate 2.50 GiB)" in str(found)


def test_an_error_of_ours_stays_itself_unless_memory_or_disk_ran_out_beneath_it():
    ours = InvalidInput("model: cannot be loaded")
    assert explain(ours) is ours
    ours.__cause__ = RuntimeError("can't allocate memory: you tried to allocate 400000000 bytes")
    assert "it tried to allocate 400 MB" in str(explain(ours))
    assert explain(ours).exit_code == StageFailed.exit_code


@pytest.mark.parametrize(
    "ours",
    [
        StageFailed("stage only, train: out of memory. What helps, in this order: (1) lower train.micro_batch_size"),
        StageFailed("only: its process was killed by SIGKILL (out of memory? lower train.micro_batch_size)"),
        InvalidInput("data/rows.jsonl:3: no field text in {'note': 'out of memory'}"),
    ],
)
def test_an_error_of_ours_is_not_judged_by_its_words(ours):
    """A step's reason comes to the command as text, where it is explained once more."""
    assert explain(ours) is ours


def test_any_other_error_keeps_its_kind_and_text():
    assert str(explain(ZeroDivisionError("division by zero"))) == "ZeroDivisionError: division by zero"
