"""Methods that cannot do what a spec asks of them: one clear error at its line, before anything trains."""

import json
import re
from pathlib import Path
from typing import Any

import architectures
import pytest
from headers import GGUF_HEADER, llama, write_headers
from methods_table import KINDS, METHODS, label, method_of
from tiny import SPEC, write_data

from specs.load import SpecError
from stages.artifact import publish
from stages.check import check_base, check_spec
from stages.errors import InvalidInput
from stages.layout import read_layout
from stages.methods.base import MethodSpec, Start
from stages.pipeline import load_pipeline
from stages.plan import make_plan
from stages.requirements import target_matrices

LORA = "{kind: lora, rank: 4}"
LINE = 18
"""Of the method of stage `answers` in the spec; column 14 is its opening brace."""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    write_headers(tmp_path / "base", llama(), num_attention_heads=4, num_key_value_heads=2, hidden_size=32)
    write_data(tmp_path)
    return tmp_path


def errors(folder: Path, method: str = LORA, *, replace: tuple[str, str] = ("", "")) -> list[str]:
    """What `validate` says of the spec with another method in its second stage, without the path."""
    assert LORA in SPEC
    assert replace[0] in SPEC
    spec = folder / "spec.yaml"
    spec.write_text(SPEC.replace(LORA, method).replace(*replace))
    try:
        check_spec(*load_pipeline(spec))
    except SpecError as error:
        return [line.removeprefix(f"{spec}:") for line in str(error).splitlines()]
    return []


def test_the_spec_itself_is_sound(project):
    assert errors(project) == []


def test_an_unknown_method_names_the_known_ones_nearest_first(project):
    [error] = errors(project, "{kind: dlora, rank: 4}")
    start, _, allowed = error.partition("allowed: ")
    assert start == f"{LINE}:20: stages[1].method.kind: unknown method 'dlora'; did you mean 'lora'? "
    names = allowed.split(", ")
    assert set(names[:3]) == {"lora", "dora", "adalora"}
    assert sorted(names) == sorted(KINDS)


@pytest.mark.parametrize("method", ["spectrum", "random_subset"])
@pytest.mark.parametrize("percent", ["0", "100.5", "-1", ".nan"])
def test_a_percent_lies_above_0_and_up_to_100(project, method, percent):
    field = "percent" if method == "random_subset" else "top_percent"
    [error] = errors(project, f"{{kind: {method}, {field}: {percent}}}")
    assert error.startswith(f"{LINE}:")
    assert f"stages[1].method.{field}: expected a " in error
    assert error.endswith(f"found {percent}")


TARGETS = {
    "unknown": (
        "[q_proj, k_prj]",
        ":60: stages[1].method.target_modules[1]: this model has no linear module 'k_prj'; it has, nearest first: "
        "k_proj, ",
    ),
    "a norm": ("[input_layernorm]", ":52: stages[1].method.target_modules[0]: this model has no linear module"),
    "the embedding": (
        "[embed_tokens]",
        ":52: stages[1].method.target_modules[0]: 'embed_tokens' is an embedding or the output head: where the two are "
        "tied, a merged adapter there gives another model than the trained one; remove it. Methods full, longlora, and "
        "spectrum with `embeddings: true`",
    ),
    "the head": ("[q_proj, lm_head]", ":60: stages[1].method.target_modules[1]: 'lm_head' is an embedding"),
}


@pytest.mark.parametrize("case", TARGETS)
def test_target_modules_that_cannot_have_an_adapter(project, case):
    targets, message = TARGETS[case]
    [error] = errors(project, f"{{kind: lora, rank: 4, target_modules: {targets}}}")
    assert error.startswith(f"{LINE}{message}")


@pytest.mark.parametrize("targets", ["[q_proj]", "[self_attn.q_proj]", "[mlp.up_proj, v_proj]", "attention"])
def test_targets_by_any_name_that_the_library_takes(project, targets):
    assert errors(project, f"{{kind: lora, rank: 4, target_modules: {targets}}}") == []


def test_every_wrong_target_of_every_stage_is_named_at_once(project):
    found = errors(
        project,
        "{kind: dora, rank: 4, target_modules: [a_proj, b_proj]}",
        replace=("{kind: qlora, rank: 4}", "{kind: qlora, rank: 4, target_modules: [wte]}"),
    )
    assert [error.split(": ")[1] for error in found] == [
        "stages[1].method.target_modules[0]",
        "stages[1].method.target_modules[1]",
        "stages[2].method.target_modules[0]",
    ]


