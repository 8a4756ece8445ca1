"""Every method in real trainers: DPO's reference, exact resumes, and what a method adds to the trainer."""

import json
import math
from pathlib import Path

import pytest
import torch
from architectures import write_architecture
from methods_table import METHODS, label, method_of
from preemption import AskedAt
from tiny import sentences
from transformers import TrainerCallback, set_seed

from stages import probe
from stages.dpo import Dpo
from stages.errors import TryAgain
from stages.ift import Ift
from stages.merge import hand_over
from stages.methods.adalora import orthogonality
from stages.methods.base import MethodSpec, Start
from stages.model import load_plain, load_tokenizer
from stages.train import fit

pytestmark = pytest.mark.model

every_method = pytest.mark.parametrize("method", METHODS, ids=label)
TRAIN = {
    "learning_rate": 1e-2, "max_steps": 4, "sequence_length": 96, "batch_size": 4, "micro_batch_size": 2,
    "precision": "float32", "warmup_ratio": 0.0,
}  # fmt: skip
TALKS = [
    {"messages": [{"role": "user", "content": f"say {t.split()[0]}"}, {"role": "assistant", "content": t}]}
    for t in sentences(24, 5)
]
PAIRS = [
    {
        "prompt": [{"role": "user", "content": f"say {t.split()[0]}"}],
        "chosen": [{"role": "assistant", "content": t}],
        "rejected": [{"role": "assistant", "content": "night " + t[::-1]}],
    }
    for t in sentences(8, 8)
]


def stage_of(method: MethodSpec, objective: type = Ift, **train):
    document = {
        "name": "it",
        "kind": "dpo" if objective is Dpo else "ift",
        "method": json.loads(method.model_dump_json()),
        "data": [{"path": "rows.jsonl"}],
        # Where virtual tokens come first, positions cannot start again within a sequence.
        "train": TRAIN | ({} if objective is Dpo else {"packing": method.mergeable}) | train,
    }
    return objective.model_validate_json(json.dumps(document))


@pytest.fixture(scope="module")
def tokenizer(base_model):
    return load_tokenizer(base_model)


@pytest.fixture
def train_on(base_model, tokenizer, tmp_path):
    """A function that prepares a stage and trains it as a run does; returns what was prepared and the record."""

    def run(stage, spy=None, preemption=None, folder: Path = tmp_path / "checkpoints", base: Path = base_model):
        set_seed(3)
        dataset, _ = stage.dataset(PAIRS if stage.kind == "dpo" else TALKS, tokenizer)
        start = Start(base, seed=3, rows=lambda: stage.token_rows(dataset, tokenizer))
        prepared = stage.method.prepare(stage.method.load(base, torch.float32, torch.float32), start)
        if spy is not None:
            make = stage.trainer

            def trainer(*arguments):
                spy.trainer = make(*arguments)
                spy.trainer.add_callback(spy)
                return spy.trainer

            object.__setattr__(stage, "trainer", trainer)
        record = fit(stage, prepared, tokenizer, dataset, seed=3, folder=folder, preemption=preemption)
        return prepared, record

    return run


class Spy(TrainerCallback):
    """Looks at policy and reference before the first step and after the last."""

    def __init__(self) -> None:
        self.trainer = None
        self.batch = None
        self.seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def look(self) -> tuple[torch.Tensor, torch.Tensor]:
        trainer = self.trainer
        self.batch = trainer.data_collator([trainer.train_dataset[number] for number in range(4)])
        trainer.model.eval()
        if "ref_chosen_logps" in self.batch:
            reference = torch.cat([self.batch["ref_chosen_logps"], self.batch["ref_rejected_logps"]])
        else:
            reference = torch.cat(trainer.compute_ref_log_probs(trainer.model, self.batch))
        policy = log_probabilities(trainer.model, self.batch)
        trainer.model.train()
        return policy, reference.double()

    def on_train_begin(self, args, state, control, **_):
        self.seen["before"] = self.look()

    def on_train_end(self, args, state, control, **_):
        self.seen["after"] = self.look()


def log_probabilities(model, batch) -> torch.Tensor:
    """Summed log-probabilities of the answers, by hand: the chosen ones', then the rejected ones'."""
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    logits = logits[:, -batch["input_ids"].shape[1] :]  # prompt tuning puts positions before the tokens
    scores = logits[:, :-1].double().log_softmax(-1).gather(2, batch["input_ids"][:, 1:, None])[..., 0]
    return (scores * batch["completion_mask"][:, 1:]).sum(1)


# DPO's reference


def start_alone(stage, base_model: Path):
    """The start checkpoint as no trainer has touched it; quantised where that is what the policy starts from."""
    method = stage.method
    if method.starts_exactly or not method.starts_at_reference:
        return load_plain(base_model, torch.float32).eval()
    set_seed(3)
    dataset, _ = stage.dataset(PAIRS, load_tokenizer(base_model))
    start = Start(base_model, seed=3, rows=lambda: stage.token_rows(dataset, load_tokenizer(base_model)))
    return method.prepare(method.load(base_model, torch.float32, torch.float32), start).model.eval()


@pytest.mark.parametrize("method", [m for m in METHODS if "dpo" in m.objectives], ids=label)
def test_policy_and_reference_are_the_start_before_training_and_the_reference_after(method, base_model, train_on):
    spy = Spy()
    stage = stage_of(method, Dpo)
    _, record = train_on(stage, spy)
    (policy, reference), (trained, kept) = spy.seen["before"], spy.seen["after"]
    expected = log_probabilities(start_alone(stage, base_model), spy.batch)
    assert torch.allclose(reference, expected, atol=2e-3)
    assert torch.allclose(kept, expected, atol=2e-3)
    assert torch.allclose(policy, expected, atol=2e-3) == method.starts_at_reference
    assert float((trained - policy).abs().max()) > 1e-3  # or the lines above would prove nothing
    if stage.first_loss is not None and method.starts_at_reference:
        assert record["curve"][0]["loss"] == pytest.approx(math.log(2), abs=1e-4)


