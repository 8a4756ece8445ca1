"""Our own PEFT tuner: counts, forms, what PEFT does with it, and what it leans on inside PEFT."""

import json
from importlib.metadata import version
from pathlib import Path

import peft
import pytest
import torch
from architectures import write_architecture
from peft import PeftModel, PeftType
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from stages.errors import InvalidInput
from stages.methods.base import Start
from stages.methods.lora_xs import LoraXs
from stages.methods.multi_lora import MultiLora
from stages.methods.svf import Svf
from stages.methods.svft import Svft
from stages.methods.tied_lora import TiedLora
from stages.model import load_plain
from stages.tuner import UpdateConfig, factors, registration, updates
from stages.tuner.factors import entries, singular_factors, trained_entries

pytestmark = pytest.mark.model

VARIANTS = {
    "svf": (Svf(kind="svf"), 1152),
    "svft-plain": (Svft(kind="svft"), 1152),
    "svft-banded": (Svft(kind="svft", pattern="banded"), 5634),
    "svft-random": (Svft(kind="svft", pattern="random"), 5634),
    "svft-top_k": (Svft(kind="svft", pattern="top_k"), 5634),
    "lora_xs": (LoraXs(kind="lora_xs", rank=8), 1344),
    "tied_lora": (TiedLora(kind="tied_lora", rank=8), 9896),
    "tied_lora-qkv": (TiedLora(kind="tied_lora", rank=8, target_modules=("q_proj", "k_proj", "v_proj")), 3016),
    "multi_lora": (MultiLora(kind="multi_lora", adapters=3, rank=4), 41472),
}
every_variant = pytest.mark.parametrize("name", VARIANTS)
every_form = pytest.mark.parametrize("name", [name for name in VARIANTS if name != "tied_lora-qkv"])
CONFIG = {
    "vocab_size": 304, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False,
}  # fmt: skip
IDS = torch.randint(0, 304, (2, 16), generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """The tiny Llama that the counts were first measured on: 149,952 parameters."""
    folder = tmp_path_factory.mktemp("start")
    torch.manual_seed(2)
    LlamaForCausalLM(LlamaConfig(**CONFIG, initializer_range=0.1)).save_pretrained(folder)
    return folder


def prepared(name: str, folder: Path, dtype=torch.float32):
    return VARIANTS[name][0].prepare(load_plain(folder, dtype), Start(folder))


def logits(model) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def train(model, steps: int = 4):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    model.train()
    for _ in range(steps):
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def trained(name: str, folder: Path, dtype=torch.float32):
    return train(prepared(name, folder, dtype).model)


# What a method promises


@every_variant
def test_counts_also_on_the_meta_device(name, start):
    _, expected = VARIANTS[name]
    real = prepared(name, start)
    with torch.device("meta"):
        empty = LlamaForCausalLM(LlamaConfig(**CONFIG))
    counted = VARIANTS[name][0].prepare(empty, Start(start))
    for found in (real, counted):
        named = dict(found.model.named_parameters())
        assert {one for one, parameter in named.items() if parameter.requires_grad} == found.trainable
        assert sum(named[one].numel() for one in found.trainable) == expected
    assert counted.trainable == real.trainable
    assert all(parameter.is_meta for parameter in counted.model.parameters())


@every_variant
def test_start_training_adapter_off_and_merge(name, start):
    plain = logits(load_plain(start, torch.float32))
    model = prepared(name, start).model
    assert torch.equal(logits(model), plain)
    live = logits(train(model))
    assert float((live - plain).abs().max()) > 0.1  # or the rest would prove nothing
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    merged = VARIANTS[name][0].finish(model, Start(start))
    assert type(merged) is LlamaForCausalLM
    assert float((logits(merged) - live).abs().max()) < 1e-5


@every_form
def test_float64_computes_in_float64_throughout(name, start):
    model = trained(name, start).to(torch.float64)
    wanted = logits(model)
    assert wanted.dtype == torch.float64
    assert {value.dtype for key, value in model.state_dict().items() if not key.endswith("positions")} == {
        torch.float64
    }
    merged = VARIANTS[name][0].finish(model, Start(start))
    assert float((logits(merged.double()) - wanted).abs().max()) < 1e-5


@every_form
def test_a_bfloat16_base_trains_in_float32(name, start):
    model = trained(name, start, torch.bfloat16)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert logits(model).dtype == torch.bfloat16


def test_conv1d_holds_its_weight_transposed(tmp_path):
    folder = write_architecture("gpt2", tmp_path)
    for name in ("svf", "svft-top_k", "tied_lora"):
        model = trained(name, folder)
        live = logits(model)
        assert float((logits(VARIANTS[name][0].finish(model, Start(folder))) - live).abs().max()) < 1e-4


# Adapters on disk


@every_variant
def test_an_adapter_reloads_on_its_base_without_a_decomposition(name, start, tmp_path, monkeypatch):
    model = trained(name, start)
    live = logits(model)
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(updates, "singular_factors", None)
    for settings in ({}, {"low_cpu_mem_usage": True}, {"is_trainable": True}):
        again = PeftModel.from_pretrained(load_plain(start, torch.float32), tmp_path, **settings)
        assert torch.equal(logits(again), live), settings


@pytest.mark.parametrize("name", ["svf", "svft-banded", "lora_xs"])
def test_an_adapter_without_factors_decomposes_to_the_same_bits(name, start, tmp_path):
    model = trained(name, start)
    model.peft_config["default"].save_factors = False
    model.save_pretrained(tmp_path)
    assert all(
        key.endswith((".change", ".entries", ".middle")) for key in load_file(tmp_path / "adapter_model.safetensors")
    )
    again = PeftModel.from_pretrained(load_plain(start, torch.float32), tmp_path)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tied_layers_stay_tied(dtype, start, tmp_path):
    model = trained("tied_lora", start, dtype)
    wanted = logits(model)

    def check(found):
        layers = [layer.self_attn.q_proj.update_of("default") for layer in found.get_base_model().model.layers]
        assert len(layers) == 3
        assert len({id(update.down) for update in layers}) == len({id(update.up) for update in layers}) == 1
        assert len({id(update.inner) for update in layers}) == len({id(update.outer) for update in layers}) == 3
        assert {update.up.dtype for update in layers} <= {torch.float32, torch.float64}

    model.save_pretrained(tmp_path)
    kept = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(value.numel() for value in kept.values()) == 9896
    for settings in ({}, {"low_cpu_mem_usage": True}, {"is_trainable": True}):
        again = PeftModel.from_pretrained(load_plain(start, dtype), tmp_path, **settings)
        assert torch.equal(logits(again), wanted)
        check(again)
    check(model.to(torch.float64))


@pytest.mark.parametrize("name", ["svf", "svft-random", "tied_lora", "multi_lora"])
def test_a_resumed_trainer_ends_with_the_same_bits(name, start, tmp_path):
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(0, 304, (8, 12)).tolist()]
    method = VARIANTS[name][0]

    def run(folder: Path, resume: Path | None = None) -> dict[str, torch.Tensor]:
        torch.manual_seed(5)
        found = prepared(name, start)
        arguments = TrainingArguments(
            output_dir=str(folder), max_steps=4, save_steps=2, per_device_train_batch_size=2, learning_rate=1e-2,
            report_to="none", use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = Trainer(model=found.model, args=arguments, train_dataset=rows)
        method.attach(trainer)
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        named = dict(found.model.named_parameters())
        return {one: named[one].detach().clone() for one in found.trainable}

    whole = run(tmp_path / "whole")
    kept = load_file(tmp_path / "whole/checkpoint-2/adapter_model.safetensors")
    assert sum(value.numel() for value in kept.values()) == VARIANTS[name][1]  # no singular vectors, nothing twice
    resumed = run(tmp_path / "resumed", tmp_path / "whole/checkpoint-2")
    assert all(torch.equal(resumed[one], whole[one]) for one in whole)
    assert any(float(value.abs().max()) > 0 for value in whole.values())


# The rest of what PEFT does with a tuner


def test_several_adapters_live_beside_one_another(start, tmp_path):
    model = trained("svft-banded", start)
    first = logits(model)
    plain = logits(load_plain(start, torch.float32))
    other = UpdateConfig(form="svf", target_modules=["down_proj", "o_proj"], task_type="CAUSAL_LM")
    model.add_adapter("other", other)
    assert torch.equal(logits(model), first)
    assert not any(parameter.requires_grad for name, parameter in model.named_parameters() if ".other." in name)
    model.set_adapter("other")
    assert torch.equal(logits(model), plain)
    second = logits(train(model))
    assert not torch.equal(second, plain)
    model.save_pretrained(tmp_path, selected_adapters=["other"])
    assert all("_proj.trivium_update." in key for key in load_file(tmp_path / "other/adapter_model.safetensors"))
    with pytest.raises(InvalidInput, match="cannot share a batch"):
        model(input_ids=IDS, adapter_names=["default", "other"])
    model.set_adapter("default")
    model.delete_adapter("other")
    assert torch.equal(logits(model), first)
    alone = PeftModel.from_pretrained(load_plain(start, torch.float32), tmp_path / "other")
    assert torch.equal(logits(alone), second)


@every_form
def test_merging_is_undone_and_refuses_what_is_not_finite(name, start):
    model = trained(name, start)
    live, plain = logits(model), logits(load_plain(start, torch.float32))
    model.merge_adapter()
    assert float((logits(model) - live).abs().max()) < 1e-5
    model.unmerge_adapter()
    assert float((logits(model) - live).abs().max()) < 1e-5
    with model.disable_adapter():
        assert float((logits(model) - plain).abs().max()) < 1e-4
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).view(-1)[0] = torch.nan
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_and_unload(safe_merge=True)