def test_experts_get_no_adapter_and_routers_do_not_bound_the_rank(project):
    write_headers(project / "base", llama(experts=3), model_type="mixtral")
    assert errors(project) == []
    [error] = errors(project, "{kind: lora, rank: 4, target_modules: [w1]}")
    assert "'w1' are this model's experts, which are no linear modules in memory and get no adapter" in error


RANKED = [name for name, cls in KINDS.items() if cls.rank_is_bounded and "rank" in cls.model_fields]
BY_SIDE = [name for name in RANKED if "target_modules" in KINDS[name].model_fields and name != "qa_lora"]


@pytest.mark.parametrize("kind", BY_SIDE)
def test_a_rank_above_the_smaller_side_of_a_target(project, kind):
    last = ("{kind: qlora, rank: 4}", f"{{kind: {kind}, rank: 17}}")
    found = [error for error in errors(project, replace=last) if "rank" in error.split(": ")[1]]
    assert len(found) == 1
    assert found[0].startswith("24:")
    assert found[0].endswith(
        "stages[2].method.rank: 17 is larger than the smaller side of model.layers.0.self_attn.k_proj (16 x 32); the "
        "largest rank allowed here is 16, or leave that module out of target_modules"
    )
    narrow = (last[0], f"{{kind: {kind}, rank: 17, target_modules: [q_proj, up_proj]}}")
    assert [error for error in errors(project, replace=narrow) if "method.rank" in error] == []


def test_a_rank_above_the_groups_that_qa_loras_adapter_sees(project):
    assert errors(project, "{kind: qa_lora, rank: 4, group_size: 10}") == []
    [error] = errors(project, "{kind: qa_lora, rank: 5, group_size: 10}")
    assert error.startswith(f"{LINE}:")
    assert error.endswith(
        "stages[1].method.rank: 5 is larger than the number of input groups (group_size) of "
        "model.layers.0.self_attn.q_proj (32 x 32); the largest rank allowed here is 4, or leave that module out of "
        "target_modules"
    )


def test_groups_are_of_inputs_also_where_weights_are_transposed(project):
    write_headers(project / "base", {"h.0.mlp.c_fc.weight": (32, 128)}, model_type="gpt2", n_head=4, n_embd=32)
    assert not [error for error in errors(project, "{kind: qa_lora, rank: 4, group_size: 8}") if "method.rank" in error]
    found = errors(project, "{kind: qa_lora, rank: 5, group_size: 8}")
    assert "the largest rank allowed here is 4" in " ".join(found)


def test_more_layers_than_there_are(project):
    write_headers(project / "base", llama(), num_hidden_layers=1, num_attention_heads=4, hidden_size=32)
    [error] = errors(project, "{kind: top_layers, layers: 2}")
    assert error.startswith(f"{LINE}:")
    assert error.endswith("stages[1].method.layers: 2, and this model has 1; ask for fewer, or use method full")


def test_the_ranks_that_are_not_bounded(project):
    assert errors(project, "{kind: vera, rank: 256}") == []
    [error] = errors(project, "{kind: adalora, initial_rank: 20, target_rank: 8}")
    assert "stages[1].method.initial_rank: 20 is larger than the smaller side of" in error
    assert "the largest initial_rank allowed here is 16" in error


