"""Methods over a quantised base: what merges keep, what the start loses, and what bitsandbytes does behind backs."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from methods_table import label, method_of
from pydantic import ValidationError
from safetensors.torch import load_file
from tiny import SPEC, sentences, write_project
from transformers import TrainerCallback, set_seed

from specs.load import SpecError
from stages.artifact import MODEL
from stages.check import check_spec
from stages.dpo import Dpo
from stages.errors import InvalidInput, StageFailed
from stages.ift import Ift
from stages.merge import hand_over
from stages.methods import grouped, loftq, lq_lora, qlora
from stages.methods.base import MethodSpec, Prepared, Start
from stages.model import load_plain, load_tokenizer
from stages.pipeline import load_pipeline
from stages.train import fit

pytestmark = pytest.mark.model

QLORAS = [
    method_of("qlora"),
    method_of("qlora", double_quantization=False),
    method_of("qlora", quantization="fp4"),
    method_of("qlora", quantization="fp4", double_quantization=False),
    method_of("qlora", quantization="int8"),
]
STARTED = [method_of("loftq"), method_of("loftq", quantization="fp4"), method_of("lq_lora")]
METHODS = [*QLORAS, *STARTED, method_of("qa_lora")]
FOUR_BITS = [method for method in [*QLORAS, *STARTED] if method.quantization != "int8"]
every_method = pytest.mark.parametrize("method", METHODS, ids=label)
IDS = torch.randint(0, 300, (2, 16), generator=torch.Generator().manual_seed(7))


def rows(count: int = 4, learned: bool = True):
    generator = torch.Generator().manual_seed(5)
    for _ in range(count):
        ids = torch.randint(0, 300, (1, 24), generator=generator)
        yield ids, ids.clone() if learned else torch.full_like(ids, -100)


def logits(model) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits.float()


def prepared(method: MethodSpec, start: Path, compute: torch.dtype = torch.float32) -> Prepared:
    set_seed(1)
    return method.prepare(method.load(start, torch.float32, compute), Start(start, rows=rows))


def train(model, rate: float, steps: int = 4, *, autocast: bool = False) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    model.train()
    for ids, labels in rows(steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            model(input_ids=ids, labels=labels, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


def handed_over(method: MethodSpec, model, start: Path, folder: Path):
    return hand_over(method, model, load_tokenizer(start), Start(start, rows=rows), folder)


@pytest.fixture(scope="module")
def wide(tmp_path_factory, base_model) -> Path:
    """Sides that divide by bitsandbytes' block size, as those of real models do."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("wide")
    torch.manual_seed(2)
    config = LlamaConfig(
        vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    load_tokenizer(base_model).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def biased(tmp_path_factory, base_model) -> Path:
    """Layers with biases."""
    from architectures import write_architecture

    folder = write_architecture("gpt_neox", tmp_path_factory.mktemp("biased"))
    load_tokenizer(base_model).save_pretrained(folder)
    return folder


# Merges


@every_method
@pytest.mark.parametrize("rate", [5e-3, 1e-4])
def test_the_merge_is_the_trained_model_after_large_and_small_updates(method, rate, base_model, tmp_path):
    model = prepared(method, base_model).model
    untrained = logits(model)
    train(model, rate)
    trained = logits(model)
    reloaded, record = handed_over(method, model, base_model, tmp_path)
    moved, error = distance(trained, untrained), distance(logits(reloaded), trained)
    if getattr(method, "quantization", None) == "int8":  # the trained model rounds its inputs; no plain one does
        assert error <= 3 * record["activation_error"] < 1
        assert record["activation_error"] > 1e-3
    else:
        assert error <= min(1e-4, moved / 100)  # requantising would lose a small update whole
        assert "activation_error" not in record
    assert record["max_logit_error"] <= 1e-4
    assert "distance_to_trained" not in record


@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8"])
def test_a_merge_into_the_original_weights_is_another_model_and_says_so(quantization, base_model, tmp_path):
    method = method_of("qlora", quantization=quantization, merge_into="original")
    model = prepared(method, base_model).model
    train(model, 1e-2)
    trained = logits(model)
    reloaded, record = handed_over(method, model, base_model, tmp_path)
    assert record["max_logit_error"] <= 1e-4
    assert record["distance_to_trained"] > 1e-3
    assert distance(logits(reloaded), trained) > 1e-3
    merged, start = load_file(tmp_path / MODEL / "model.safetensors"), load_file(base_model / "model.safetensors")
    for name, module in model.get_base_model().named_modules():
        if hasattr(module, "lora_A"):
            update = module.scaling["default"] * module.lora_B["default"].weight @ module.lora_A["default"].weight
            assert torch.allclose(merged[f"{name}.weight"], start[f"{name}.weight"] + update, atol=1e-6)


@every_method
def test_what_is_written_has_no_trace_of_the_quantisation(method, base_model, tmp_path):
    handed_over(method, prepared(method, base_model).model, base_model, tmp_path)
    config = json.loads((tmp_path / MODEL / "config.json").read_text())
    assert config == json.loads((base_model / "config.json").read_text())
    assert not [name for name in load_file(tmp_path / MODEL / "model.safetensors") if "absmax" in name or "SCB" in name]


@every_method
def test_biases_are_not_rounded_by_training_in_bfloat16(method, biased, tmp_path):
    """bitsandbytes casts them in place."""
    model = prepared(method, biased, torch.bfloat16).model
    train(model, 1e-2, autocast=True)
    _, record = handed_over(method, model, biased, tmp_path)
    assert record["max_logit_error"] <= 1e-4
    found, start = load_file(tmp_path / MODEL / "model.safetensors"), load_file(biased / "model.safetensors")
    biases = [name for name in start if name.endswith("bias")]
    assert biases
    assert all(torch.equal(found[name], start[name]) for name in biases)


@every_method
def test_the_record_says_how_much_of_the_model_is_quantised(method, base_model):
    share = prepared(method, base_model).record["quantization"]
    plain = load_plain(base_model, torch.float32)
    linear = {name: p.numel() for name, p in plain.named_parameters() if "proj" in name}
    assert share["layers"] == len(linear)
    assert share["quantized_parameters"] == sum(linear.values())
    assert share["float_parameters"] == sum(p.numel() for p in plain.parameters()) - sum(linear.values())


def held_bytes(model) -> int:
    """What layers hold of their weights, scales and zero-points."""
    total = 0
    for module in model.modules():
        if isinstance(module, grouped.GroupedLinear):
            total += sum(buffer.numel() * buffer.element_size() for buffer in module.buffers(recurse=False))
        elif qlora.is_quantised(module):
            total += module.weight.numel() * module.weight.element_size()
            state = getattr(module.weight, "quant_state", None)
            if state is not None:
                total += state.absmax.numel() * state.absmax.element_size()
    return total


@pytest.mark.parametrize(
    ("method", "bits"),
    [
        (method_of("qlora"), 4.25),
        (method_of("qlora", double_quantization=False), 4.5),
        (method_of("qlora", quantization="int8"), 8),
        (method_of("loftq"), 4.25),
        (method_of("lq_lora"), 4.25),
        (method_of("qa_lora", group_size=32, rank=2), 6),
        (method_of("qa_lora", group_size=64, rank=1), 5),
    ],
    ids=label,
)
def test_the_storage_is_really_that_small(method, bits, wide):
    model, _, record = prepared(method, wide)
    train(model, 1e-3)
    assert 8 * held_bytes(model) <= bits * record["quantization"]["quantized_parameters"]


# bitsandbytes on CPUs with AVX512-BF16


def gradients(model) -> torch.Tensor:
    model.train()
    model.zero_grad()
    model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


def gradients_around_an_evaluation(model) -> tuple[torch.Tensor, torch.Tensor]:
    before = gradients(model).clone()
    logits(model)  # as precomputing a reference, a probe or an evaluation does
    return before, gradients(model)


@every_method
def test_an_evaluation_leaves_gradients_and_merges_alone(method, wide, tmp_path):
    model = prepared(method, wide).model
    before, after = gradients_around_an_evaluation(model)
    assert float(before.abs().max()) > 0
    assert torch.equal(before, after)
    handed_over(method, model, wide, tmp_path)


@pytest.mark.filterwarnings("ignore:bitsandbytes..gemv_4bit. an autograd kernel was not registered:UserWarning")
@pytest.mark.parametrize("method", FOUR_BITS, ids=label)
def test_without_the_fix_every_4_bit_method_falls_into_the_trap(method, wide, monkeypatch, tmp_path):
    from bitsandbytes.functional import has_avx512bf16

    monkeypatch.setattr(qlora, "keep_weights_trainable", lambda _model: None)
    model = prepared(method, wide).model
    before, after = gradients_around_an_evaluation(model)
    harm = float((after - before).abs().max() / before.abs().max())
    assert (harm > 0.05) == has_avx512bf16()
    if has_avx512bf16():
        with pytest.raises(RuntimeError, match="repacked a 4-bit weight"):
            handed_over(method, model, wide, tmp_path)


# Starts that are nearer than quantisation alone


def errors(method: MethodSpec, start: Path) -> dict[str, float]:
    return prepared(method, start).record["relative_weight_error"]


def test_every_start_is_nearer_to_the_weights_than_quantisation_alone(wide):
    once, often = errors(method_of("loftq", iterations=1), wide), errors(method_of("loftq"), wide)
    weighed = errors(method_of("lq_lora"), wide)
    assert once["quantized"] == often["quantized"] == weighed["quantized"]
    assert often["adapted"] < once["adapted"] < once["quantized"]
    assert weighed["weighed_adapted"] < weighed["weighed_quantized"]
    assert often["adapted"] < weighed["adapted"]  # each is the best in its own norm
    plain = logits(load_plain(wide, torch.float32))
    found = {method.kind: distance(logits(prepared(method, wide).model), plain) for method in METHODS[:1] + STARTED[:1]}
    assert found["loftq"] < found["qlora"]


@pytest.mark.parametrize("kind", ["loftq", "lq_lora"])
@pytest.mark.parametrize("rank", [1, 4])
def test_in_the_weighed_norm_no_start_beats_lq_loras(kind, rank):
    torch.manual_seed(0)
    weight = torch.randn(48, 64)
    importance = loftq.Importance(torch.rand(48) + 0.05, torch.rand(64) + 0.05)
    b, a = loftq.best_factors(weight, rank, importance if kind == "lq_lora" else None)
    best = loftq.squared(loftq.weighed(weight - b @ a, importance))
    other_b, other_a = loftq.best_factors(weight, rank, None)
    assert best <= loftq.squared(loftq.weighed(weight - other_b @ other_a, importance)) * (1 + 1e-6)
    for factor in (b, a):  # a minimum in each factor
        gradient_of = factor.clone().requires_grad_(True)
        product = gradient_of @ a if factor is b else b @ gradient_of
        own = importance if kind == "lq_lora" else None
        loftq.weighed(weight - product, own).square().sum().backward()
        assert float(gradient_of.grad.abs().max()) < 1e-3


@pytest.mark.parametrize("method", STARTED, ids=label)
def test_the_start_does_not_depend_on_alpha(method, wide):
    """Where alpha / rank is left out of the start, as in PEFT, its gain is gone at alpha = 2 rank."""
    found = [logits(prepared(method.model_copy(update={"alpha": alpha}), wide).model) for alpha in (4.0, 8.0, 32.0)]
    for one, other in pairwise(found):
        assert distance(one, other) <= 1e-4


@pytest.mark.parametrize("method", [*STARTED, method_of("qa_lora")], ids=label)
def test_the_start_is_the_same_every_time(method, wide):
    first, second = prepared(method, wide), prepared(method, wide)
    assert torch.equal(logits(first.model), logits(second.model))
    assert first.record == second.record


def test_importance_is_the_squared_gradient_by_row_and_column(wide):
    names = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]
    found = lq_lora.fisher_roots(load_plain(wide, torch.float32), names, rows(3), 3)
    model = load_plain(wide, torch.float32).eval()
    for name in names:
        fisher = torch.zeros_like(model.get_submodule(name).weight)
        for ids, labels in rows(3):
            model.zero_grad()
            model(input_ids=ids, labels=labels).loss.backward()
            fisher += model.get_submodule(name).weight.grad.square() / 3
        for diagonal, mean in zip(found[name], (fisher.mean(1), fisher.mean(0)), strict=True):
            assert torch.allclose(diagonal, mean.sqrt() / mean.sqrt().mean(), rtol=1e-4)