def test_peft_converts_an_update_to_lora(start):
    model = trained("lora_xs", start)
    _, weights = peft.convert_to_lora(model, rank=8)
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    key = next(name.removesuffix("lora_A.weight") for name in weights if "layers.0.mlp.up_proj.lora_A" in name)
    product = weights[f"{key}lora_B.weight"] @ weights[f"{key}lora_A.weight"]
    assert torch.allclose(product, layer.get_delta_weight("default"), atol=1e-5)


@pytest.mark.parametrize(
    ("targets", "complaint"),
    [
        (("embed_tokens",), "embedding"),
        (("lm_head",), "embedding"),
        (("mlp",), "target_modules: model.layers.0.mlp is a LlamaMLP; only linear layers"),
        (("input_layernorm",), "only linear layers"),
        (("q_porj",), "q_porj, which this model does not have"),
    ],
)
def test_what_cannot_be_adapted_is_refused(targets, complaint, start):
    with pytest.raises(InvalidInput, match=complaint):
        Svf(kind="svf", target_modules=targets).prepare(load_plain(start, torch.float32), Start(start))


def test_settings_that_mean_nothing_are_refused(start):
    with pytest.raises(ValidationError, match="width has no meaning"):
        Svft(kind="svft", pattern="plain", width=3)
    with pytest.raises(InvalidInput, match="rank 33 is larger"):
        LoraXs(kind="lora_xs", rank=33).prepare(load_plain(start, torch.float32), Start(start))


