"""inf and nan, wherever they come from: stopped before the optimizer step, named, and never published."""

import json
import random
import re
from pathlib import Path

import pytest
import torch
from one_stage import CPT, DPO, IFT, TRAIN, only_job, write_spec
from safetensors.torch import load_file, save_file
from tiny import write_rows
from transformers import AutoTokenizer

from stages import checkpoint, train
from stages.errors import InvalidInput, StageFailed
from stages.run import run_job

pytestmark = [pytest.mark.model, pytest.mark.crash]

MARK = "zyx"
"""A word that only a test's bad row has."""


def nothing_published(job) -> bool:
    return not Path(job.target).exists()


def refusal(job, error=StageFailed) -> str:
    with pytest.raises(error) as caught:
        run_job(job)
    assert nothing_published(job)
    return str(caught.value)


def newest(job) -> int:
    return checkpoint.newest_step(Path(job.work) / "checkpoints")


def steps_taken(job, monkeypatch) -> list[int]:
    """The optimizer steps of a job, as they are taken."""
    taken: list[int] = []
    step = torch.optim.AdamW.step

    def count(self, *arguments, **named):
        taken.append(len(taken) + 1)
        return step(self, *arguments, **named)

    monkeypatch.setattr(torch.optim.AdamW, "step", count)
    return taken


def harm_weight(folder: Path, name: str, value: float) -> None:
    file = folder / "base/model.safetensors"
    weights = load_file(file)
    weights[name].view(-1)[3] = value
    save_file(weights, file, metadata={"format": "pt"})


