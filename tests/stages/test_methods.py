"""One table of behaviours over every method of the registry."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from methods_table import MERGEABLE, METHODS, label, method_of
from safetensors.torch import load_file

from stages.artifact import MODEL
from stages.errors import StageFailed
from stages.merge import hand_over
from stages.methods import qlora
from stages.methods.base import MethodSpec, Prepared, Start
from stages.methods.qlora import Qlora
from stages.model import load_plain, load_tokenizer
from stages.probe import probe_ids

pytestmark = pytest.mark.model

VARIANTS = [
    method_of("qlora", quantization="fp4"),
    method_of("qlora", double_quantization=False),
    method_of("lora", target_modules="attention", alpha=3.0),
    method_of("lora", target_modules="query-value"),
    method_of("lora", target_modules=("up_proj",)),
    method_of("longlora", context_length=1024),
    method_of("glora", bias_terms="vector"),
    method_of("pissa", svd_iterations=4),
]
EXAMPLES = [method_of("full"), method_of("lora"), method_of("qlora")]
"""Methods that stand for all where only the hand-over is tested."""

every_method = pytest.mark.parametrize("method", METHODS, ids=label)
mergeable = pytest.mark.parametrize("method", MERGEABLE, ids=label)
mergeable_and_variants = pytest.mark.parametrize("method", [*MERGEABLE, *VARIANTS], ids=label)
examples = pytest.mark.parametrize("method", EXAMPLES, ids=label)
untied_and_tied = pytest.mark.parametrize("start", ["untied", "tied"], indirect=True)


@pytest.fixture
def start(request, models) -> Path:
    return models[getattr(request, "param", "untied")]


def random_ids() -> torch.Tensor:
    return torch.randint(0, 320, (2, 16), generator=torch.Generator().manual_seed(7))


def logits(model, ids: torch.Tensor) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits.float()


def random_rows() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """What a stage trains on, for methods that look at it first."""
    generator = torch.Generator().manual_seed(5)
    for _ in range(4):
        ids = torch.randint(0, 300, (1, 24), generator=generator)
        yield ids, ids


def start_of(start: Path) -> Start:
    return Start(start, rows=random_rows)


def prepared(method: MethodSpec, start: Path, dtype=torch.float32) -> Prepared:
    torch.manual_seed(3)
    return method.prepare(method.load(start, dtype, dtype), start_of(start))


def train(model, steps: int = 3, *, autocast: bool = False) -> None:
    """A few optimizer steps on random tokens, large enough to move the logits far."""
    generator = torch.Generator().manual_seed(1)
    chosen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(chosen, lr=2e-2)
    model.train()
    for _ in range(steps):
        ids = torch.randint(0, 300, (4, 24), generator=generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def handed_over(method: MethodSpec, model, start: Path, folder: Path):
    return hand_over(method, model, load_tokenizer(start), start_of(start), folder)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@every_method
@untied_and_tied
def test_the_prepared_model_is_the_start(method, start):
    plain = load_plain(start, torch.float32)
    ids = random_ids()
    before = logits(plain, ids)
    found = logits(prepared(method, start).model, ids)[:, -ids.shape[1] :]
    difference = float((found - before).abs().max())
    assert difference <= (1e-5 if method.starts_exactly else 10)  # nan fails both


@every_method
@untied_and_tied
def test_exactly_the_planned_parameters_train_in_float32(method, start):
    model, trainable, _ = prepared(method, start)
    found = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable
    assert set(found) == trainable
    assert {parameter.dtype for parameter in found.values()} == {torch.float32}
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    train(model, 2)
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == trainable


@mergeable_and_variants
@untied_and_tied
def test_what_is_handed_over_is_what_was_trained(method, start, tmp_path):
    model, trainable, _ = prepared(method, start)
    ids = random_ids()
    untrained = logits(model, ids)
    train(model)
    trained = logits(model, ids)
    reloaded, record = handed_over(method, model, start, tmp_path)
    again = logits(load_plain(tmp_path / MODEL, torch.float32), ids)
    assert float((trained - untrained).abs().max()) > 0.05  # or the comparison would prove nothing
    assert float((again - trained).abs().max()) <= method.merge_tolerance
    assert torch.equal(logits(reloaded, ids), again)
    assert 0 <= record["rms_logit_error"] <= record["max_logit_error"] <= record["tolerance"]
    kept = load_file(tmp_path / "probe.safetensors")
    assert torch.allclose(kept["logits"].float(), logits(reloaded, kept["ids"])[:, -1], atol=1e-4)
    found, original = weights(tmp_path / MODEL), weights(start)
    check_plain(method, start, tmp_path / MODEL, reloaded)
    same = {name for name in original if torch.equal(found[name], original[name])}
    if any(name in original for name in trainable):
        assert same == set(original) - trainable
    else:  # adapters: beside linear layers only, never the head
        named = {name for name in original if "norm" in name or "embed" in name or "lm_head" in name}
        assert same >= named - {name for name in named if any(f"{name[:-7]}.modules_to_save" in t for t in trainable)}


def check_plain(method: MethodSpec, start: Path, folder: Path, reloaded) -> None:
    """A checkpoint of the start's architecture in float32; tied where the start is."""
    found, original = weights(folder), weights(start)
    shapes = {name: tensor.shape for name, tensor in found.items() if not name.endswith(method.new_weights)}
    assert shapes == {name: tensor.shape for name, tensor in original.items()}
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    merged, config = (json.loads((place / "config.json").read_text()) for place in (folder, start))
    assert {key for key in merged.keys() | config.keys() if merged.get(key) != config.get(key)} <= method.config_changes
    assert config["tie_word_embeddings"] == ("lm_head.weight" not in found)
    assert config["tie_word_embeddings"] == (reloaded.lm_head.weight is reloaded.get_input_embeddings().weight)
    assert (folder / "chat_template.jinja").read_text() == (start / "chat_template.jinja").read_text()