def test_importance_looks_at_no_more_rows_than_it_is_told(wide):
    seen = []

    def counted():
        for row in rows(9):
            seen.append(row)
            yield row

    method = method_of("lq_lora", calibration_rows=3)
    method.prepare(method.load(wide, torch.float32, torch.float32), Start(wide, rows=counted))
    assert len(seen) == 3


@pytest.mark.parametrize("none", [lambda: iter(()), lambda: rows(3, learned=False)])
def test_lq_lora_refuses_a_stage_without_a_row_to_learn_from(none, wide):
    method = method_of("lq_lora")
    model = method.load(wide, torch.float32, torch.float32)
    with pytest.raises(InvalidInput, match="none has a token to learn; give the stage rows, or use method loftq"):
        method.prepare(model, Start(wide, rows=none))


@every_method
def test_counting_on_the_meta_device_needs_neither_weights_nor_rows(method, base_model):
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base_model))
    counted, real = method.prepare(model, Start(base_model)), prepared(method, base_model)
    sizes = [
        {name: p.numel() for name, p in one.model.named_parameters() if name in one.trainable}
        for one in (counted, real)
    ]
    assert sizes[0] == sizes[1]


# QA-LoRA


def test_four_bits_are_packed_and_found_again():
    codes = torch.randint(0, 16, (5, 32), dtype=torch.uint8)
    assert torch.equal(grouped.unpack(grouped.pack(codes)), codes)


