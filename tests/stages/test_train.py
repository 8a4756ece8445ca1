"""A run that breaks, is stopped or is killed: nothing wrong is published, nothing is lost, a resume is exact."""

import os
import re
import signal
from pathlib import Path

import pytest
from crashing import Result, at_step, checkpoints, disturb, published, result, stage_job
from tiny import write_data, write_model

from stages import checkpoint
from stages.errors import StageFailed, TryAgain
from stages.job import Job
from stages.methods.full import Full
from stages.methods.lora import Lora
from stages.methods.spectrum import Spectrum
from stages.preemption import Preemption
from stages.run import run_job

pytestmark = pytest.mark.model

COMMON = "max_steps: 7, batch_size: 4, micro_batch_size: 2"
STAGES = {
    "cpt-spectrum": f"""
kind: cpt
method: {{kind: spectrum, top_percent: 50}}
data: [{{path: data/corpus.jsonl}}]
train: {{{COMMON}, learning_rate: 5e-3, sequence_length: 48, checkpoint_every: 2}}
""",
    "ift-lora": f"""
kind: ift
method: {{kind: lora, rank: 4, dropout: 0.1}}
data: [{{path: data/instructions.jsonl, weight: 0.5}}]
train: {{{COMMON}, learning_rate: 1e-2, sequence_length: 64, checkpoint_every: 2, weights_dtype: bfloat16}}
""",
    "dpo-qlora": f"""
kind: dpo
method: {{kind: qlora, rank: 4, dropout: 0.1}}
data: [{{path: data/pairs.jsonl, weight: 0.3}}]
train: {{{COMMON}, learning_rate: 1e-2, sequence_length: 128, checkpoint_every: 2, weight_decay: 0.1}}
""",
    "cpt-full": f"""
kind: cpt
method: {{kind: full}}
data: [{{path: data/corpus.jsonl}}]
train: {{{COMMON}, learning_rate: 5e-3, sequence_length: 48, checkpoint_every: 2, packing: wrapped}}
""",
}
"""Small enough to pass through their data more than once, so that a resume lands in a later epoch."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    write_model(folder / "base")
    write_data(folder)
    return folder


@pytest.fixture(autouse=True)
def _keep_the_handler_of_sigterm():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def job(folder, tmp_path):
    """A function that publishes the base below a root of its own and returns the job of one stage on it."""

    def make(name: str, root: Path | None = None, **edits: str) -> Job:
        text = STAGES[name]
        for old, new in edits.values():
            assert old in text
            text = text.replace(old, new)
        return stage_job(folder, root or tmp_path / "runs", text)

    return make


@pytest.fixture(scope="module")
def uninterrupted(folder, tmp_path_factory) -> dict[str, Result]:
    return {}


@pytest.fixture
def expected(uninterrupted, job, tmp_path):
    """A function: what a stage comes to when nobody disturbs it. Computed once."""

    def find(name: str) -> Result:
        if name not in uninterrupted:
            whole = job(name, tmp_path / "whole")
            run_job(whole)
            uninterrupted[name] = result(whole)
            disturb()
        return uninterrupted[name]

    return find


def stopped_at(step: int, job: Job, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        at_step(patch, step - 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(TryAgain, match=f"kept step {step} of 7"):
            run_job(job, Preemption())
    disturb()


# What breaks


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_learning_rate_that_breaks_the_model_is_named_with_its_step(method, job):
    broken = job(
        "cpt-full",
        rate=("learning_rate: 5e-3", "learning_rate: 1e9, max_grad_norm: 1e9"),
        method=("kind: full", f"kind: {method}"),
    )
    with pytest.raises(
        StageFailed, match=r"(?s)stage only: (loss|grad norm).* not finite at step [2-7] .*learning_rate"
    ):
        run_job(broken)
    assert not published(broken)
    assert [path.name[:7] for path in Path(broken.target).parent.glob("[0-9]*")] == ["00-base"]


@pytest.mark.parametrize(
    ("method", "kind"), [(Spectrum, "spectrum, top_percent: 50"), (Lora, "lora, rank: 4"), (Full, "full")]
)
@pytest.mark.parametrize("harm", ["one more", "one less", "none"])
def test_other_trainable_parameters_than_planned_are_refused(method, kind, harm, job, monkeypatch):
    prepare = method.prepare

    def wrong(self, model, start):
        found = prepare(self, model, start)
        named = dict(found.model.named_parameters())
        if harm == "none":
            for name in found.trainable:
                named[name].requires_grad_(False)
            return found._replace(trainable=frozenset())
        if harm == "one less":
            named[max(found.trainable)].requires_grad_(False)
            return found
        if method is Full:
            return found._replace(trainable=found.trainable - {max(found.trainable)})
        named[next(name for name in named if name.endswith("norm.weight"))].requires_grad_(True)
        return found

    monkeypatch.setattr(method, "prepare", wrong)
    refused = job("cpt-full", method=("kind: full", f"kind: {kind}"))
    with pytest.raises(StageFailed, match=r"stage only: .* parameters would train where method"):
        run_job(refused)
    assert not published(refused)
    assert not checkpoint.by_step(checkpoints(refused))


@pytest.mark.parametrize("precision", ["auto", "bfloat16"])
@pytest.mark.parametrize("kind", ["full", "spectrum, top_percent: 50", "lora, rank: 4", "qlora, rank: 4"])
def test_frozen_weights_in_bfloat16_train_and_merge(kind, precision, job):
    short = job(
        "cpt-full",
        method=("kind: full", f"kind: {kind}"),
        train=("max_steps: 7", f"max_steps: 2, weights_dtype: bfloat16, precision: {precision}"),
    )
    record = run_job(short).manifest["record"]
    assert record["hand_over"]["max_logit_error"] <= 1e-4
    assert record["start"]["exact"] is False
    assert record["start"]["adapted_difference"] < 1
    assert record["training"]["precision"] == "bfloat16"


# What is stopped


@pytest.mark.parametrize("name", STAGES)
def test_sigterm_leaves_a_sealed_checkpoint_and_the_rerun_ends_bit_identical(name, job, expected, monkeypatch):
    wanted, stopped = expected(name), job(name)
    stopped_at(5, stopped, monkeypatch)
    assert not published(stopped)
    assert checkpoint.damage(checkpoints(stopped) / "checkpoint-5") is None
    run_job(stopped, Preemption())
    found = result(stopped)
    assert found.record["resumed_at"] == 5
    assert found.curve == wanted.curve
    assert found.weights == wanted.weights
    assert not Path(stopped.work).exists()


def test_sigterm_twice_is_no_worse_than_once(job, expected, monkeypatch):
    wanted, stopped = expected("ift-lora"), job("ift-lora")
    stopped_at(3, stopped, monkeypatch)
    stopped_at(6, stopped, monkeypatch)
    run_job(stopped)
    assert result(stopped).weights == wanted.weights


def test_the_weights_do_depend_on_the_seed(job, expected):
    """Otherwise bit-identity would prove little."""
    other = job("ift-lora", seed=("kind: ift", "kind: ift\nseed: 6"))
    run_job(other)
    assert result(other).weights != expected("ift-lora").weights


def test_sigterm_in_the_last_step_still_finishes(job, expected, monkeypatch):
    stopped = job("cpt-spectrum")
    at_step(monkeypatch, 7, lambda: os.kill(os.getpid(), signal.SIGTERM))
    run_job(stopped, Preemption())
    assert result(stopped).weights == expected("cpt-spectrum").weights


def test_sigterm_outside_of_training_ends_at_once(job, monkeypatch):
    stopped = job("cpt-spectrum")
    monkeypatch.setattr("stages.make.mixed", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(TryAgain, match="told to stop"):
        run_job(stopped, Preemption())
    assert not published(stopped)


# What is damaged


def torn(checkpoint_folder: Path) -> None:
    file = max(checkpoint_folder.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    os.truncate(file, file.stat().st_size // 2)


def flipped(checkpoint_folder: Path) -> None:
    file = checkpoint_folder / "optimizer.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def unsealed(checkpoint_folder: Path) -> None:
    (checkpoint_folder / checkpoint.SEAL).unlink()


def without_optimizer(checkpoint_folder: Path) -> None:
    (checkpoint_folder / "optimizer.pt").unlink()


@pytest.mark.parametrize("harm", [torn, flipped, unsealed, without_optimizer])
def test_a_damaged_checkpoint_is_set_aside_and_the_older_one_used(harm, job, expected, monkeypatch, capfd):
    wanted, stopped = expected("cpt-spectrum"), job("cpt-spectrum")
    stopped_at(5, stopped, monkeypatch)
    assert [checkpoint.step_of(path) for path in checkpoint.by_step(checkpoints(stopped))] == [5, 4]
    harm(checkpoints(stopped) / "checkpoint-5")
    capfd.readouterr()
    run_job(stopped)
    told = capfd.readouterr().err
    assert re.search(r"checkpoint-5 is (torn|damaged): .*; set aside as ", told)
    assert "resuming at step 4 of 7: at most " in told
    found = result(stopped)
    assert found.record["resumed_at"] == 4
    assert found.weights == wanted.weights


def test_without_a_whole_checkpoint_it_starts_over(job, expected, monkeypatch):
    stopped = job("cpt-spectrum")
    stopped_at(5, stopped, monkeypatch)
    for path in checkpoint.by_step(checkpoints(stopped)):
        torn(path)
    run_job(stopped)
    assert result(stopped).record["resumed_at"] == 0
    assert result(stopped).weights == expected("cpt-spectrum").weights
