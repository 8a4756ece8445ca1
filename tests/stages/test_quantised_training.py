"""Methods over a quantised base in real trainers and through the flow."""

import json

import pytest
import torch
from methods_table import label
from preemption import AskedAt
from quantised import METHODS, STARTED, distance, logits, prepared
from tiny import sentences, write_project
from transformers import TrainerCallback

from stages.arguments import trainer_arguments
from stages.dpo import Dpo
from stages.errors import TryAgain
from stages.ift import Ift
from stages.methods.base import MethodSpec
from stages.model import load_tokenizer
from stages.train import fit

pytestmark = pytest.mark.model

every_method = pytest.mark.parametrize("method", METHODS, ids=label)


# In a trainer

TALKS = [
    {"messages": [{"role": "user", "content": f"say {t.split()[0]}"}, {"role": "assistant", "content": t}]}
    for t in sentences(8, 5)
]
PAIRS = [
    {
        "prompt": talk["messages"][:1],
        "chosen": talk["messages"][1:],
        "rejected": [{"role": "assistant", "content": "night " + talk["messages"][1]["content"][::-1]}],
    }
    for talk in TALKS
]


class Spy(TrainerCallback):
    """Looks at the parameters' precision, at policy and reference, before the first step and after the last."""

    def __init__(self) -> None:
        self.trainer, self.batch = None, None
        self.policy, self.reference = [], []

    def look(self) -> None:
        trainer = self.trainer
        self.batch = batch = trainer.data_collator([trainer.train_dataset[number] for number in range(4)])
        trainer.model.eval()
        if "ref_chosen_logps" in batch:
            self.reference.append(torch.cat([batch["ref_chosen_logps"], batch["ref_rejected_logps"]]))
        else:
            self.reference.append(torch.cat(trainer.compute_ref_log_probs(trainer.model, batch)))
        self.policy.append(log_probabilities(trainer.model, batch))
        trainer.model.train()

    def on_train_begin(self, args, state, control, **_):
        self.look()

    def on_train_end(self, args, state, control, **_):
        self.look()


def log_probabilities(model, batch) -> torch.Tensor:
    with torch.no_grad():
        found = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    scores = found[:, :-1].log_softmax(-1).gather(2, batch["input_ids"][:, 1:, None])[..., 0]
    return (scores * batch["completion_mask"][:, 1:]).sum(1)


def stage_of(method: MethodSpec, kind: type, **settings):
    train = {
        "learning_rate": 1e-2, "max_steps": 3, "sequence_length": 96, "batch_size": 4, "precision": "float32",
        "warmup_ratio": 0.0,
    }  # fmt: skip
    document = {
        "name": "it",
        "kind": "dpo" if kind is Dpo else "ift",
        "method": json.loads(method.model_dump_json()),
        "data": [{"path": "rows.jsonl"}],
        "train": train | settings,
    }
    return kind.model_validate_json(json.dumps(document))


@every_method
def test_dpos_policy_and_reference_are_the_prepared_start(method, base_model, tmp_path, monkeypatch):
    spy, tokenizer, make = Spy(), load_tokenizer(base_model), Dpo.trainer

    def trainer(self, model, tokenizer, dataset, arguments, callbacks):
        spy.trainer = make(self, model, tokenizer, dataset, arguments, [*callbacks, spy])
        return spy.trainer

    monkeypatch.setattr(Dpo, "trainer", trainer)
    stage = stage_of(method, Dpo)
    dataset, _ = stage.dataset(PAIRS, tokenizer)
    model = prepared(method, base_model)
    fit(stage, model, tokenizer, dataset, seed=1, folder=tmp_path, preemption=None)
    expected = log_probabilities(prepared(method, base_model).model.eval(), spy.batch)
    for found in (spy.policy[0], *spy.reference):
        assert distance(found, expected) <= 1e-3
    assert distance(spy.policy[1], expected) > 0.1  # or the lines above would prove nothing
    assert not hasattr(spy.trainer.model, "peft_config") or {"is_loaded_in_4bit", "is_loaded_in_8bit"}.isdisjoint(
        vars(spy.trainer.model)
    )


