"""Trainable parameters on the meta device: the published counts, the planner's cache, and what training really uses."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from headers import GGUF_HEADER
from methods_table import METHODS, label, method_of
from tiny import SPEC, write_data

from flows.engine import Run
from specs.load import SpecError
from stages import count
from stages.check import check_counts
from stages.count import COUNTS, LATER, Count, count_method, count_stages, meta_model, stage_counts, stage_lines
from stages.methods.base import MethodSpec, Start
from stages.pipeline import load_pipeline

QUERY_VALUE = ("q_proj", "v_proj")


def _shapes() -> dict[str, Callable[[], Any]]:
    import transformers as hf

    gpt3 = {"n_embd": 12288, "n_layer": 96, "n_head": 96, "n_positions": 2048}
    return {
        # OPT is GPT-3's architecture with query and value apart; GPT-2 is the same with them fused.
        "gpt3-opt": lambda: hf.OPTConfig(
            hidden_size=12288, num_hidden_layers=96, num_attention_heads=96, ffn_dim=49152, word_embed_proj_dim=12288
        ),
        "gpt3-gpt2": lambda: hf.GPT2Config(**gpt3),
        "roberta-base": lambda: hf.RobertaConfig(vocab_size=50265, max_position_embeddings=514, is_decoder=True),
        "roberta-large": lambda: hf.RobertaConfig(
            vocab_size=50265, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096,
            max_position_embeddings=514, is_decoder=True,
        ),
        "llama-7b": hf.LlamaConfig,
        "gemma-8.5b": hf.GemmaConfig,
    }  # fmt: skip


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function that writes the config of a published model, and no weight."""
    root = tmp_path_factory.mktemp("configs")

    def write(name: str) -> Path:
        if not (root / name).exists():
            _shapes()[name]().save_pretrained(root / name)
        return root / name

    return write


def lora(rank: int, *names: str) -> MethodSpec:
    return method_of("lora", rank=rank, **({"target_modules": names} if names else {}))


PUBLISHED = [
    # Hu et al., arXiv 2106.09685, table 4: 4.7M and 37.7M; 96 layers x 2 matrices x 2 x 12288 x rank
    ("gpt3-opt", lora(1, *QUERY_VALUE), 4_718_592),
    ("gpt3-opt", lora(8, *QUERY_VALUE), 37_748_736),
    # the same table's adapters: 7.1M and 40.1M; 96 layers x 2 adapters x (2 d r + r + d)
    ("gpt3-gpt2", method_of("bottleneck", size=1), 7_078_080),
    ("gpt3-gpt2", method_of("bottleneck", size=8), 40_109_568),
    # table 2: 0.3M and 0.8M, without the classifier's head
    ("roberta-base", lora(8, "query", "value"), 294_912),
    ("roberta-large", lora(8, "query", "value"), 786_432),
    # Zhang et al., arXiv 2303.16199: 1.2M; 30 layers x (10 x 4096 + 1)
    ("llama-7b", method_of("llama_adapter", length=10, layers=30), 1_228_830),
    # 224 matrices of 7B; Dettmers et al., arXiv 2305.14314, use this rank on all linear layers
    ("llama-7b", lora(64), 159_907_840),
    ("gemma-8.5b", lora(8, *QUERY_VALUE), 3_211_264),
]


@pytest.mark.model
@pytest.mark.parametrize(("model", "method", "published"), PUBLISHED, ids=label)
def test_published_counts(folder_of, model, method, published):
    folder = folder_of(model)
    found, _ = count_method(method, meta_model(folder), Start(folder))
    assert found.trainable == published


@pytest.mark.model
def test_published_sizes_of_bases(folder_of):
    def size(name: str) -> int:
        return sum(parameter.numel() for parameter in meta_model(folder_of(name)).parameters())

    assert size("llama-7b") == 6_738_415_616
    assert size("gemma-8.5b") == 8_537_680_896
    # Published as 175,255.8M. No public config gives exactly that: its embeddings are not described.
    assert size("gpt3-opt") == pytest.approx(175_255_800_000, rel=0.005)