def poisoned_word(folder: Path, word: str = MARK) -> None:
    """A word of its own direction, which overflows in the first layer's attention: every sequence with it is nan.

    In float64, in which models are compared, it does not overflow; and the probe's ids do not have it.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    number = tokenizer(word)["input_ids"][0]
    file = folder / "base/model.safetensors"
    weights = load_file(file)
    weights["model.embed_tokens.weight"][:, 0] = 0
    weights["model.embed_tokens.weight"][number] = torch.eye(32)[0]
    for name in ("q_proj", "k_proj"):
        weights[f"model.layers.0.self_attn.{name}.weight"][:, 0] = 1e20
    save_file(weights, file, metadata={"format": "pt"})


ROWS = {
    "cpt": (CPT, "data/corpus.jsonl", {"text": f"{MARK} one red bird"}),
    "ift": (IFT, "data/instructions.jsonl", {"prompt": "say it", "completion": f"{MARK} one red bird"}),
    "dpo": (DPO, "data/pairs.jsonl", {"prompt": "say it", "chosen": f"{MARK} one red bird", "rejected": "a cat"}),
}
UNPACKED = {"cpt": "packing: none, ", "ift": "packing: false, ", "dpo": ""}
EIGHT = "learning_rate: 1e-3, max_steps: 3, batch_size: 8, micro_batch_size: {micro}, sequence_length: 128"


def with_a_bad_row(project: Path, kind: str, place: int) -> str:
    """Eight rows, the bad one at a place of the order in which the stage reads them; returns the objective."""
    objective, file, row = ROWS[kind]
    rows = [json.loads(line) for line in (project / file).read_text().splitlines()[:8]]
    order = list(range(8))
    random.Random(5).shuffle(order)
    rows[order[place]] = row
    write_rows(project / file, rows)
    return objective


@pytest.mark.parametrize("method", ["full", "lora, rank: 2"])
@pytest.mark.parametrize("kind", ROWS)
def test_a_row_that_breaks_a_step_is_named_before_the_optimizer_takes_it(kind, method, project, monkeypatch):
    """At the start of its sequence the word breaks the loss already, behind others only the gradient."""
    poisoned_word(project)
    objective = with_a_bad_row(project, kind, 7)
    job = only_job(write_spec(project, objective, method, UNPACKED[kind] + EIGHT.format(micro=1)), project / "runs")
    taken = steps_taken(job, monkeypatch)
    told = refusal(job)
    assert not taken
    first, where, *rows, remedy = told.splitlines()
    assert re.match(
        r"stage only: .* not finite at step 1 of 3 \(loss .*, grad norm nan, learning rate 0\); stopped", first
    )
    assert f'  "{MARK} one red bird"' in [row.replace(r"\n", "") for row in rows]
    assert len(rows) == (1 if kind == "cpt" else 8)
    if kind == "cpt":
        assert "loss and grad norm are not finite at step 1 of 3 (loss nan, " in first
        assert re.match(r"In micro batch [1-8] of 8; what is learned of its rows begins with", where)
    else:
        assert "the step's 8 micro batches" in where
    assert remedy.startswith(
        "Look at these rows in the data; if they are sound, lower train.learning_rate, and run again"
    )
    assert newest(job) == 0


def test_packed_documents_are_told_apart(project):
    poisoned_word(project)
    objective = with_a_bad_row(project, "cpt", 7)
    told = refusal(only_job(write_spec(project, objective, "full", EIGHT.format(micro=8)), project / "runs"))
    rows = [line for line in told.splitlines() if line.startswith('  "')]
    assert len(rows) == 8
    assert f'  "{MARK} one red bird"' in rows


def test_a_pair_that_the_start_model_cannot_score_is_named_before_training(project):
    poisoned_word(project, "<|im_start|>")
    objective = with_a_bad_row(project, "dpo", 0)
    told = refusal(only_job(write_spec(project, objective, "full", EIGHT.format(micro=1)), project / "runs"))
    assert "log-probabilities that are inf or nan to some of the first pairs" in told
    assert f'"{MARK} one red bird' in told
    assert "fault of ours" not in told


@pytest.mark.parametrize("kind", ["full", "spectrum, top_percent: 50", "lora, rank: 2", "qlora, rank: 2"])
def test_a_step_is_watched_also_where_none_is_logged(kind, project, monkeypatch):
    poisoned_word(project)
    with_a_bad_row(project, "cpt", 0)
    job = only_job(write_spec(project, CPT, kind, EIGHT.format(micro=2)), project / "runs")
    arguments = train.trainer_arguments
    monkeypatch.setattr(
        train, "trainer_arguments", lambda *given, **named: arguments(*given, **named) | {"logging_strategy": "no"}
    )
    assert "not finite at step 1 of 3" in refusal(job)
    assert newest(job) == 0


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_learning_rate_that_breaks_the_weights_leaves_the_last_sound_checkpoint(optimizer, project):
    settings = TRAIN.replace("1e-3, max_steps: 3", f"1e38, max_steps: 7, checkpoint_every: 1, optimizer: {optimizer}")
    job = only_job(write_spec(project, CPT, "full", f"{settings}, max_grad_norm: 1e9"), project / "runs")
    told = refusal(job)
    assert "train.learning_rate" in told
    sound = checkpoint.by_step(Path(job.work) / "checkpoints")[0]
    assert checkpoint.damage(sound) is None
    assert all(bool(torch.isfinite(weight).all()) for weight in load_file(sound / "model.safetensors").values())
    assert f"step {checkpoint.step_of(sound) + 1} " in told
    assert refusal(job) == told, "a rerun resumes, and says the same"


def test_an_update_that_overflows_is_not_written_as_a_checkpoint(project):
    settings = TRAIN.replace("1e-3", "3e38").replace(
        "max_steps: 3", "max_steps: 3, checkpoint_every: 1, schedule: constant, warmup_ratio: 0, weight_decay: 10"
    )
    job = only_job(write_spec(project, CPT, "full", settings), project / "runs")
    told = refusal(job)
    assert "optimizer step 1 left inf or nan in " in told
    assert "Lower train.learning_rate" in told
    assert newest(job) == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_poisoned_base_weight_is_refused_at_load_by_its_name(value, project):
    harm_weight(project, "model.layers.1.mlp.up_proj.weight", value)
    with pytest.raises(InvalidInput) as caught:
        only_job(write_spec(project), project / "runs")
    assert str(caught.value) == (
        f"{project / 'base'}: the base holds inf or nan in model.layers.1.mlp.up_proj.weight; "
        "fetch or copy its files anew"
    )


@pytest.mark.parametrize("part", ["lora_A", "base_layer"])
def test_weights_that_were_broken_before_the_first_step_are_blamed_and_not_the_rows(part, project, monkeypatch):
    """An adapter's own weight, and a frozen one beneath it."""
    make = train.stop_before_bad_steps

    def harm(stage, trainer, tokenizer):
        weight = next(p for n, p in trainer.model.named_parameters() if part in n)
        weight.data.view(-1)[0] = torch.nan
        return make(stage, trainer, tokenizer)

    monkeypatch.setattr(train, "stop_before_bad_steps", harm)
    job = only_job(write_spec(project, CPT, "lora, rank: 2"), project / "runs")
    told = refusal(job)
    assert "not finite at step 1 of 3" in told
    assert "an earlier step broke the weights, not these rows: they hold inf or nan in " in told
    assert part in told
    assert newest(job) == 0


@pytest.mark.parametrize("method", ["full", "spectrum, top_percent: 50", "lora, rank: 2", "qlora, rank: 2"])
def test_a_weight_that_breaks_after_the_last_step_is_never_merged(method, project, monkeypatch):
    fit = train.fit

    def harmed(stage, prepared, *given, **named):
        record = fit(stage, prepared, *given, **named)
        weight = next(p for p in prepared.model.parameters() if p.requires_grad)
        weight.data.view(-1)[0] = torch.nan
        return record

    monkeypatch.setattr("stages.make.fit", harmed)
    told = refusal(only_job(write_spec(project, CPT, method), project / "runs"))
    assert told.startswith("training left inf or nan in ")
    assert told.endswith("lower train.learning_rate and run again")
