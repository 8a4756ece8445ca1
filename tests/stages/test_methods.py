"""One table of behaviours over every method of the registry, and what is particular to some."""

import json
from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file

from stages.artifact import MODEL
from stages.errors import StageFailed
from stages.merge import hand_over
from stages.methods import Method, qlora
from stages.methods.base import MethodSpec, Prepared, Start
from stages.methods.qlora import Qlora
from stages.methods.spectrum import Spectrum
from stages.model import load_plain, load_tokenizer
from stages.probe import probe_ids

pytestmark = pytest.mark.model

KINDS = get_args(get_args(Method)[0])
SETTINGS = {"rank": 4, "top_percent": 50.0}
"""Values for the fields that a tiny model needs smaller or larger than the default."""
VARIANTS = [
    Qlora(kind="qlora", rank=4, quantization="fp4"),
    Qlora(kind="qlora", rank=4, double_quantization=False),
]
METHODS = [
    cls.model_validate(
        {"kind": get_args(cls.model_fields["kind"].annotation)[0]}
        | {name: value for name, value in SETTINGS.items() if name in cls.model_fields}
    )
    for cls in KINDS
]
EXACT = [method for method in METHODS if method.starts_exactly]


def label(value: object) -> str:
    if not isinstance(value, MethodSpec):
        return str(value)
    return "-".join([value.kind, *(str(getattr(value, name)) for name in sorted(value.model_fields_set - {"kind"}))])


every_method = pytest.mark.parametrize("method", METHODS, ids=label)
every_method_and_variant = pytest.mark.parametrize("method", [*METHODS, *VARIANTS], ids=label)
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


def prepared(method: MethodSpec, start: Path, dtype=torch.float32) -> Prepared:
    return method.prepare(method.load(start, dtype, dtype), Start(start))


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
    return hand_over(method, model, load_tokenizer(start), Start(start), folder)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@every_method_and_variant
@untied_and_tied
def test_the_prepared_model_is_the_start(method, start):
    plain = load_plain(start, torch.float32)
    ids = random_ids()
    difference = float((logits(prepared(method, start).model, ids) - logits(plain, ids)).abs().max())
    if method.starts_exactly:
        assert difference <= 1e-5
    else:
        assert 1e-3 < difference < 10  # nan fails both


@every_method_and_variant
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


@every_method_and_variant
@untied_and_tied
def test_what_is_handed_over_is_what_was_trained(method, start, tmp_path):
    model, _, _ = prepared(method, start)
    ids = random_ids()
    untrained = logits(model, ids)
    train(model)
    trained = logits(model, ids)
    reloaded, record = handed_over(method, model, start, tmp_path)
    again = logits(load_plain(tmp_path / MODEL, torch.float32), ids)
    assert float((trained - untrained).abs().max()) > 0.5  # or the comparison would prove nothing
    assert float((again - trained).abs().max()) <= method.merge_tolerance
    assert torch.equal(logits(reloaded, ids), again)
    assert 0 <= record["rms_logit_error"] <= record["max_logit_error"] <= 1e-4
    kept = load_file(tmp_path / "probe.safetensors")
    assert torch.allclose(kept["logits"].float(), logits(reloaded, kept["ids"])[:, -1], atol=1e-4)


@every_method_and_variant
@untied_and_tied
def test_the_checkpoint_is_a_plain_one_in_float32(method, start, tmp_path):
    model, _, _ = prepared(method, start)
    train(model, 2)
    handed_over(method, model, start, tmp_path)
    found, original = weights(tmp_path / MODEL), weights(start)
    assert {name: tensor.shape for name, tensor in found.items()} == {
        name: tensor.shape for name, tensor in original.items()
    }
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    configs = [json.loads((folder / "config.json").read_text()) for folder in (tmp_path / MODEL, start)]
    assert configs[0] == configs[1]
    tied = configs[0]["tie_word_embeddings"]
    assert tied == ("lm_head.weight" not in found)
    reloaded = load_plain(tmp_path / MODEL, torch.float32)
    assert tied == (reloaded.lm_head.weight is reloaded.get_input_embeddings().weight)
    assert (tmp_path / MODEL / "chat_template.jinja").read_text() == (start / "chat_template.jinja").read_text()


@every_method
def test_frozen_weights_come_out_as_they_went_in(method, start, tmp_path):
    model, trainable, _ = prepared(method, start)
    train(model, 2)
    handed_over(method, model, start, tmp_path)
    found, original = weights(tmp_path / MODEL), weights(start)
    kept = {name for name in original if torch.equal(found[name], original[name])}
    if any(name in original for name in trainable):
        assert kept == set(original) - trainable
    else:  # adapters: beside linear layers only, never the head
        assert kept >= {name for name in original if "norm" in name or "embed" in name or "lm_head" in name}
        assert not any("_proj" in name for name in kept)


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