# Resuming


def trained_weights(prepared) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in prepared.model.named_parameters() if name in prepared.trainable}


@every_method
def test_a_run_that_was_stopped_and_resumed_ends_with_the_same_bits(method, train_on, tmp_path):
    fields = {"dropout": 0.1} if "dropout" in type(method).model_fields else {}
    stage = stage_of(method.model_copy(update=fields), max_steps=6)
    whole, _ = train_on(stage, folder=tmp_path / "whole")
    with pytest.raises(TryAgain, match="step 3 of 6"):
        train_on(stage, folder=tmp_path / "stopped", preemption=AskedAt(3))
    resumed, record = train_on(stage, folder=tmp_path / "stopped")
    assert record["resumed_at"] == 3
    wanted, found = trained_weights(whole), trained_weights(resumed)
    assert wanted.keys() == found.keys()
    assert [name for name in wanted if not torch.equal(wanted[name], found[name])] == []
    ids = probe.probe_ids(whole.model)
    assert torch.equal(probe.logits(whole.model, ids), probe.logits(resumed.model, ids))


@pytest.mark.parametrize("architecture", ["mixtral", "phi3", "gpt2"])
@pytest.mark.parametrize("kind", ["full", "spectrum", "lora"])
def test_a_resume_is_exact_where_weights_are_held_otherwise_than_they_are_kept(
    kind, architecture, train_on, tmp_path, base_model
):
    """Experts and parts of fused projections: transformers writes the first by other names than it holds them."""
    base = write_architecture(architecture, tmp_path / "base")
    stage = stage_of(method_of(kind), max_steps=4, packing=False)
    whole, _ = train_on(stage, folder=tmp_path / "whole", base=base)
    with pytest.raises(TryAgain):
        train_on(stage, folder=tmp_path / "stopped", preemption=AskedAt(2), base=base)
    resumed, _ = train_on(stage, folder=tmp_path / "stopped", base=base)
    wanted, found = trained_weights(whole), trained_weights(resumed)
    assert [name for name in wanted if not torch.equal(wanted[name], found[name])] == []
    # What the trainer switched on in the config, a mixture's router logits, is no part of the model.
    _, record = hand_over(stage.method, resumed.model, load_tokenizer(base_model), Start(base), tmp_path)
    assert record["max_logit_error"] <= 1e-4


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_mixtures_balancing_loss_is_not_taken_for_a_wrong_reference(kind, train_on, tmp_path):
    base = write_architecture("mixtral", tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"router_aux_loss_coef": 0.02}))
    prepared, record = train_on(stage_of(method_of(kind), Dpo, max_steps=1), base=base)
    assert record["curve"][0]["loss"] > math.log(2) + 0.02
    assert prepared.model.config.output_router_logits is False
    assert prepared.model.config.router_aux_loss_coef == 0.02


@pytest.mark.parametrize("quantization", ["int8", "nf4", "fp4"])
def test_rounding_of_inputs_is_not_taken_for_a_leak_between_packed_documents(quantization, train_on):
    _, record = train_on(stage_of(method_of("qlora", quantization=quantization), max_steps=1, packing=True))
    assert record["packing_leak"] <= probe.TOLERANCE


# What methods add to the trainer


def test_lora_plus_trains_b_faster_with_the_optimizer_of_the_spec(train_on):
    spy = Spy()
    spy.look = lambda: None
    train_on(stage_of(method_of("lora_plus", learning_rate_ratio=8.0), schedule="constant", weight_decay=0.1), spy)
    names = {id(p): name for name, p in spy.trainer.model.named_parameters()}
    optimizer = spy.trainer.optimizer
    rates = {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert {rate for name, rate in rates.items() if ".lora_A." in name} == {1e-2}
    assert {rate for name, rate in rates.items() if ".lora_B." in name} == {8e-2}
    assert len(rates) == len(names) - sum(not p.requires_grad for p in spy.trainer.model.parameters())
    assert {group["weight_decay"] for group in optimizer.param_groups if group["params"]} == {0.1}


def rank_entries(prepared) -> list[torch.Tensor]:
    return [p for name, p in prepared.model.named_parameters() if ".lora_E." in name]


def test_adalora_prunes_down_to_its_budget(train_on):
    method = method_of("adalora", warmup_share=0.2, final_share=0.2)
    prepared, _ = train_on(stage_of(method, max_steps=20))
    entries = rank_entries(prepared)
    kept = sum(int((entry != 0).sum()) for entry in entries)
    assert kept == method.target_rank * len(entries)
    assert len({int((entry != 0).sum()) for entry in entries}) > 1  # budget moved between matrices


@pytest.mark.parametrize("micro", [4, 2, 1])
@pytest.mark.parametrize("objective", [Ift, Dpo])
def test_adaloras_orthogonality_term_is_in_the_loss_once_whatever_the_accumulation(
    objective, micro, train_on, tmp_path
):
    losses = {}
    for weight in (0.0, 2.0):
        spy = Spy()
        spy.look = lambda spy=spy: float(orthogonality(spy.trainer.model).detach())
        stage = stage_of(method_of("adalora", orthogonality=weight), objective, max_steps=2, micro_batch_size=micro)
        _, record = train_on(stage, spy, folder=tmp_path / str(weight))
        losses[weight] = record["curve"][0]["loss"]
        at_start, at_end = spy.seen["before"], spy.seen["after"]
    assert losses[2.0] - losses[0.0] == pytest.approx(2 * at_start, rel=1e-3)
    assert at_end < at_start
