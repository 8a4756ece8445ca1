"""Methods that no plain model can hold: on every architecture, and their hand-over."""

import json
from pathlib import Path

import pytest
import torch
from architectures import NAMES, write_architecture
from transformers import AutoModelForCausalLM

from stages import adapter, merge, probe
from stages.errors import InvalidInput, StageFailed
from stages.methods.base import Start
from stages.methods.bottleneck import Bottleneck
from stages.methods.llama_adapter import ARCHITECTURES, LlamaAdapter
from stages.methods.prefix_tuning import PrefixTuning
from stages.methods.prompt_tuning import PromptTuning
from stages.model import load_plain

pytestmark = pytest.mark.model
METHODS = (
    PrefixTuning(kind="prefix_tuning", virtual_tokens=5),
    PromptTuning(kind="prompt_tuning", virtual_tokens=5),
    PromptTuning(kind="prompt_tuning", virtual_tokens=3, initial="random"),
    Bottleneck(kind="bottleneck", size=4),
    Bottleneck(kind="bottleneck", size=4, placement="pfeiffer"),
    LlamaAdapter(kind="llama_adapter", length=4),
    LlamaAdapter(kind="llama_adapter", length=4, layers=2),
)
every_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.kind)


def ids_of(rows: int = 2) -> torch.Tensor:
    return torch.randint(3, 300, (rows, 12), generator=torch.Generator().manual_seed(7))