@pytest.mark.parametrize("group_size", [2, 8, 14, 64])
def test_groups_quantise_within_half_a_step_whatever_the_width(group_size):
    weight = torch.randn(6, 30)
    weight[2] = 0.25  # a group without a range
    layer = grouped.GroupedLinear(weight, None, group_size)
    found = layer.weight_with(layer.zeros)
    step = layer.scales.repeat_interleave(group_size, dim=1)[:, :30]
    assert bool(((found - weight).abs() <= step / 2 + 1e-6).all())
    assert torch.allclose(found[2], weight[2], atol=1e-6)


@pytest.mark.parametrize("group_size", [8, 14])
def test_what_qa_lora_merges_is_still_in_four_bits(group_size, base_model, tmp_path):
    method = method_of("qa_lora", group_size=group_size, rank=2)
    model = prepared(method, base_model).model
    train(model, 1e-2)
    codes = {name: m.codes.clone() for name, m in model.named_modules() if isinstance(m, grouped.GroupedLinear)}
    handed_over(method, model, base_model, tmp_path)
    merged = load_file(tmp_path / MODEL / "model.safetensors")
    for name, packed in codes.items():
        weight = merged[f"{name}.weight"]
        again = grouped.GroupedLinear(weight, None, group_size)
        assert torch.equal(again.codes, packed)
        assert torch.allclose(again.weight_with(again.zeros), weight, atol=1e-5)
    # so that the next such stage starts where this one ended
    following = prepared(method, tmp_path / MODEL).model
    assert distance(logits(following), logits(load_plain(tmp_path / MODEL, torch.float32))) <= 1e-4


