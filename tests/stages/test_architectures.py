"""One table of behaviours over every method and every architecture: it serves the model exactly, or says so first."""

import json
from pathlib import Path

import pytest
import torch
from architectures import NAMES, write_architecture
from methods_table import MERGEABLE, METHODS, label, method_of

from stages import merge, probe
from stages.artifact import MODEL
from stages.merge import hand_over
from stages.methods.base import Start
from stages.model import load_plain

pytestmark = pytest.mark.model


class NoTokenizer:
    """Architectures are tested without one: token ids are enough."""

    def save_pretrained(self, folder: Path) -> None:
        """Write nothing."""


@pytest.fixture(scope="module")
def starts(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("architectures")
    return {name: write_architecture(name, folder / name) for name in NAMES}


def random_rows():
    """What a stage trains on, for methods that look at it first."""
    generator = torch.Generator().manual_seed(5)
    for _ in range(4):
        ids = torch.randint(0, 300, (1, 24), generator=generator)
        yield ids, ids.clone()


def train(model) -> None:
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2, weight_decay=0.01)
    model.train()
    for _ in range(3):
        ids = torch.randint(0, 300, (2, 24), generator=generator)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("architecture", NAMES)
@pytest.mark.parametrize("method", MERGEABLE, ids=label)
def test_a_method_serves_an_architecture_exactly_or_says_that_it_cannot(
    method, architecture, starts, tmp_path, monkeypatch
):
    start = Start(starts[architecture], rows=random_rows)
    config = json.loads((start.model / "config.json").read_text())
    reason = method.unsupported(config)
    if reason is not None:
        assert method.kind in reason
        return
    monkeypatch.setattr(merge, "set_stop_tokens", lambda *_: None)
    plain = load_plain(start.model, torch.float32)
    ids = torch.randint(0, 300, (2, 16), generator=torch.Generator().manual_seed(7))
    before = probe.logits(plain, ids)
    model, trainable, _ = method.prepare(method.load(start.model, torch.float32, torch.float32), start)
    untrained = probe.logits(model, ids)
    if method.starts_exactly:
        assert float((untrained - before).abs().max()) <= 1e-5
    named = dict(model.named_parameters())
    assert {name for name, parameter in named.items() if parameter.requires_grad} == trainable
    frozen = {name: parameter.detach().clone() for name, parameter in named.items() if name not in trainable}
    train(model)
    assert all(torch.equal(parameter, frozen[name]) for name, parameter in model.named_parameters() if name in frozen)
    trained = probe.logits(model, ids)
    assert float((trained - untrained).abs().max()) > 1e-2  # or the comparison would prove nothing
    hand_over(method, model, NoTokenizer(), start, tmp_path)
    again = load_plain(tmp_path / MODEL, torch.float32)
    assert float((probe.logits(again, ids) - trained).abs().max()) <= method.merge_tolerance
    merged = json.loads((tmp_path / MODEL / "config.json").read_text())
    changed = {key for key in config.keys() | merged.keys() if config.get(key) != merged.get(key)}
    assert changed <= method.config_changes
    if config["tie_word_embeddings"]:
        assert again.get_output_embeddings().weight is again.get_input_embeddings().weight


@pytest.mark.parametrize("architecture", NAMES)
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_weights_held_in_bfloat16_are_merged_as_they_were_held(kind, architecture, starts, tmp_path, monkeypatch):
    """A factor that is no weight, such as Gemma's on its embeddings, must not be rounded with them."""
    monkeypatch.setattr(merge, "set_stop_tokens", lambda *_: None)
    start, method = Start(starts[architecture]), method_of(kind)
    model = method.prepare(method.load(start.model, torch.bfloat16, torch.bfloat16), start).model
    _, record = hand_over(method, model, NoTokenizer(), start, tmp_path)
    assert record["max_logit_error"] <= 1e-4


@pytest.mark.parametrize("architecture", ["llama", "mistral", "mixtral", "qwen2_moe", "qwen3"])
def test_longlora_stretches_every_architecture_that_it_serves(architecture, starts, tmp_path, monkeypatch):
    monkeypatch.setattr(merge, "set_stop_tokens", lambda *_: None)
    start, method = Start(starts[architecture]), method_of("longlora", context_length=256)
    assert method.unsupported(json.loads((start.model / "config.json").read_text())) is None
    model = method.prepare(method.load(start.model, torch.float32, torch.float32), start).model
    train(model)
    hand_over(method, model, NoTokenizer(), start, tmp_path)
    assert json.loads((tmp_path / MODEL / "config.json").read_text())["rope_parameters"]["factor"] == 2.0


def test_every_method_serves_at_least_a_llama(starts):
    config = json.loads((starts["llama"] / "config.json").read_text())
    assert [method.kind for method in METHODS if method.unsupported(config)] == []