# Forms, by hand


@pytest.mark.parametrize("shape", [(7, 7), (9, 5), (5, 9)], ids=str)
@pytest.mark.parametrize(
    "config",
    [
        {"form": "svf"},
        *({"form": "svft", "pattern": pattern} for pattern in ("plain", "banded", "random", "top_k")),
        {"form": "lora_xs", "rank": 3},
        {"form": "tied_lora", "rank": 3},
        {"form": "multi_lora", "rank": 2, "adapters": 3},
    ],
    ids=lambda config: "-".join(str(value) for value in config.values()),
)
def test_an_update_is_its_formula(config, shape):
    weight = torch.randn(shape)
    update = updates.build(UpdateConfig(**config), weight, "layer").double()
    assert not bool(update.delta().any())
    with torch.no_grad():
        for parameter in update.parameters():
            parameter.normal_()
    got = dict(update.named_parameters()) | dict(update.named_buffers())
    side = min(shape)
    if config["form"] == "svf":
        expected = got["left"] @ torch.diag(got["values"] * got["change"]) @ got["right"]
        again = got["left"] @ torch.diag(got["values"] * (1 + got["change"])) @ got["right"]
        assert torch.allclose(weight + expected, again, atol=1e-5)
    elif config["form"] == "svft":
        middle = torch.zeros(side, side, dtype=torch.float64)
        positions = got.get("positions", torch.arange(side) * (side + 1))
        middle.view(-1)[positions] = got["entries"]
        assert int(middle.count_nonzero()) == len(got["entries"])
        expected = got["left"] @ middle @ got["right"]
    elif config["form"] == "lora_xs":
        expected = got["left"] @ torch.diag(got["values"]) @ got["middle"] @ got["right"]
    elif config["form"] == "tied_lora":
        expected = torch.diag(got["outer"]) @ got["up"] @ torch.diag(got["inner"]) @ got["down"]
    else:
        pairs = zip(got["scales"], got["up"], got["down"], strict=True)
        expected = torch.stack([torch.diag(scale) @ up @ down for scale, up, down in pairs]).sum(0)
    assert torch.allclose(update.delta(), expected)
    inputs = torch.randn(4, shape[1], dtype=torch.float64)
    assert torch.allclose(update(inputs), inputs @ expected.T)