def test_a_base_that_is_quantised_already(project):
    write_headers(project / "base", llama(), quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    [error, *_] = errors(project, "{kind: qlora, rank: 4}")
    assert error.startswith("2:1: model: ")
    assert "quantised already" in error
    with pytest.raises(InvalidInput, match="quantised already"):
        make_plan(load_pipeline(project / "spec.yaml")[0], project, project / "runs")


def test_a_folder_that_holds_an_adapter_only(project):
    (project / "base/model.safetensors").rename(project / "base/adapter_model.safetensors")
    (project / "base/config.json").rename(project / "base/adapter_config.json")
    [error] = errors(project)
    assert error.startswith("2:1: model: ")
    assert "not a model: a checkpoint has config.json and *.safetensors. It holds an adapter only: merge it" in error


def test_a_damaged_header(project):
    (project / "base/model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0 no header at all")
    [error] = errors(project)
    assert error.startswith("2:9: model.path: ")
    assert "model.safetensors: its header cannot be read" in error


def test_a_method_that_does_not_serve_the_architecture(project):
    write_headers(project / "base", {"h.0.attn.c_attn.weight": (32, 96)}, model_type="gpt2", n_head=4, n_embd=32)
    [error] = errors(project, "{kind: glora, rank: 4}")
    assert error.startswith(f"{LINE}:14: stages[1].method.kind: method glora cannot adapt GPT-2's Conv1D layers; use ")


def test_a_method_that_does_not_suit_the_objective(project, monkeypatch):
    monkeypatch.setattr(KINDS["lora"], "objectives", ("cpt", "ift"))
    assert errors(project) == []
    [error] = errors(project, replace=("{kind: qlora, rank: 4}", LORA))
    assert error.endswith("stages[2].method.kind: method lora does not suit objective dpo; it suits cpt and ift")


# A GGUF file or a model on the hub shows its modules only once it is prepared; the chain then asks again.


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("{kind: lora, rank: 4, target_modules: [k_prj]}", "stage answers: target_modules: this model has no linear"),
        ("{kind: lora, rank: 17}", "stage answers: rank: 17 is larger than the smaller side of"),
        ("{kind: bitfit}", "stage answers: kind: method bitfit trains biases; mistral has none"),
    ],
)
def test_a_base_that_was_prepared_is_held_against_the_stages(project, method, message):
    write_headers(project / "base", llama(), model_type="mistral")
    (project / "base/chat_template.jinja").write_text("{{ messages }}")
    (project / "base.gguf").write_bytes(GGUF_HEADER)
    assert errors(project, method, replace=("path: base,", "gguf: base.gguf,")) == []
    pipeline, _ = load_pipeline(project / "spec.yaml")
    step = make_plan(pipeline, project, project / "runs").steps[0]
    (project / "work").mkdir()
    (project / "base").rename(project / "work/model")
    publish(project / "work", step.target, identity=step.identity, record={})
    with pytest.raises(InvalidInput) as refused:
        check_base(pipeline, step)
    assert str(refused.value).startswith(message)


def test_an_embedding_is_refused_before_the_base_is_there(project):
    (project / "base.gguf").write_bytes(GGUF_HEADER)
    base = ("path: base,", "gguf: base.gguf,")
    [error] = errors(project, "{kind: lora, rank: 4, target_modules: [lm_head]}", replace=base)
    assert "'lm_head' is an embedding or the output head" in error


# What validate says without torch is what happens with it, on every architecture.


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("architectures")
    return {name: architectures.write_architecture(name, folder / name) for name in architectures.NAMES}


@pytest.mark.model
def test_a_chain_does_not_learn_half_way_what_a_method_refuses(tmp_path, run_spec):
    """Whether a budget allows for a single layer is known once the model itself is there."""
    from tiny import write_project

    start, _, stages = SPEC.replace("{kind: qlora, rank: 4}", "{kind: top_layers, time_budget: 0.01}").partition(
        "metrics:"
    )
    stages = re.sub(r"    gates: .*\n", "", stages[stages.index("stages:") :])  # unmeasured: half of the time
    spec = write_project(tmp_path / "project", start + stages)
    check_spec(*load_pipeline(spec))
    with pytest.raises(InvalidInput, match=r"^stage manner: not even the last layer fits the budget"):
        run_spec(spec, until="knowledge")
    assert [path.name[:7] for path in spec.parent.glob("runs/tiny/0*")] == ["00-base"]


@pytest.mark.model
@pytest.mark.parametrize("wanted", ["all-linear", "attention", "query-value"])
@pytest.mark.parametrize("name", architectures.NAMES)
def test_the_targets_are_those_that_the_library_adapts(checkpoints, name, wanted):
    from stages.count import meta_model

    method = method_of("lora", target_modules=wanted)
    adapted = method.prepare(meta_model(checkpoints[name]), Start(checkpoints[name])).model
    live = {key.removeprefix("base_model.model.") for key, module in adapted.named_modules() if _has_adapter(module)}
    assert set(target_matrices(method, read_layout(checkpoints[name]))) == live


@pytest.mark.model
@pytest.mark.parametrize("method", METHODS, ids=label)
@pytest.mark.parametrize("name", architectures.NAMES)
def test_a_method_serves_an_architecture_or_says_so_at_validate(checkpoints, name, method: MethodSpec):
    from stages.count import count_method, meta_model

    if method.kind == "qa_lora":
        method = method_of("qa_lora", group_size=8)
    config = json.loads((checkpoints[name] / "config.json").read_text())
    reason = method.unsupported(config)
    if reason is not None:
        assert method.kind in reason
        return
    found, _ = count_method(method, meta_model(checkpoints[name]), Start(checkpoints[name]))
    assert found.trainable, found.reason


def _has_adapter(module: Any) -> bool:
    return hasattr(module, "base_layer")