def perturbed(plain) -> None:
    with torch.no_grad():
        plain.model.layers[1].mlp.up_proj.weight[3, 5] += 1.0


def reconfigured(plain) -> None:
    plain.config.max_position_embeddings = 99


def bfloat16(plain) -> None:
    plain.to(torch.bfloat16)


def poisoned(plain) -> None:
    """A token that the probe does not hold: the logits look perfect."""
    unused = next(token for token in range(320) if token not in probe_ids(plain))
    with torch.no_grad():
        plain.get_input_embeddings().weight[unused, 0] = torch.nan


@examples
@pytest.mark.parametrize(
    ("harm", "complaint"),
    [
        (perturbed, "logits differ by"),
        (bfloat16, "logits differ by"),
        (reconfigured, "the config changed in max_position_embeddings"),
        (poisoned, "inf or nan in model.embed_tokens.weight"),
    ],
)
def test_a_wrong_merge_is_refused(method, harm, complaint, start, tmp_path, monkeypatch):
    finish = type(method).finish

    def wrong(self, model, start):
        plain = finish(self, model, start)
        harm(plain)
        return plain

    model, _, _ = prepared(method, start)
    train(model, 1)
    monkeypatch.setattr(type(method), "finish", wrong)
    with pytest.raises(StageFailed, match=complaint):
        handed_over(method, model, start, tmp_path)


@mergeable
def test_a_trained_value_that_is_not_finite_is_refused(method, start, tmp_path):
    model, trainable, _ = prepared(method, start)
    parameter = dict(model.named_parameters())[min(trainable)]
    with torch.no_grad():
        parameter.view(-1)[0] = torch.nan
    with pytest.raises(StageFailed):
        handed_over(method, model, start, tmp_path)


@pytest.mark.parametrize("method", [method for method in MERGEABLE if method.starts_exactly], ids=label)
def test_frozen_weights_in_bfloat16_train_in_float32_and_merge_exactly(method, start, tmp_path):
    model, trainable, _ = prepared(method, start, torch.bfloat16)
    found = dict(model.named_parameters())
    assert {found[name].dtype for name in trainable} == {torch.float32}
    assert {found[name].dtype for name in set(found) - trainable} <= {torch.bfloat16, torch.float32}
    train(model, autocast=True)
    # a small update must survive the merge: at bfloat16's step it would be rounded away
    _, record = handed_over(method, model, start, tmp_path)
    assert record["max_logit_error"] <= record["tolerance"]
    assert {tensor.dtype for tensor in weights(tmp_path / MODEL).values()} == {torch.float32}


@mergeable
def test_updates_below_the_step_of_bfloat16_survive(method, start, tmp_path):
    model, _, _ = prepared(method, start, torch.bfloat16)
    handed_over(method, model, start, tmp_path / "untouched")
    untouched = weights(tmp_path / "untouched" / MODEL)
    model, trainable, _ = prepared(method, start, torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in trainable:  # in both factors of an adapter: their product moves by 1e-5 or so
                parameter.add_(1e-4)
    handed_over(method, model, start, tmp_path / "moved")
    found = weights(tmp_path / "moved" / MODEL)
    moved = [key for key in found if not torch.equal(found[key], untouched[key])]
    assert moved
    for key in moved:
        change = (found[key] - untouched[key]).abs()
        assert float((change > 0).float().mean()) > 0.9, key


# bitsandbytes on CPUs with AVX512-BF16


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Path:
    """A model whose sides divide by the block size, as those of real models do."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("wide")
    torch.manual_seed(2)
    config = LlamaConfig(
        vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def gradients_around_an_evaluation(method: Qlora, start: Path) -> tuple[torch.Tensor, torch.Tensor]:
    model, trainable, _ = prepared(method, start)
    ids = random_ids()

    def gradients() -> torch.Tensor:
        model.train()
        model.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return torch.cat([p.grad.flatten() for name, p in model.named_parameters() if name in trainable])

    first = gradients().clone()
    logits(model, ids)  # as precomputing a reference or evaluating does
    return first, gradients()


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("quantization", ["nf4", "fp4"])
def test_an_evaluation_leaves_the_gradients_of_4_bit_models_alone(double, quantization, wide):
    method = Qlora(kind="qlora", rank=4, quantization=quantization, double_quantization=double)
    before, after = gradients_around_an_evaluation(method, wide)
    assert float(before.abs().max()) > 0
    assert torch.equal(before, after)


@pytest.mark.filterwarnings("ignore:bitsandbytes..gemv_4bit. an autograd kernel was not registered:UserWarning")
def test_without_the_fix_the_trap_is_real(wide, monkeypatch):
    from bitsandbytes.functional import has_avx512bf16

    method = Qlora(kind="qlora", rank=4)
    monkeypatch.setattr(qlora, "keep_weights_trainable", lambda _model: None)
    before, after = gradients_around_an_evaluation(method, wide)
    harm = float((after - before).abs().max() / before.abs().max())
    assert (harm > 0.05) == has_avx512bf16()
    monkeypatch.undo()
    before, after = gradients_around_an_evaluation(method, wide)
    assert torch.equal(before, after)
