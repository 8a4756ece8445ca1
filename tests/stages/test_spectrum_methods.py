"""Spectrum and its controls on loaded models: what is selected, what trains, what comes out."""

import json
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers
from pydantic import ValidationError

from stages import plots
from stages.count import count_method, meta_model
from stages.errors import InvalidInput
from stages.layout import Matrix, matrices, read_layout
from stages.methods.base import Start
from stages.methods.random_subset import RandomSubset
from stages.methods.spectrum import Spectrum
from stages.methods.top_layers import TopLayers, costs
from stages.model import load_plain
from stages.scan import files, walk

pytestmark = pytest.mark.model

LAYERS = 4
COMMON = {
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 60,
    "pad_token_id": None,
}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
SETTINGS = {
    "Llama": COMMON | {"intermediate_size": 48},
    "Mixtral": COMMON | EXPERTS | {"intermediate_size": 48},
    "Qwen3Moe": COMMON | EXPERTS | {"intermediate_size": 48, "head_dim": 8, "tie_word_embeddings": True},
    "GptOss": COMMON | EXPERTS | {"intermediate_size": 24, "head_dim": 8},
    "Phi3": COMMON | {"intermediate_size": 48},
    "GPT2": {"n_embd": 32, "n_layer": LAYERS, "n_head": 4, "vocab_size": 60, "n_positions": 64},
    "GPTNeoX": COMMON | {"intermediate_size": 48, "hidden_act": "gelu"},
    "Falcon": COMMON | {"new_decoder_architecture": True, "num_kv_heads": 2},
}
CLASSES = {"GPT2": "GPT2LMHeadModel"}
METHODS = [
    Spectrum(kind="spectrum"),
    Spectrum(kind="spectrum", score="marchenko_pastur", embeddings=True),
    RandomSubset(kind="random_subset"),
    TopLayers(kind="top_layers", layers=1),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory):
    """A function from an architecture's name to a checkpoint of it."""

    @cache
    def write(name: str) -> Path:
        torch.manual_seed(0)
        folder = tmp_path_factory.mktemp(name)
        config = getattr(transformers, f"{name}Config")(**SETTINGS[name])
        model = getattr(transformers, CLASSES.get(name, f"{name}ForCausalLM"))(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:  # a direction that stands out, more in some rows than in others
                    rows, columns = parameter.shape[-2:]
                    strength = torch.rand(8).repeat_interleave(rows // 8 + 1)[:rows, None]
                    parameter.mul_(4).add_(0.4 * strength * torch.randn(columns))
        model.save_pretrained(folder)
        return folder

    return write


@pytest.fixture
def llama(folders) -> Path:
    return folders("Llama")


def logits(model, ids: torch.Tensor) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits.float()


def token_ids() -> torch.Tensor:
    return torch.randint(0, 60, (2, 16), generator=torch.Generator().manual_seed(7))


def train(model, *, autocast: bool = False) -> None:
    """With weight decay: what only has its gradient masked would move."""
    chosen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(chosen, lr=1e-2, weight_decay=0.1)
    model.train()
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            model(input_ids=token_ids(), labels=token_ids(), use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def changed_weights(before: dict[str, torch.Tensor], model) -> int:
    after = {name: value.detach() for name, value in model.named_parameters()}
    assert set(after) == set(before)
    return sum(int((after[name] != before[name].float()).sum()) for name in after)


# Every architecture


@pytest.mark.parametrize("name", SETTINGS)
def test_files_and_memory_hold_the_same_matrices(name, folders):
    layout = read_layout(folders(name))
    model = load_plain(folders(name), torch.float32)
    shapes = [(parameter, tuple(value.shape)) for parameter, value in model.named_parameters()]
    in_memory = matrices(shapes, model.config.to_dict())
    assert {one.key: one.size for one in layout.matrices} == {one.key: one.size for one in in_memory}
    assert len({one.key for one in in_memory}) == len(in_memory)
    inside = sum(
        value.numel()
        for parameter, value in model.named_parameters()
        if value.ndim > 1 and any(part.isdigit() for part in parameter.split(".")) and "bias" not in parameter
    )
    assert sum(one.size for one in in_memory) == inside  # every weight inside the layers, each once


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.kind)
@pytest.mark.parametrize("name", SETTINGS)
def test_exactly_the_selected_parts_train(name, method, folders):
    start = Start(folders(name))
    plain = load_plain(start.model, torch.float32)
    kind, classes = type(plain), [type(module) for module in plain.modules()]
    before = {parameter: value.detach().clone() for parameter, value in plain.named_parameters()}
    untouched = logits(plain, token_ids())
    model, trainable, _ = method.prepare(plain, start)
    assert torch.equal(logits(model, token_ids()), untouched)
    found = {parameter: value for parameter, value in model.named_parameters() if value.requires_grad}
    assert set(found) == trainable
    count = sum(value.numel() for value in found.values())
    assert count_method(method, meta_model(start.model), start)[0].trainable == count
    train(model)
    trained = logits(model, token_ids())
    finished = method.finish(model, start)
    assert type(finished) is kind
    assert [type(module) for module in finished.modules()] == classes
    moved = changed_weights(before, finished)
    assert 0.9 * count < moved <= count  # a token that the rows do not hold keeps its embedding
    assert torch.allclose(logits(finished, token_ids()), trained, atol=1e-5)


@pytest.mark.parametrize("name", ["Mixtral", "Phi3", "GPT2"])
def test_parts_train_in_float32_beside_bfloat16(name, folders):
    start = Start(folders(name))
    plain = load_plain(start.model, torch.bfloat16)
    before = {parameter: value.detach().clone() for parameter, value in plain.named_parameters()}
    method = Spectrum(kind="spectrum", embeddings=True)
    model, trainable, _ = method.prepare(plain, start)
    chosen = [value for parameter, value in model.named_parameters() if parameter in trainable]
    assert {value.dtype for value in chosen} == {torch.float32}
    train(model, autocast=True)
    finished = method.finish(model, start)
    assert {value.dtype for value in finished.parameters()} == {torch.float32}
    count = sum(value.numel() for value in chosen)
    assert 0.9 * count < changed_weights(before, finished) <= count


def test_the_parts_of_a_fused_projection_are_ranked_apart(folders):
    start = Start(folders("Phi3"))
    _, trainable, record = Spectrum(kind="spectrum").prepare(load_plain(start.model, torch.float32), start)
    kinds = {row["type"] for row in record["spectrum"]}
    assert {f"self_attn.qkv_proj.{part}" for part in "qkv"} | {"mlp.gate_up_proj.gate", "mlp.gate_up_proj.up"} < kinds
    assert {kind: sum(row["selected"] for row in record["spectrum"] if row["type"] == kind) for kind in kinds} == (
        dict.fromkeys(kinds, 1)
    )
    assert any("parametrizations.weight.original1" in name for name in trainable)


# Selection


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
def test_spectrum_selects_by_the_reference_rule(percent, per_type, llama):
    model = load_plain(llama, torch.float32)
    expected = reference_selection(model, percent)
    _, selected, record = Spectrum(kind="spectrum", top_percent=percent).prepare(model, Start(llama))
    assert selected == expected
    types = [name.split(".", 3)[3] for name in selected]
    assert len(set(types)) == 7
    assert all(types.count(kind) == per_type for kind in types)
    assert not [name for name in selected if "norm" in name or "embed" in name or "lm_head" in name]
    table = record["spectrum"]
    assert {f"{row['module']}.weight" for row in table if row["selected"]} == selected
    assert len(table) == 7 * LAYERS
    assert all({"snr", "snr_mp", "noise", "noise_mp", "values", "rank", "layer"} <= set(row) for row in table)
    json.dumps(record, allow_nan=False)


def test_the_scores_differ_and_the_field_decides(llama):
    records = {
        score: Spectrum(kind="spectrum", score=score).prepare(load_plain(llama, torch.float32), Start(llama)).record
        for score in ("reference", "marchenko_pastur")
    }
    for score, column in (("reference", "snr"), ("marchenko_pastur", "snr_mp")):
        table = records[score]["spectrum"]
        for kind in {row["type"] for row in table}:
            best = max((row for row in table if row["type"] == kind), key=lambda row: row[column])
            assert best["selected"]
            assert best["rank"] == 1
    selected = [{row["module"] for row in record["spectrum"] if row["selected"]} for record in records.values()]
    assert selected[0] != selected[1]


def test_a_tied_head_trains_on_request_only_and_once(folders):
    start = Start(folders("Qwen3Moe"))
    _, without, _ = Spectrum(kind="spectrum").prepare(load_plain(start.model, torch.float32), start)
    assert all(".layers." in name for name in without)
    model, selected, record = Spectrum(kind="spectrum", embeddings=True).prepare(
        load_plain(start.model, torch.float32), start
    )
    assert selected - without == {"model.embed_tokens.weight"}
    assert record["also"] == ["model.embed_tokens.weight"]
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_a_known_start_is_not_scanned_again(llama, tmp_path, monkeypatch):
    start = Start(llama, cache=tmp_path)
    first = Spectrum(kind="spectrum").prepare(load_plain(llama, torch.float32), start)
    monkeypatch.setattr(walk, "singular_values", lambda *_: pytest.fail("computed again"))
    again = Spectrum(kind="spectrum", score="reference").prepare(load_plain(llama, torch.float32), start)
    assert again.trainable == first.trainable


# Files in place of a scan


def prepared(folder: Path, here: Path, **fields):
    start = Start(folder, spec_folder=here)
    return Spectrum(kind="spectrum", **fields).prepare(load_plain(folder, torch.float32), start)


@pytest.mark.parametrize("name", ["Llama", "Mixtral", "Phi3"])
def test_our_files_select_what_the_scan_selects(name, folders, tmp_path):
    folder = folders(name)
    scored = walk.scan(read_layout(folder))
    ours, plain, ordered, unfrozen = files.write(scored, tmp_path, "m", 25, "reference")
    expected = prepared(folder, tmp_path).trainable
    for file in (ours, plain, ordered):
        assert prepared(folder, tmp_path, scores=file.name).trainable == expected
    assert prepared(folder, tmp_path, unfrozen=unfrozen.name).trainable == expected
    by_theory = prepared(folder, tmp_path, score="marchenko_pastur").trainable
    assert prepared(folder, tmp_path, scores=ours.name, score="marchenko_pastur").trainable == by_theory
    with pytest.raises(InvalidInput, match="holds no marchenko_pastur scores"):
        prepared(folder, tmp_path, scores=plain.name, score="marchenko_pastur")


def published(scores: dict[str, float]) -> str:
    return json.dumps({module: {"snr": snr, "type": "any"} for module, snr in scores.items()})


def test_a_published_file_ranks_what_it_scores_and_nothing_else(llama, tmp_path):
    scores = {f"model.layers.{layer}.mlp.up_proj": float(layer == 2) for layer in range(LAYERS)}
    scores |= {f"model.layers.{layer}.input_layernorm": 9.0 for layer in range(LAYERS)} | {"model.norm": 9.0}
    (tmp_path / "s.json").write_text(published(scores))
    assert prepared(llama, tmp_path, scores="s.json").trainable == {"model.layers.2.mlp.up_proj.weight"}


def test_a_published_score_of_a_fused_projection_stands_for_its_parts(folders, tmp_path):
    scores = {f"model.layers.{layer}.self_attn.qkv_proj": float(layer == 1) for layer in range(LAYERS)}
    (tmp_path / "s.json").write_text(published(scores))
    assert prepared(folders("Phi3"), tmp_path, scores="s.json").trainable == {
        "model.layers.1.self_attn.qkv_proj.weight"
    }


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ({f"model.layers.{n}.mlp.up_proj": 1.0 for n in range(9)}, "scores model.layers.4.mlp.up_proj, which this"),
        ({"model.layers.0.mlp.up_proj": 1.0}, "has no score for model.layers.1.mlp.up_proj"),
        ({"model.layers.0.input_layernorm": 1.0}, "scores none of this model's weight matrices"),
    ],
)  # fmt: skip
def test_a_file_of_another_model_is_refused(llama, tmp_path, scores, message):
    (tmp_path / "s.json").write_text(published(scores))
    with pytest.raises(InvalidInput, match=message):
        prepared(llama, tmp_path, scores="s.json")