@every_method
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


@every_method
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_trained_value_that_is_not_finite_is_refused(method, value, start, tmp_path):
    model, trainable, _ = prepared(method, start)
    parameter = dict(model.named_parameters())[min(trainable)]
    with torch.no_grad():
        parameter.view(-1)[0] = value
    with pytest.raises(StageFailed):
        handed_over(method, model, start, tmp_path)


@pytest.mark.parametrize("method", EXACT, ids=label)
@untied_and_tied
def test_frozen_weights_in_bfloat16_train_in_float32_and_merge_exactly(method, start, tmp_path):
    model, trainable, _ = prepared(method, start, torch.bfloat16)
    found = dict(model.named_parameters())
    assert {found[name].dtype for name in trainable} == {torch.float32}
    assert {found[name].dtype for name in set(found) - trainable} <= {torch.bfloat16}
    train(model, autocast=True)
    # a small update must survive the merge: at bfloat16's step it would be rounded away
    _, record = handed_over(method, model, start, tmp_path)
    assert record["max_logit_error"] <= 1e-4
    assert {tensor.dtype for tensor in weights(tmp_path / MODEL).values()} == {torch.float32}


@pytest.mark.parametrize("method", METHODS, ids=label)
def test_updates_below_the_step_of_bfloat16_survive(method, start, tmp_path):
    model, _, _ = prepared(method, start, torch.bfloat16)
    handed_over(method, model, start, tmp_path / "untouched")
    untouched = weights(tmp_path / "untouched" / MODEL)
    model, trainable, _ = prepared(method, start, torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in trainable:  # in A and B of an adapter alike: their product moves by 1e-5 or so
                parameter.add_(1e-4 if parameter.ndim == 2 else 0)
    handed_over(method, model, start, tmp_path / "moved")
    found = weights(tmp_path / "moved" / MODEL)
    moved = [key for key in found if not torch.equal(found[key], untouched[key])]
    assert moved
    for key in moved:
        change = (found[key] - untouched[key]).abs()
        assert float((change > 0).float().mean()) > 0.9, key


# Spectrum


def reference_selection(model, percent: float) -> set[str]:
    """The authors' rule (spectrum.py at 0ed1756), restated."""
    scores: dict[str, list] = {}
    for name, module in model.named_modules():
        if ".layers." in name and getattr(module, "weight", None) is not None and module.weight.ndim == 2:
            values = torch.linalg.svdvals(module.weight.detach().float())
            sigma = (torch.quantile(values, 0.75) - torch.quantile(values, 0.25)) / 1.349
            beta = min(module.weight.shape) / max(module.weight.shape)
            edge = sigma * torch.sqrt(torch.tensor((1 + beta**0.5) ** 2))
            noise = values[values <= edge].sum() if (values <= edge).any() else 1.0
            snr = float(values[values > edge].sum() / noise / values[0])
            scores.setdefault(name.split(".", 3)[3], []).append((snr, f"{name}.weight"))
    best = {
        kind: sorted(found, reverse=True)[: max(1, int(len(found) * percent / 100))] for kind, found in scores.items()
    }
    return {name for found in best.values() for _, name in found}


@pytest.mark.parametrize(("percent", "per_type"), [(1.0, 1), (25.0, 1), (50.0, 2), (74.0, 2), (75.0, 3), (100.0, 4)])
def test_spectrum_selects_by_the_reference_rule(percent, per_type, start):
    model = load_plain(start, torch.float32)
    with torch.no_grad():  # spectra that differ: a few directions stand out, more so in some layers
        for number, layer in enumerate(model.model.layers):
            for matrix in (parameter for parameter in layer.parameters() if parameter.ndim == 2):
                matrix.add_(
                    (1 + number * 7 % 4) * torch.outer(torch.randn(len(matrix)), torch.randn(matrix.shape[1])) / 32
                )
    expected = reference_selection(model, percent)
    _, selected, record = Spectrum(kind="spectrum", top_percent=percent).prepare(model, Start(start))
    assert selected == expected
    types = [name.split(".", 3)[3] for name in selected]
    assert {kind: types.count(kind) for kind in types} == dict.fromkeys(
        [f"self_attn.{name}_proj.weight" for name in "qkvo"]
        + [f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")],
        per_type,
    )
    assert not [name for name in selected if "norm" in name or "embed" in name or "lm_head" in name]
    table = record["spectrum"]
    assert {f"{row['module']}.weight" for row in table if row["selected"]} == selected
    assert len(table) == 28


def test_spectrum_never_trains_a_tied_head(models):
    _, selected, _ = Spectrum(kind="spectrum", top_percent=100.0).prepare(
        load_plain(models["tied"], torch.float32), Start(models["tied"])
    )
    assert len(selected) == 28
    assert all(".layers." in name for name in selected)


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