def test_qa_loras_layer_has_the_gradients_of_the_plain_one():
    torch.manual_seed(0)
    layer = grouped.GroupedLinear(torch.randn(6, 20), torch.randn(6), 8)
    layer.add_adapter(2, 0.5, 0.0)
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(3, 4, 20, requires_grad=True)
    layer(x).square().sum().backward()
    found = [x.grad.clone(), layer.lora_A.grad.clone(), layer.lora_B.grad.clone()]
    x.grad = layer.lora_A.grad = layer.lora_B.grad = None
    torch.nn.functional.linear(x, layer.merged(), layer.bias).square().sum().backward()
    for one, other in zip(found, [x.grad, layer.lora_A.grad, layer.lora_B.grad], strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-3)


def test_a_rank_that_the_groups_do_not_allow_is_refused(base_model):
    method = method_of("qa_lora", group_size=16, rank=4)
    with pytest.raises(InvalidInput, match=r"rank 4 is larger than the 2 groups of 16 inputs of .*lower rank to 2"):
        method.prepare(method.load(base_model, torch.float32, torch.float32), Start(base_model))


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
    from stages.train import trainer_arguments

    rows = TALKS if kind is Ift else PAIRS
    dataset, _ = stage.dataset(rows, tokenizer)
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


# Through the flow