@pytest.mark.model
def test_gemma_at_rank_8_as_keras_counts_it(folder_of):
    """22.1M is Keras' convention: query and value are einsum layers there, and A is kept per head.

    A is (heads, hidden, rank) and B (rank, head width) for each; PEFT's A is shared by the heads: 3.21M.
    """
    model = meta_model(folder_of("gemma-8.5b"))
    rank, width = 8, model.config.head_dim
    shapes = [
        tuple(parameter.shape)
        for name, parameter in model.named_parameters()
        if name.endswith(("q_proj.weight", "v_proj.weight"))
    ]
    assert len(shapes) == 2 * 28
    assert sum(out // width * hidden * rank + rank * width for out, hidden in shapes) == 22_134_784


@pytest.mark.model
@pytest.mark.parametrize("method", METHODS, ids=label)
def test_what_the_plan_counts_is_what_trains(method, models):
    import torch

    row = torch.arange(16)[None]
    if method.kind == "qa_lora":
        method = method_of("qa_lora", group_size=8)
    for start in models.values():  # untied and tied
        stage = Start(start, rows=lambda: iter([(row, row)] * 4))
        model = method.load(start, torch.float32, torch.float32)
        prepared = method.prepare(model, stage).model
        trains = sum(parameter.numel() for parameter in prepared.parameters() if parameter.requires_grad)
        counted, _ = count_method(method, meta_model(start), Start(start))
        assert counted.trainable == trains > 0
        assert counted.parameters == sum(parameter.numel() for parameter in meta_model(start).parameters())


@pytest.mark.model
def test_tied_weights_are_counted_once(models):
    full = method_of("full")
    counts = {name: count_method(full, meta_model(start), Start(start))[0] for name, start in models.items()}
    assert counts["untied"].trainable - counts["tied"].trainable == 320 * 32
    assert str(counts["tied"]).endswith("(100.0 %)")


@pytest.mark.model
def test_later_stages_have_the_settings_that_a_method_changes(tmp_path, models):
    stages = [("bitfit", "{kind: bitfit}"), ("all", "{kind: full}"), ("again", "{kind: bitfit}")]
    write_data(tmp_path)
    pipeline, _ = load_pipeline(_write(tmp_path, models["untied"], stages))
    counts = count_stages(pipeline, tmp_path, models["untied"], ["bitfit", "all", "again"])
    biases = counts["bitfit"].trainable
    assert counts["all"].parameters == counts["bitfit"].parameters + biases
    assert counts["again"].trainable == biases
    only_last = count_stages(pipeline, tmp_path, models["untied"], ["all"])
    assert only_last == {"all": counts["all"]}


def _write(folder: Path, base: Path, stages: list[tuple[str, str]]) -> Path:
    spec = folder / "spec.yaml"
    text = SPEC.partition("stages:\n")[0].replace("path: base,", f"path: {base},") + "stages:\n"
    for name, method in stages:
        text += f"  - name: {name}\n    kind: cpt\n    method: {method}\n    data: [{{path: data/corpus.jsonl}}]\n"
        text += "    train: {learning_rate: 1e-3, max_steps: 2, sequence_length: 64, batch_size: 2}\n"
    spec.write_text(text)
    return spec


# The planner's side: no torch, one process for all that is missing, nothing counted twice.


@pytest.fixture
def project(tmp_path: Path) -> Run:
    """A spec over a base whose config is all there is to count from."""
    base = tmp_path / "base"
    base.mkdir()
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 8, "intermediate_size": 16,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 320,
    }  # fmt: skip
    (base / "config.json").write_text(json.dumps(config))
    entry = {"dtype": "F32", "shape": [8, 8], "data_offsets": [0, 256]}
    header = json.dumps({"model.layers.0.self_attn.q_proj.weight": entry}).encode()
    (base / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(256))
    write_data(tmp_path)
    return Run(_write(tmp_path, base, [("one", "{kind: lora, rank: 2}"), ("two", "{kind: full}")]), tmp_path / "runs")


