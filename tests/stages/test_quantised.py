"""What merges of a quantised base keep, what bitsandbytes does behind backs, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from architectures import write_architecture
from methods_table import label, method_of
from pydantic import ValidationError
from quantised import IDS, METHODS, QLORAS, STARTED, distance, handed_over, logits, prepared, train, write_wide
from safetensors.torch import load_file
from tiny import write_project

from specs.load import SpecError
from stages.artifact import MODEL
from stages.check import check_spec
from stages.errors import InvalidInput, StageFailed
from stages.methods import grouped, qlora
from stages.model import load_plain, load_tokenizer
from stages.pipeline import load_pipeline
from stages.plan import make_plan

pytestmark = pytest.mark.model

every_method = pytest.mark.parametrize("method", METHODS, ids=label)


@pytest.fixture(scope="module")
def wide(tmp_path_factory, base_model) -> Path:
    return write_wide(tmp_path_factory.mktemp("wide"), load_tokenizer(base_model))


@pytest.fixture(scope="module")
def biased(tmp_path_factory, base_model) -> Path:
    """Layers with biases, and weights of shape (in, out)."""
    folder = write_architecture("gpt2", tmp_path_factory.mktemp("biased"))
    load_tokenizer(base_model).save_pretrained(folder)
    return folder


# Merges


@pytest.mark.parametrize("method", [*METHODS, *QLORAS[1:3]], ids=label)
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
@pytest.mark.parametrize("method", [*QLORAS[:4], *STARTED], ids=label)
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


# What the plan says, and what is refused


@every_method
def test_a_mixture_is_told_that_its_experts_stay_as_they_are(method):
    usual = method.notes({"model_type": "llama"})
    assert not [note for note in usual if "experts" in note]
    (note,) = set(method.notes({"model_type": "mixtral", "num_local_experts": 8})) - set(usual)
    assert f"{method.kind} leaves the 8 experts of each layer in float32" in note


def test_lq_lora_says_what_its_calibration_costs():
    (note,) = method_of("lq_lora", calibration_rows=8).notes({"model_type": "llama"})
    assert note.startswith("lq_lora first runs 8 rows through the float32 model")


@every_method
def test_a_model_without_plain_linear_layers_is_refused_by_its_config_and_when_loaded(method, tmp_path):
    from transformers import FalconConfig, FalconForCausalLM

    config = FalconConfig(vocab_size=320, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    FalconForCausalLM(config).save_pretrained(tmp_path)
    reason = method.unsupported(json.loads((tmp_path / "config.json").read_text()))
    assert reason is not None
    assert f"method {method.kind} cannot quantise a falcon model" in reason
    with pytest.raises(InvalidInput, match="use method lora"):
        prepared(method, tmp_path)


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