CHAIN = (
    SPEC.split("stages:")[0]
    + """\
stages:
  - name: knowledge
    kind: cpt
    method: {kind: qlora, rank: 4}
    data: [{path: data/corpus.jsonl}]
    train: {learning_rate: 5e-3, max_steps: 3, sequence_length: 64, batch_size: 2}
  - name: answers
    kind: ift
    method: {kind: lq_lora, rank: 4, calibration_rows: 4}
    data: [{path: data/instructions.jsonl}]
    train: {learning_rate: 5e-3, max_steps: 3, sequence_length: 128, batch_size: 2}
  - name: manner
    kind: dpo
    method: {kind: qa_lora, rank: 2, group_size: 8}
    data: [{path: data/pairs.jsonl}]
    train: {learning_rate: 5e-3, max_steps: 3, sequence_length: 128, batch_size: 2}
  - name: again
    kind: dpo
    method: {kind: qlora, rank: 4, quantization: int8, merge_into: original}
    data: [{path: data/pairs.jsonl}]
    train: {learning_rate: 5e-3, max_steps: 3, sequence_length: 128, batch_size: 2}
"""
)


def test_each_stage_records_the_error_that_quantising_again_makes(tmp_path, run_spec):
    document = CHAIN[: CHAIN.index("metrics:")] + CHAIN[CHAIN.index("stages:") :]
    plan = run_spec(write_project(tmp_path / "project", document))
    records = [step.artifact.manifest["record"] for step in plan.steps[1:-1]]
    for record in records:
        assert record["start"]["exact"] is False
        assert 1e-5 < record["start"]["adapted_difference"] < 1
        assert record["hand_over"]["max_logit_error"] <= 1e-4
    assert records[-1]["hand_over"]["distance_to_trained"] > 0


# What is refused


@pytest.mark.parametrize("value", [True, False])
def test_double_quantization_is_refused_where_it_has_no_effect(value):
    with pytest.raises(ValidationError, match="double_quantization has no effect on int8"):
        method_of("qlora", quantization="int8", double_quantization=value)


@pytest.mark.parametrize(
    ("kind", "fields", "complaint"),
    [
        ("qlora", {"quantization": "nf3"}, "'nf4', 'fp4' or 'int8'"),
        ("loftq", {"quantization": "int8"}, "'nf4' or 'fp4'"),
        ("loftq", {"iterations": 0}, "greater than 0"),
        ("lq_lora", {"calibration_rows": 0}, "greater than 0"),
        ("qa_lora", {"group_size": 7}, "group_size must be even"),
        ("qa_lora", {"quantization": "nf4"}, "Extra inputs"),
    ],
)
def test_settings_that_no_method_has_are_refused(kind, fields, complaint):
    with pytest.raises(ValidationError, match=complaint):
        method_of(kind, **fields)


def test_a_base_that_is_quantised_already_is_refused_before_anything_runs(tmp_path):
    from stages.plan import make_plan

    spec = write_project(tmp_path / "project")
    file = spec.parent / "base/config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq", "bits": 4}}))
    pipeline, document = load_pipeline(spec)
    complaint = r"the base is quantised already \(quantization_config: gptq\); name the original weights"
    with pytest.raises(SpecError, match=complaint):
        check_spec(pipeline, document)
    with pytest.raises(InvalidInput, match=complaint):
        make_plan(pipeline, spec.parent, spec.parent / "runs")


@pytest.mark.parametrize("method", METHODS, ids=label)
def test_a_merge_that_is_not_the_trained_model_is_refused(method, base_model, tmp_path, monkeypatch):
    finish = type(method).finish

    def requantised(self, model, start):
        plain = finish(self, model, start)
        for name, weight in plain.named_parameters():
            if "proj" in name:
                layer = grouped.GroupedLinear(weight.data, None, 32)
                weight.data = layer.weight_with(layer.zeros)
        return plain

    model = prepared(method, base_model).model
    train(model, 1e-2)
    monkeypatch.setattr(type(method), "finish", requantised)
    with pytest.raises(StageFailed, match="is not the trained model: logits differ by"):
        handed_over(method, model, base_model, tmp_path)
