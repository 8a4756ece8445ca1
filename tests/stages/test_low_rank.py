"""What is particular to methods of the LoRA family, to BitFit and to LongLoRA."""

import json
from pathlib import Path

import pytest
import torch
from architectures import write_architecture
from methods_table import method_of
from transformers import AutoModelForCausalLM, LlamaConfig

from stages import probe
from stages.errors import InvalidInput
from stages.methods import shifted_attention
from stages.methods.base import Start
from stages.methods.targets import adapter_targets
from stages.model import load_plain

pytestmark = pytest.mark.model


def tiny_llama(*, tied: bool = False):
    """The model on which the counts of the methods were published to us: 149,952 parameters."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=304, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=tied,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
    return model


def trained_count(method, model) -> int:
    prepared = method.prepare(model, Start(Path("nowhere")))
    return sum(p.numel() for p in prepared.model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("kind", "fields", "count"),
    [
        ("full", {}, 149_952),
        ("bitfit", {}, 1_536),
        ("lora", {"rank": 8, "target_modules": "query-value"}, 5_376),
        ("lora", {"rank": 8, "target_modules": "attention"}, 10_752),
        ("lora", {"rank": 8, "target_modules": "all-linear"}, 24_576),
        ("rslora", {"rank": 8}, 24_576),
        ("lora_plus", {"rank": 8}, 24_576),
        ("lora_fa", {"rank": 8}, 12_288),
        ("dora", {"rank": 8}, 26_112),
        ("adalora", {"initial_rank": 12, "target_rank": 4}, 37_116),
        ("pissa", {"rank": 8}, 24_576),
        ("milora", {"rank": 8}, 24_576),
        ("olora", {"rank": 8}, 24_576),
        ("vera", {"rank": 64}, 2_880),
        ("glora", {"rank": 4}, 24_576),
        ("longlora", {"rank": 8}, 30_656),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_as_many_parameters_train_as_the_formulas_say(kind, fields, count, device):
    with torch.device(device):
        model = tiny_llama()
    assert trained_count(method_of(kind, **fields), model) == count


@pytest.mark.parametrize(
    ("architecture", "preset", "endings"),
    [
        ("llama", "query-value", {"self_attn.q_proj", "self_attn.v_proj"}),
        ("llama", "attention", {f"self_attn.{name}_proj" for name in "qkvo"}),
        ("phi3", "query-value", {"self_attn.qkv_proj"}),
        ("phi3", "attention", {"self_attn.qkv_proj", "self_attn.o_proj"}),
        ("gpt2", "query-value", {"attn.c_attn"}),
        ("gpt2", "attention", {"attn.c_attn", "attn.c_proj"}),
        ("gpt2", "all-linear", {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}),
        ("gpt_neox", "attention", {"attention.query_key_value", "attention.dense"}),
        ("mixtral", "all-linear", {f"self_attn.{name}_proj" for name in "qkvo"}),
        (
            "qwen2_moe", "all-linear",
            {f"self_attn.{name}_proj" for name in "qkvo"} | {f"shared_expert.{n}_proj" for n in ("gate", "up", "down")},
        ),
    ],
)  # fmt: skip
def test_presets_name_the_modules_of_each_architecture(architecture, preset, endings, tmp_path):
    model = load_plain(write_architecture(architecture, tmp_path), torch.float32)
    assert set(adapter_targets(model, preset)) == endings


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"target_modules": ("q_prj",)}, "q_prj, which this model does not have"),
        ({"target_modules": ("embed_tokens",)}, "an embedding"),
        ({"target_modules": ("q_proj", "lm_head")}, "an embedding"),
        ({"rank": 33}, r"rank 33 is larger than model.layers.0.self_attn.k_proj \(32 x 64\).*lower it to 32"),
    ],
)
@pytest.mark.parametrize("kind", ["lora", "pissa", "dora", "glora"])
def test_targets_and_ranks_that_cannot_be_are_refused(kind, fields, complaint):
    with pytest.raises(InvalidInput, match=complaint):
        method_of(kind, **fields).prepare(tiny_llama(), Start(Path("nowhere")))


@pytest.mark.parametrize(
    ("kind", "fields", "scale"),
    [
        ("lora", {"rank": 8}, 2.0),
        ("lora", {"rank": 8, "alpha": 4.0}, 0.5),
        ("rslora", {"rank": 16}, 2.0),
        ("rslora", {"rank": 16, "alpha": 8.0}, 2.0),
    ],
)
def test_the_scale_is_alpha_over_the_rank_or_its_root(kind, fields, scale):
    model = method_of(kind, **fields).prepare(tiny_llama(), Start(Path("nowhere"))).model
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.scaling["default"] == pytest.approx(scale)


def test_dropout_acts_while_training_only():
    model = method_of("lora", dropout=0.5).prepare(tiny_llama(), Start(Path("nowhere"))).model
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    ids = probe.probe_ids(model)

    def run():
        with torch.no_grad():
            return model(input_ids=ids, use_cache=False).logits

    model.train()
    assert not torch.equal(run(), run())
    model.eval()
    assert torch.equal(run(), run())


@pytest.mark.parametrize("kind", ["pissa", "milora", "olora"])
def test_the_adapter_holds_the_part_of_the_weight_that_it_should(kind):
    model = tiny_llama()
    weight = model.model.layers[1].mlp.up_proj.weight.detach().double().clone()
    prepared = method_of(kind, rank=4).prepare(model, Start(Path("nowhere")))
    layer = prepared.model.base_model.model.model.layers[1].mlp.up_proj
    part = layer.scaling["default"] * layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
    rest = layer.base_layer.weight.double()
    torch.testing.assert_close(rest + part, weight, atol=1e-5, rtol=0)
    values, rest_values = torch.linalg.svdvals(weight), torch.linalg.svdvals(rest)
    if kind == "pissa":
        torch.testing.assert_close(torch.linalg.svdvals(part)[:4], values[:4], atol=1e-4, rtol=0)
        torch.testing.assert_close(rest_values[:60], values[4:], atol=1e-4, rtol=0)
    elif kind == "milora":
        torch.testing.assert_close(torch.linalg.svdvals(part)[:4], values[-4:], atol=1e-4, rtol=0)
        torch.testing.assert_close(rest_values[:60], values[:60], atol=1e-4, rtol=0)
    else:
        b = layer.lora_B["default"].weight.double() * layer.scaling["default"] ** 0.5
        torch.testing.assert_close(b.T @ b, torch.eye(4, dtype=torch.float64), atol=1e-5, rtol=0)


# BitFit


def test_bitfit_says_that_it_rebuilds_a_model_without_biases(tmp_path):
    config = json.loads((write_architecture("llama", tmp_path) / "config.json").read_text())
    (note,) = method_of("bitfit").notes(config)
    assert "zeroed biases (attention_bias: true, mlp_bias: true)" in note
    assert method_of("bitfit").notes(config | {"attention_bias": True, "mlp_bias": True}) == []


@pytest.mark.parametrize(("architecture", "count"), [("gpt2", 1_088), ("gpt_neox", 896)])
def test_bitfit_trains_the_biases_of_norms_too(architecture, count, tmp_path):
    model = load_plain(write_architecture(architecture, tmp_path), torch.float32)
    assert trained_count(method_of("bitfit"), model) == count


def test_bitfit_takes_the_weights_over_without_a_copy():
    model = tiny_llama()
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    rebuilt = method_of("bitfit").prepare(model, Start(Path("nowhere"))).model
    after = {name: p.data_ptr() for name, p in rebuilt.named_parameters()}
    assert all(after[name] == place for name, place in before.items())


# LongLoRA


@pytest.fixture
def long(tmp_path):
    """A function that prepares LongLoRA on a tiny model with its adapters moved away from zero."""

    def make(**fields):
        folder = write_architecture("llama", tmp_path)
        start = Start(folder)
        method = method_of("longlora", **fields)
        model = method.prepare(load_plain(folder, torch.float32), start).model
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.3)
        return method, model, start

    return make


def outputs(model, ids: torch.Tensor, **inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False, **inputs).logits


@pytest.mark.parametrize("length", [4, 8, 29, 32, 50])
def test_nothing_leaks_from_the_future_while_training(length, long):
    _, model, _ = long(group_size=8)
    model.train()
    ids = torch.randint(0, 300, (2, length))
    before = outputs(model, ids)
    for position in range(1, length):
        changed = ids.clone()
        changed[:, position] = (changed[:, position] + 7) % 300
        assert torch.equal(outputs(model, changed)[:, :position], before[:, :position])


@pytest.mark.parametrize("shift", [0, 4])
def test_attention_stays_in_its_group_and_the_shifted_one_reaches_over_its_border(shift):
    query = torch.zeros(1, 2, 24, 24)
    value = torch.eye(24).expand(1, 2, -1, -1)
    options = {"scale": 1.0, "dropout_p": 0.0}
    weights = shifted_attention._grouped(query, query, value, None, 8, shift, options)[0, 0]
    position = torch.arange(24)
    group = (position + shift) // 8
    seen = (group[:, None] == group[None]) & (position[:, None] >= position[None])
    assert torch.allclose(weights, seen / seen.sum(1, keepdim=True))


def test_training_sees_groups_and_evaluation_sees_everything(long):
    _, model, _ = long(group_size=8)
    ids = torch.randint(0, 300, (1, 32))
    model.train()
    grouped = outputs(model, ids)
    model.eval()
    full = outputs(model, ids)
    assert torch.allclose(grouped[:, :4], full[:, :4], atol=1e-5)  # the first half group is whole either way
    assert float((grouped[:, 8:] - full[:, 8:]).abs().max()) > 1e-2
    model.base_model.model.config._attn_implementation = "sdpa"
    assert torch.allclose(outputs(model, ids), full, atol=1e-5)


def test_packed_documents_and_padding_are_kept_apart_while_training(long):
    _, model, _ = long(group_size=8)
    model.train()
    positions = torch.arange(12).repeat(2)[None]
    ids = torch.randint(0, 300, (1, 24))
    other = torch.cat([(ids[:, :12] + 5) % 300, ids[:, 12:]], 1)
    found = [outputs(model, packed, position_ids=positions)[:, 12:] for packed in (ids, other)]
    assert torch.equal(*found)
    mask = torch.ones(1, 24, dtype=torch.long)
    mask[:, 18:] = 0
    padded = outputs(model, ids, attention_mask=mask)[:, :18]
    assert torch.allclose(padded, outputs(model, ids)[:, :18], atol=1e-5)
    assert bool(torch.isfinite(padded).all())


@pytest.mark.parametrize("tied", [False, True])
def test_a_longer_context_is_in_the_config_of_the_merged_model(tied, tmp_path):
    model = tiny_llama(tied=tied)
    method = method_of("longlora", context_length=512)
    prepared = method.prepare(model, Start(Path("nowhere")))
    assert prepared.record == {"rope_factor": 4.0, "group_size": 8}
    plain = method.finish(prepared.model, Start(Path("nowhere")))
    plain.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["max_position_embeddings"] == 512
    assert config["rope_parameters"]["rope_type"] == "linear"
    assert config["rope_parameters"]["factor"] == 4.0
    again = load_plain(tmp_path, torch.float32)
    assert again.config._attn_implementation == "sdpa"
    assert again.config.tie_word_embeddings == tied
    ids = torch.randint(0, 300, (1, 200))
    torch.testing.assert_close(outputs(again, ids), outputs(plain.eval(), ids))


def test_a_rope_that_was_stretched_before_is_stretched_on(tmp_path):
    first = method_of("longlora", context_length=512)
    first.finish(first.prepare(tiny_llama(), Start(Path("nowhere"))).model, Start(Path("nowhere"))).save_pretrained(
        tmp_path
    )
    model = load_plain(tmp_path, torch.float32)
    before = model.model.rotary_emb.inv_freq.clone()
    prepared = method_of("longlora", context_length=1024).prepare(model, Start(tmp_path))
    assert prepared.record["rope_factor"] == 8.0
    after = prepared.model.base_model.model.model.rotary_emb.inv_freq
    assert torch.allclose(before / after, torch.tensor(2.0))


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ({"model_type": "gpt2"}, "longlora cannot serve gpt2"),
        ({"model_type": "llama", "max_position_embeddings": 512}, "512 is not beyond the 512 positions"),
        (
            {"model_type": "llama", "max_position_embeddings": 128, "rope_parameters": {"rope_type": "llama3"}},
            "this model has a rope of type llama3",
        ),
        (
            {"model_type": "llama", "max_position_embeddings": 128, "rope_scaling": {"type": "dynamic"}},
            "this model has a rope of type dynamic",
        ),
        ({"model_type": "phi3", "max_position_embeddings": 128}, "phi3, whose rope takes no factor"),
    ],
)
def test_a_context_that_cannot_be_stretched_is_refused(config, complaint):
    assert complaint in method_of("longlora", context_length=512).unsupported(config)


@pytest.mark.parametrize(("given", "length", "group"), [(None, 40, 10), (None, None, 32), (6, 40, 6)])
def test_a_group_is_a_quarter_of_what_the_stage_trains_on(given, length, group):
    method = method_of("longlora", group_size=given)
    record = method.prepare(tiny_llama(), Start(Path("nowhere"), sequence_length=length)).record
    assert record["group_size"] == group


def test_longlora_is_refused_where_log_probabilities_are_compared():
    assert method_of("longlora").objectives == ("cpt", "ift")