@pytest.fixture
def child(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Stands for the counting process: what it was asked for, and counts that say how often it ran."""
    asked: list[list[str]] = []

    def run(arguments: list[str], *, input: str, **_: Any) -> subprocess.CompletedProcess[str]:
        request = json.loads(input)
        asked.append(request["stages"])
        found = {name: {"trainable": len(asked), "parameters": 100} for name in request["stages"]}
        return subprocess.CompletedProcess(arguments, 0, json.dumps(found), "")

    monkeypatch.setattr(count.subprocess, "run", run)
    return asked


def test_a_second_plan_starts_no_process(project, child):
    first = stage_counts(project.plan())
    assert child == [["one", "two"]]
    assert stage_counts(project.plan()) == first == {"one": Count(1, 100), "two": Count(1, 100)}
    assert len(child) == 1
    assert (project.root / COUNTS).is_file()


@pytest.mark.parametrize(
    ("old", "new", "asked"),
    [
        ("rank: 2", "rank: 3", [["one"]]),
        ("name: one", "name: first", []),  # a name is no part of a count
        ("learning_rate: 1e-3", "learning_rate: 2e-3", []),
        ("{kind: lora, rank: 2}", "{kind: bitfit}", [["one", "two"]]),  # it changes what comes after it
    ],
)
def test_only_what_changed_is_counted_again(project, child, old, new, asked):
    stage_counts(project.plan())
    project.spec.write_text(project.spec.read_text().replace(old, new))
    stage_counts(project.plan())
    assert child[1:] == asked


def test_another_config_is_another_count(project, child):
    stage_counts(project.plan())
    config = project.spec.parent / "base/config.json"
    config.write_text(config.read_text().replace('"vocab_size": 320', '"vocab_size": 640'))
    assert stage_counts(project.plan())["one"] == Count(2, 100)


def test_a_run_waits_for_no_count(project, child):
    assert stage_counts(project.plan(), compute=False) == {}
    assert child == []


@pytest.mark.parametrize("damage", ["{", "[]", '{"a": {"trainabel": 1}}'])
def test_a_damaged_cache_is_counted_anew(project, child, damage):
    stage_counts(project.plan())
    (project.root / COUNTS).write_text(damage)
    assert len(stage_counts(project.plan())) == 2
    assert len(child) == 2


def test_a_process_that_dies_is_no_answer_for_good(project, monkeypatch):
    dead = subprocess.CompletedProcess([], -9, "", "first\nKilled")
    monkeypatch.setattr(count.subprocess, "run", lambda *_, **__: dead)
    found = stage_counts(project.plan())
    assert str(found["one"]) == "trainable parameters: not counted (the counting process ended with -9: Killed)"
    assert not (project.root / COUNTS).exists()


def test_the_count_of_a_base_that_is_not_on_disk_yet_comes_later(project, child):
    (project.spec.parent / "base.gguf").write_bytes(GGUF_HEADER)
    text = project.spec.read_text()
    project.spec.write_text(text.replace(f"path: {project.spec.parent / 'base'},", "gguf: base.gguf,"))
    plan = project.plan()
    counts = stage_counts(plan)
    assert (counts, child) == ({}, [])
    assert stage_lines(plan, counts) == {"one": [LATER], "two": [LATER]}


def test_the_plan_says_what_the_method_says(project, child, monkeypatch):
    monkeypatch.setattr(MethodSpec, "notes", lambda _, config: [f"layers: {config['num_hidden_layers']}"])
    plan = project.plan()
    assert stage_lines(plan, stage_counts(plan))["two"] == [
        "trains 1 parameters; its start has 100 (1.0 %)",
        "layers: 1",
    ]


def test_what_the_model_itself_refuses_is_an_error_of_the_spec(project):
    _, document = load_pipeline(project.spec)
    counts = {"one": Count(1, 100), "two": Count(parameters=100, refused=True, reason="no")}
    with pytest.raises(SpecError, match=r"spec.yaml:\d+:\d+: stages\[1\].method.kind: no$"):
        check_counts(project.plan(), counts, document)


@pytest.mark.model
def test_the_command_counts_once_and_imports_no_torch(project):
    script = "import sys, flows.cli; print(flows.cli._run(sys.argv[1:]), 'torch' in sys.modules)"

    def plan() -> str:
        arguments = [sys.executable, "-c", script, "plan", str(project.spec), "--root", str(project.root)]
        done = subprocess.run(arguments, capture_output=True, text=True, check=True, timeout=120)
        assert done.stdout.splitlines()[-1] == "0 False", done.stderr
        return done.stdout

    text = plan()
    assert "  trains 272 parameters; its start has 5,784 (4.7 %)\n" in text
    assert "  trains 5,784 parameters; its start has 5,784 (100.0 %)\n" in text
    written = (project.root / COUNTS).stat().st_mtime_ns
    assert plan() == text
    assert (project.root / COUNTS).stat().st_mtime_ns == written