@pytest.mark.parametrize("shape", [(12, 12), (20, 8), (8, 20)], ids=str)
def test_singular_vectors_have_fixed_signs(shape, monkeypatch):
    weight = torch.randn(shape)
    found = singular_factors(weight)
    assert torch.allclose(found.left * found.values @ found.right, weight, atol=1e-5)
    assert {factor.dtype for factor in found} == {torch.float32}
    peaks = found.left.gather(0, found.left.abs().argmax(0, keepdim=True))
    assert bool((peaks > 0).all())
    monkeypatch.setattr(factors, "EXACT_SIDE", 0)  # another algorithm's signs, same vectors
    other = singular_factors(weight)
    assert all(torch.allclose(one, two, atol=1e-4) for one, two in zip(found, other, strict=True))
    few = singular_factors(weight, 3)
    assert torch.equal(few.left, other.left[:, :3])
    assert torch.equal(few.right, other.right[:3])


def test_random_entries_are_drawn_without_replacement_by_seed_and_layer():
    found = singular_factors(torch.randn(30, 20))

    def draw(seed: int, name: str) -> torch.Tensor:
        return trained_entries("random", 2, found, seed, name)

    drawn = draw(1, "a")
    assert len(drawn) == len(set(drawn.tolist()) & set(range(400))) == entries(20, 2) == 94
    assert torch.equal(drawn, draw(1, "a"))
    assert not any(torch.equal(drawn, draw(*other)) for other in ((2, "a"), (1, "b")))


def test_banded_entries_lie_beside_the_diagonal():
    found = trained_entries("banded", 2, singular_factors(torch.randn(6, 6)), 0, "a")
    assert {(one // 6, one % 6) for one in found.tolist()} == {
        (row, column) for row in range(6) for column in range(6) if abs(row - column) <= 2
    }
    assert entries(3, 10) == 9


@pytest.mark.parametrize("shape", [(16, 16), (24, 10), (10, 24)], ids=str)
def test_top_entries_go_by_the_magnitude_of_the_overlap(shape):
    found = singular_factors(torch.randn(shape))
    side = min(shape)
    signed = (found.left[:side].T @ found.right[:, :side].T).flatten()
    overlap = signed.abs()
    taken = trained_entries("top_k", 1, found, 0, "a")
    left_out = torch.ones(side * side, dtype=torch.bool).index_fill(0, taken, False)
    assert len(set(taken.tolist())) == 3 * side - 2
    assert float(overlap[taken].min()) >= float(overlap[left_out].max())
    assert bool((signed[taken] < 0).any())


# What we lean on inside PEFT


def test_the_kind_of_adapter_is_known_to_peft_once(start, tmp_path):
    """`enum` and PEFT keep their tables private: a new version of either must be looked at."""
    assert version("peft") == "0.21.2"
    for table in ("_member_map_", "_value2member_map_", "_member_names_"):
        assert registration.NAME in getattr(PeftType, table)
    kind = registration.peft_type()
    registration.register(UpdateConfig, object)
    assert peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING[kind] is not object
    assert list(PeftType).count(kind) == 1
    assert kind is PeftType("TRIVIUM") is PeftType.TRIVIUM
    assert isinstance(kind, PeftType)
    prepared("svf", start).model.save_pretrained(tmp_path)
    document = json.loads((tmp_path / "adapter_config.json").read_text())
    assert document["peft_type"] == "TRIVIUM"
    assert document["factors_from_file"] is True
