"""Starts that are nearer to the weights than quantisation alone, and QA-LoRA's 4-bit groups."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from methods_table import label, method_of
from quantised import METHODS, QLORAS, STARTED, distance, handed_over, logits, prepared, rows, train, write_wide
from safetensors.torch import load_file

from stages.artifact import MODEL
from stages.errors import InvalidInput
from stages.methods import grouped, loftq, lq_lora
from stages.methods.base import MethodSpec, Start
from stages.model import load_plain, load_tokenizer

pytestmark = pytest.mark.model

every_method = pytest.mark.parametrize("method", METHODS, ids=label)


@pytest.fixture(scope="module")
def wide(tmp_path_factory, base_model) -> Path:
    return write_wide(tmp_path_factory.mktemp("wide"), load_tokenizer(base_model))


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
    found = {method.kind: distance(logits(prepared(method, wide).model), plain) for method in (QLORAS[0], STARTED[0])}
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


@pytest.mark.parametrize("shape", [(8, 16), (16, 8)])
def test_a_weight_that_quantises_without_an_error_starts_finite_at_itself(shape):
    b, a = loftq.best_factors(torch.zeros(shape), 4, None)
    assert (b.shape, a.shape) == ((shape[0], 4), (4, shape[1]))
    assert bool((b @ a == 0).all())


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