@pytest.mark.parametrize("kind", [Ift, Dpo])
@every_method
def test_the_trainer_leaves_adapters_in_the_precision_and_at_the_values_that_they_had(
    method, kind, base_model, tmp_path
):
    """TRL casts the adapters of quantised models to bfloat16."""
    stage, tokenizer = stage_of(method, kind), load_tokenizer(base_model)
    model, trainable, _ = prepared(method, base_model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in trainable:
                parameter.add_(1e-5)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if name in trainable}
    dataset, _ = stage.dataset(TALKS if kind is Ift else PAIRS, tokenizer)
    arguments = trainer_arguments(stage, seed=1, folder=tmp_path, bfloat16=False, cpu=True)
    found = stage.trainer(model, tokenizer, dataset, arguments, [])
    after = dict(found.model.named_parameters())
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


@every_method
def test_activations_can_be_recomputed(method, base_model, tmp_path):
    stage, tokenizer = stage_of(method, Ift, gradient_checkpointing=True, max_steps=1), load_tokenizer(base_model)
    dataset, _ = stage.dataset(TALKS, tokenizer)
    model = prepared(method, base_model)
    record = fit(stage, model, tokenizer, dataset, seed=1, folder=tmp_path, preemption=None)
    assert record["curve"][0]["grad_norm"] > 1e-3


@pytest.mark.parametrize("method", [STARTED[0], METHODS[-1]], ids=label)
def test_dpo_that_was_stopped_resumes_with_the_same_reference_and_ends_with_the_same_bits(method, base_model, tmp_path):
    stage, tokenizer = stage_of(method, Dpo, max_steps=4), load_tokenizer(base_model)
    dataset, _ = stage.dataset(PAIRS, tokenizer)

    def run(name, preemption=None):
        model = prepared(method, base_model)
        record = fit(stage, model, tokenizer, dataset, seed=1, folder=tmp_path / name, preemption=preemption)
        return logits(model.model), record

    whole, wanted = run("whole")
    with pytest.raises(TryAgain, match="step 2 of 4"):
        run("stopped", AskedAt(2))
    resumed, found = run("stopped")
    assert found["resumed_at"] == 2
    assert torch.equal(whole, resumed)
    assert found["curve"] == wanted["curve"]


# Through the flow


CHAIN = """\
name: tiny
model: {path: base, dtype: float32}
stages:
  - name: knowledge
    kind: cpt
    method: {kind: qlora, rank: 4}
    data: [{path: data/corpus.jsonl}]
    train: {learning_rate: 5e-3, max_steps: 2, sequence_length: 64, batch_size: 2}
  - name: answers
    kind: ift
    method: {kind: qlora, rank: 4}
    data: [{path: data/instructions.jsonl}]
    train: {learning_rate: 5e-3, max_steps: 2, sequence_length: 128, batch_size: 2}
  - name: manner
    kind: dpo
    method: {kind: lq_lora, rank: 4, calibration_rows: 4}
    data: [{path: data/pairs.jsonl}]
    train: {learning_rate: 5e-3, max_steps: 2, sequence_length: 128, batch_size: 2}
  - name: again
    kind: dpo
    method: {kind: qa_lora, rank: 2, group_size: 8}
    data: [{path: data/pairs.jsonl}]
    train: {learning_rate: 5e-3, max_steps: 2, sequence_length: 128, batch_size: 2}
"""


def test_each_stage_records_the_error_that_quantising_again_makes(tmp_path, run_spec):
    plan = run_spec(write_project(tmp_path / "project", CHAIN), until="again")
    records = [step.artifact.manifest["record"] for step in plan.steps[1:5]]
    assert len(records) == 4
    for record in records:
        assert record["start"]["exact"] is False
        assert 1e-5 < record["start"]["adapted_difference"] < 1
        assert record["hand_over"]["max_logit_error"] <= 1e-4