def listed(folder: Path, here: Path, *patterns: str):
    (here / "u.yaml").write_text("unfrozen_parameters:\n" + "".join(f"- {pattern}\n" for pattern in patterns))
    return prepared(folder, here, unfrozen="u.yaml")


def test_a_published_list_decides_alone(llama, folders, tmp_path):
    ends = ("^lm_head.weight$", "^model.embed_tokens.weight$")
    found = listed(llama, tmp_path, *ends, "model.layers.1.mlp.gate_proj", r"model.layers.\d.mlp.up_proj")
    assert found.trainable == {
        "lm_head.weight", "model.embed_tokens.weight", "model.layers.1.mlp.gate_proj.weight",
        *(f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(LAYERS)),
    }  # fmt: skip
    tied = listed(folders("Qwen3Moe"), tmp_path, *ends, "model.layers.0.self_attn.q_proj")
    assert tied.trainable == {"model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"}


def test_a_list_may_spell_experts_as_older_models_did(folders, tmp_path):
    found = listed(folders("Mixtral"), tmp_path, "model.layers.1.block_sparse_moe.experts.2.w3")
    (name,) = found.trainable
    assert name == "model.layers.1.mlp.experts.parametrizations.gate_up_proj.original1"
    assert found.model.get_parameter(name).shape == (48, 32)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("up_proj", r"u.yaml: 'up_proj' matches no parameter of this model as a whole"),
        ("model.layers.0.mlp.up", "the nearest is model.layers.0.mlp.up_proj"),
        ("model.layers.*", "names every weight matrix of this model; use method full"),
    ],
)
def test_a_list_that_matches_nothing_or_everything_is_refused(llama, tmp_path, pattern, message):
    with pytest.raises(InvalidInput, match=message):
        listed(llama, tmp_path, pattern)


