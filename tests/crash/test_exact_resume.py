"""A stage that was killed and run again ends with the bits of one that was not: every objective, every kind of method.

Accumulation, dropout and, where the objective has it, packing are on, and the data is passed more than once.
"""

import json
from pathlib import Path

import pytest
from crashing import after, before, disturb, killed, result, stage_job
from tiny import write_data, write_model
from transformers import Trainer

from stages import make
from stages.artifact import set_aside
from stages.run import run_job

pytestmark = [pytest.mark.model, pytest.mark.crash]

STEPS = 5
COMMON = f"max_steps: {STEPS}, batch_size: 4, micro_batch_size: 2, checkpoint_every: 2, learning_rate: 5e-3"
OBJECTIVES = {
    "cpt": ("data/corpus.jsonl, weight: 0.6", "sequence_length: 48"),
    "cpt wrapped": ("data/corpus.jsonl, weight: 0.6", "sequence_length: 48, packing: wrapped"),
    "cpt share": ("data/corpus.jsonl, weight: 0.4}, {path: data/heldout.jsonl, share: 0.3", "sequence_length: 48"),
    "ift": ("data/instructions.jsonl, weight: 0.3", "sequence_length: 128"),
    "dpo": ("data/pairs.jsonl, weight: 0.25", "sequence_length: 64"),
}
"""Fewer than STEPS batches of data, so that a resume may land in a later epoch."""
METHODS = {
    "full": "kind: full",
    "spectrum": "kind: spectrum, top_percent: 50",
    "lora": "kind: lora, rank: 4, dropout: 0.1",
    "pissa": "kind: pissa, rank: 4, dropout: 0.1",
    "qlora": "kind: qlora, rank: 4, dropout: 0.1",
    "svf": "kind: svf",
}
SETTINGS = {
    "adamw_8bit": ("ift", "lora", "optimizer: adamw_8bit"),
    "adafactor": ("ift", "full", "optimizer: adafactor"),
    "sgd": ("cpt", "lora", "optimizer: sgd, extra: {optim_args: momentum=0.9}"),
    "bfloat16": ("ift", "qlora", "weights_dtype: bfloat16"),
    "recomputing": ("cpt", "full", "gradient_checkpointing: true"),
    "unpacked": ("ift", "lora", "packing: false"),
}
CASES = [(objective, method, "weight_decay: 0.1") for objective in OBJECTIVES for method in METHODS]
FEW = {"cpt wrapped": {"full", "lora"}, "cpt share": {"lora"}}
CASES = [case for case in CASES if case[1] in FEW.get(case[0], METHODS)] + list(SETTINGS.values())
AFTER_THE_LAST_STEP = [(*case, "max_grad_norm: 0.5") for case in (("cpt", "svf"), ("ift", "qlora"), ("dpo", "full"))]


def kill_at(number: int) -> tuple[int, bool]:
    """Where the case of this number is killed: after how many steps; before the next one, or in its middle.

    Over all cases, every place of a run.
    """
    step, half = divmod(number * 3 % (2 * STEPS), 2)
    return step, bool(half)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A base with dropout in its attention, and data."""
    folder = tmp_path_factory.mktemp("project")
    write_data(folder)
    config = write_model(folder / "base") / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"attention_dropout": 0.1}))
    return folder


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    """A fifth of such a run went into drawing its loss."""
    monkeypatch.setattr(make, "_draw", lambda *_: None)


def job_of(case: tuple[str, str, str], folder: Path):
    objective, method, setting = case
    data, train = OBJECTIVES[objective]
    return stage_job(
        folder,
        folder / "runs",
        f"""
kind: {objective.split()[0]}
method: {{{METHODS[method]}}}
data: [{{path: {data}}}]
train: {{{COMMON}, schedule: constant, {train}, {setting}}}
""",
    )


@pytest.mark.parametrize(("number", "case"), list(enumerate(CASES)), ids=[" ".join(case) for case in CASES])
def test_killed_at_any_step_and_run_again_it_ends_with_the_same_bits(number, case, folder, capfd):
    job = job_of(case, folder)
    run_job(job)
    wanted = result(job)
    assert wanted.record["sequences"] < STEPS * 4
    set_aside(Path(job.target))
    disturb()
    step, within = kill_at(number)
    stop = after if within else before
    killed(stop(Trainer, "training_step", where=lambda self, *_: self.state.global_step == step), lambda: run_job(job))
    disturb()
    capfd.readouterr()
    run_job(job)
    found = result(job)
    kept = step // 2 * 2
    assert found.record["resumed_at"] == kept
    said = f"resuming at step {kept} of {STEPS}: at most {'1 step is' if kept == 4 else '2 steps are'} trained again\n"
    assert (said in capfd.readouterr().err) == (kept > 0)
    assert found.curve == wanted.curve
    assert found.weights == wanted.weights
    assert found.record == wanted.record | {"resumed_at": kept}
    set_aside(Path(job.target))


@pytest.mark.parametrize("case", AFTER_THE_LAST_STEP, ids=" ".join)
def test_killed_after_its_last_step_no_step_is_taken_again(case, folder, monkeypatch):
    job = job_of(case, folder)
    run_job(job)
    wanted = result(job)
    set_aside(Path(job.target))
    killed(before(make, "hand_over"), lambda: run_job(job))
    taken = []
    monkeypatch.setattr(Trainer, "training_step", lambda *_, **__: taken.append(1))
    run_job(job)
    assert taken == []
    assert result(job).weights == wanted.weights
    set_aside(Path(job.target))


def test_the_cases_are_killed_before_and_in_every_step_of_a_run():
    places = {kill_at(number) for number in range(len(CASES))}
    assert places == {(step, within) for step in range(STEPS) for within in (False, True)}