def train(model, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    ids = ids_of()
    model.train()
    for _ in range(steps):
        model(input_ids=ids, labels=ids, attention_mask=torch.ones_like(ids), use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


# Every method on every architecture


@pytest.mark.parametrize("architecture", NAMES)
def test_a_method_serves_an_architecture_exactly_or_says_that_it_cannot(architecture, tmp_path):
    folder = write_architecture(architecture, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    plain = load_plain(folder, torch.float32)
    ids = ids_of()
    start = probe.logits(plain, ids)
    for number, method in enumerate(METHODS):
        if (reason := method.unsupported(config)) is not None:
            assert method.kind == "llama_adapter"
            assert config["model_type"] in reason
            with pytest.raises(InvalidInput, match="llama_adapter serves"):
                method.prepare(load_plain(folder, torch.float32), Start(folder))
            continue
        model, trainable, _ = method.prepare(load_plain(folder, torch.float32), Start(folder))
        found = {name: p for name, p in model.named_parameters() if p.requires_grad}
        assert set(found) == trainable
        assert {p.dtype for p in found.values()} == {torch.float32}
        untrained = probe.logits(model, ids)
        assert untrained.shape == start.shape
        assert bool(torch.equal(untrained, start)) == method.starts_exactly
        train(model)
        trained = probe.logits(model, ids)
        assert float((trained - untrained).abs().max()) > 0.01
        with model.disable_adapter():
            assert torch.equal(probe.logits(model, ids), start)
        adapter.save_adapter(model, tmp_path / str(number))
        again = adapter.attach(load_plain(folder, torch.float32), tmp_path / str(number))
        assert torch.equal(probe.logits(again, ids), trained)
        assert not [name for name, p in again.named_parameters() if p.requires_grad]
        assert_generates_greedily(again, ids)


def assert_generates_greedily(model, ids: torch.Tensor) -> None:
    """With a cache, what a whole forward pass per token gives."""
    generated = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, min_new_tokens=3, do_sample=False
    )
    by_hand = ids
    for _ in range(3):
        scores = probe.logits(model, by_hand)[:, -1]
        scores[:, model.generation_config.eos_token_id] = -torch.inf
        by_hand = torch.cat([by_hand, scores.argmax(-1, keepdim=True)], 1)
    assert torch.equal(generated, by_hand)


def test_the_architectures_of_llama_adapter_are_those_of_peft():
    from peft.tuners.adaption_prompt.config import TRANSFORMERS_MODEL_CONFIG

    assert set(ARCHITECTURES) == set(TRANSFORMERS_MODEL_CONFIG)


def trained_parameters(method, config) -> int:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    prepared = method.prepare(model, Start(Path()))
    assert all(p.is_meta for p in prepared.model.parameters())
    return sum(p.numel() for name, p in prepared.model.named_parameters() if name in prepared.trainable)


@pytest.mark.parametrize(("size", "published"), [(1, 7.1e6), (8, 40.1e6)])
def test_gpt_3_has_the_published_number_of_bottleneck_parameters(size, published):
    from transformers import GPT2Config

    config = GPT2Config(vocab_size=50257, n_embd=12288, n_layer=96, n_head=96, n_positions=2048)
    found = trained_parameters(Bottleneck(kind="bottleneck", size=size), config)
    assert found == 192 * (2 * 12288 * size + size + 12288)
    assert abs(found - published) < 0.05e6


def test_llama_7b_has_the_published_number_of_llama_adapter_parameters():
    from transformers import LlamaConfig

    found = trained_parameters(LlamaAdapter(kind="llama_adapter", layers=30), LlamaConfig())
    assert found == 30 * (10 * 4096 + 1) == 1_228_830


@pytest.mark.parametrize("residual_inside", [True, False])
def test_a_bottleneck_that_finds_no_place_before_the_residual_is_refused(residual_inside):
    from transformers import BloomConfig, OPTConfig

    small = {"vocab_size": 64, "hidden_size": 16, "num_attention_heads": 2}
    config = (
        BloomConfig(**small, n_layer=2) if residual_inside else OPTConfig(**small, ffn_dim=16, word_embed_proj_dim=16)
    )
    complaint = "adds it inside self_attention" if residual_inside else "finds no mlp in the layers.*fc1"
    with pytest.raises(InvalidInput, match=complaint):
        trained_parameters(Bottleneck(kind="bottleneck"), config)


# What PEFT and TRL get wrong, and what is done about it


def test_trl_reaches_a_llama_adapter_behind_its_fused_head(base_model, monkeypatch):
    from trl.trainer.utils import add_fused_lm_head

    def scored():
        model, _, _ = METHODS[5].prepare(load_plain(base_model, torch.float32), Start(base_model))
        add_fused_lm_head(model.get_base_model(), outputs=("log_probs",))
        return model(input_ids=ids_of(), labels=ids_of(), fused_lm_head=True)

    assert scored().log_probs.shape[0] == 2
    monkeypatch.setattr(adapter, "_follow_forward", lambda _: None)
    with pytest.raises((AttributeError, TypeError)):
        _ = scored().log_probs


@every_method
def test_a_method_says_whether_packed_documents_stay_apart(method, base_model):
    model, _, _ = method.prepare(load_plain(base_model, torch.float32), Start(base_model))
    train(model)
    if isinstance(method, PromptTuning):
        with pytest.warns(UserWarning, match="Ignoring position ids"):
            leak = probe.packing_leak(model)
    else:
        leak = probe.packing_leak(model)
    assert (leak <= probe.TOLERANCE) is method.packs


@every_method
def test_a_method_says_whether_it_can_recompute_activations(method, base_model):
    model, _, _ = method.prepare(load_plain(base_model, torch.float32), Start(base_model))
    model.enable_input_require_grads()
    model.activation_checkpointing_enable()
    if method.recomputes:
        train(model, 1)
    else:
        with pytest.raises((RuntimeError, ValueError)):
            train(model, 1)


# The hand-over


@every_method
@pytest.mark.parametrize("harm", ["weights", "not finite"])
def test_an_adapter_that_is_not_what_was_trained_is_refused(method, harm, base_model, tmp_path, monkeypatch):
    model, trainable, _ = method.prepare(load_plain(base_model, torch.float32), Start(base_model))
    train(model)
    parameters = [p for name, p in model.named_parameters() if name in trainable]
    save = merge.save_adapter

    def wrong(model, folder):
        save(model, folder)
        with torch.no_grad():
            for parameter in parameters:
                parameter.add_(0.05)

    if harm == "weights":
        monkeypatch.setattr(merge, "save_adapter", wrong)
    else:
        parameters[0].data.view(-1)[0] = torch.nan
    complaint = "is not the trained model" if harm == "weights" else "inf or nan"
    with pytest.raises(StageFailed, match=complaint):
        merge.keep_adapter(method, model, Start(base_model), tmp_path)