@pytest.mark.parametrize("field", [{"scores": "s.json"}, {"top_percent": 50.0}, {"embeddings": True}])
def test_a_list_leaves_nothing_else_to_say(field):
    with pytest.raises(ValidationError, match="no effect: remove it"):
        Spectrum(kind="spectrum", unfrozen="u.yaml", **field)
    assert Spectrum(kind="spectrum", unfrozen="u.yaml").files() == ("u.yaml",)
    assert Spectrum(kind="spectrum", scores="s.json").files() == ("s.json",)


def test_quantised_models_are_refused_without_loading():
    for method in METHODS:
        assert "quantised" in method.unsupported({"quantization_config": {"bits": 4}})
        assert method.unsupported({"num_hidden_layers": 4}) is None


# Controls


def test_a_random_subset_has_the_same_share_and_follows_the_seed(llama):
    def drawn(seed: int) -> frozenset[str]:
        return RandomSubset(kind="random_subset", percent=50).prepare(
            load_plain(llama, torch.float32), Start(llama, seed=seed)
        ).trainable  # fmt: skip

    assert drawn(1) == drawn(1)
    assert len({drawn(seed) for seed in range(4)}) == 4
    types = [name.split(".", 3)[3] for name in drawn(1)]
    assert [types.count(kind) for kind in sorted(set(types))] == [2] * 7


def top(llama: Path, **fields):
    return TopLayers(kind="top_layers", **fields).prepare(load_plain(llama, torch.float32), Start(llama))


def test_the_last_layers_train(llama):
    _, trainable, record = top(llama, layers=2)
    assert {int(name.split(".")[2]) for name in trainable} == {2, 3}
    assert len(trainable) == 14
    assert record["lowest_layer"] == 2


def test_a_budget_takes_as_many_layers_as_fit(llama):
    spent = [top(llama, layers=count).record["estimated_cost"] for count in range(1, LAYERS + 1)]
    assert [cost["time"] for cost in spent] == sorted(cost["time"] for cost in spent)
    for measure in ("time", "memory"):
        for count, cost in enumerate(spent, 1):
            found = top(llama, **{f"{measure}_budget": cost[measure] + 1e-6})
            assert found.record["lowest_layer"] == LAYERS - count
    with pytest.raises(InvalidInput, match="not even the last layer fits the budget: it takes"):
        top(llama, time_budget=0.2)


def test_the_cost_model_is_near_what_was_measured():
    """SmolLM2-135M, the last 7 of 30 layers: 0.49 of a step's time, 0.37 of the memory with activations."""
    own = [Matrix(f"h.{n}.w", f"h.{n}.w", "w", n, None, (576, 6145)) for n in range(30)]
    cost = costs(tuple(own), 23, outside=28_300_000, head=28_300_000)
    assert cost.time == pytest.approx(0.49, abs=0.05)
    assert cost.memory == pytest.approx(0.37, abs=0.05)
    assert costs(tuple(own), 0, outside=0, head=0) == (1.0, 1.0)


@pytest.mark.parametrize("fields", [{}, {"layers": 2, "time_budget": 0.5}, {"time_budget": 1.0}, {"layers": 0}])
def test_top_layers_wants_one_measure(fields):
    with pytest.raises(ValidationError):
        TopLayers(kind="top_layers", **fields)


def test_more_layers_than_there_are_is_refused(llama):
    [(field, message)] = TopLayers(kind="top_layers", layers=5).field_problems({"num_hidden_layers": 4})
    assert (field, message[:25]) == ("layers", "5, and this model has 4; ")
    with pytest.raises(InvalidInput, match="layers: 5, and this model has 4"):
        top(llama, layers=5)


def test_the_plot_takes_experts_and_plain_models(folders, tmp_path):
    for name in ("Llama", "Mixtral"):
        start = Start(folders(name))
        record = Spectrum(kind="spectrum").prepare(load_plain(start.model, torch.float32), start).record
        plots.draw_spectrum(record["spectrum"], tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").stat().st_size > 5000
