"""Files that take the place of Spectrum's scan: what does not fit is refused by `validate`, at the file's own field."""

import json
import subprocess
import sys
from pathlib import Path

import architectures
import pytest
from headers import GGUF_HEADER, llama, write_headers
from tiny import SPEC, write_data

from specs.load import SpecError
from stages import bounds
from stages.check import check_spec
from stages.layout import read_layout
from stages.methods.spectrum_files import listed_in, modules, stored_weights
from stages.pipeline import load_pipeline

METHOD = "{kind: spectrum, top_percent: 50}"
LAYER = "model.layers.0."
MATRICES = sorted(name.removesuffix(".weight") for name, shape in llama().items() if LAYER in name and len(shape) == 2)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    write_headers(tmp_path / "base", llama(), num_attention_heads=4, num_key_value_heads=2, hidden_size=32)
    write_data(tmp_path)
    return tmp_path


def errors(folder: Path, field: str, value: str = "file", base: str = "path: base,") -> list[str]:
    """What `validate` says of the spec, without path and column, once its method reads a file."""
    assert METHOD in SPEC
    spec = folder / "spec.yaml"
    spec.write_text(SPEC.replace(METHOD, f"{{kind: spectrum, {field}: {value}}}").replace("path: base,", base))
    try:
        check_spec(*load_pipeline(spec))
    except SpecError as error:
        line = 1 + next(n for n, text in enumerate(spec.read_text().splitlines()) if f"{field}: " in text)
        found = [text.removeprefix(f"{spec}:{line}:") for text in str(error).splitlines()]
        return [text.partition(": ")[2].replace(f"{folder}/", "") for text in found if text[:2].isdecimal()]
    return []


def scores(*names: str) -> str:
    return json.dumps({name: {"snr": 1.0, "type": "t"} for name in names})


SCORES = {
    "empty": (b"", "file: cannot be read as JSON: Expecting value"),
    "text": (b"some text", "file: cannot be read as JSON: Expecting value"),
    "binary": (b"\x89PNG\xff\x00", "file: cannot be read as JSON: 'utf-8' codec"),
    "a list": (b"[]", "file: not a JSON object"),
    "nothing": (b"{}", "file: no scores in it"),
    "nan": (b'{"model.layers.0.mlp.up_proj": {"snr": NaN, "type": "t"}}', "file: the score of model.layers.0.mlp.up_"),
    "text as a score": (
        b'{"mlp.up_proj": {"model.layers.0.mlp.up_proj": "high"}}',
        "file: the score of model.layers.0",
    ),
    "another model's": (
        scores("model.layers.7.mlp.up_proj").encode(),
        "file: scores model.layers.7.mlp.up_proj, which",
    ),
    "no matrix": (scores(f"{LAYER}input_layernorm").encode(), "file: scores none of this model's weight matrices"),
    "a list instead": (b"unfrozen_parameters:\n- a\n", "file: cannot be read as JSON"),
}


@pytest.mark.parametrize("case", SCORES)
def test_scores_that_do_not_fit_the_base(project, case):
    content, message = SCORES[case]
    (project / "file").write_bytes(content)
    [error] = errors(project, "scores")
    assert error.startswith(f"stages[0].method.scores: {message}")


UNFROZEN = {
    "empty": (b"", "file: has no list `unfrozen_parameters`"),
    "text": (b"some text", "file: has no list `unfrozen_parameters`"),
    "binary": (b"\x89PNG\xff\x00", "file: cannot be read as YAML: 'utf-8' codec"),
    "not yaml": (b"a: b: c", "file: cannot be read as YAML: mapping values are not allowed"),
    "a list": (b"- a\n", "file: has no list `unfrozen_parameters`"),
    "nothing": (b"unfrozen_parameters: []", "file: `unfrozen_parameters` is empty"),
    "a number": (b"unfrozen_parameters:\n- model.norm\n- 3\n", "file: entry 2 of `unfrozen_parameters` is 3, not text"),
    "no expression": (b"unfrozen_parameters: ['a(']", "file: 'a(' is not a regular expression: missing ), "),
    "no match": (
        b"unfrozen_parameters: [mlp.up_proj]",
        "file: 'mlp.up_proj' matches no parameter of this model as a w",
    ),
    "all": (b"unfrozen_parameters: [.*]", "file: names every weight matrix of this model; use method full"),
    "scores instead": (scores("a").encode(), "file: has no list `unfrozen_parameters`"),
}


@pytest.mark.parametrize("case", UNFROZEN)
def test_lists_that_do_not_fit_the_base(project, case):
    content, message = UNFROZEN[case]
    (project / "file").write_bytes(content)
    [error] = errors(project, "unfrozen")
    assert error.startswith(f"stages[0].method.unfrozen: {message}")


def test_a_pattern_that_would_be_tried_for_ever_is_refused(project, monkeypatch):
    monkeypatch.setattr(bounds, "SECONDS", 0.2)
    (project / "file").write_text("unfrozen_parameters: ['(.+)+!']\n")
    assert errors(project, "unfrozen") == [
        "stages[0].method.unfrozen: file: the pattern '(.+)+!' takes more than 0.2 s for one text; write the names "
        "out, or nest no repetitions"
    ]


@pytest.mark.parametrize("field", ["scores", "unfrozen"])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("gone", "gone: no such file"),
        ("base", "base: not a regular file, but a folder; name the file in it"),
        ("''", "names no file; remove it, or give the path of one"),
        ("a" * 300, f"{'a' * 60}: cannot be a file: File name too long"),
    ],
)
def test_a_file_that_is_none_is_named_at_its_field(project, field, value, message):
    assert errors(project, field, value) == [f"stages[0].method.{field}: {message}"]


def test_files_that_fit(project):
    (project / "file").write_text(scores(*MATRICES))
    assert errors(project, "scores") == []
    (project / "file").write_text(f"unfrozen_parameters:\n- ^lm_head.weight$\n- {LAYER}mlp.up_proj\n")
    assert errors(project, "unfrozen") == []


def test_without_a_base_only_the_file_itself_is_looked_at(project):
    (project / "base.gguf").write_bytes(GGUF_HEADER)
    (project / "file").write_text(scores("model.layers.7.mlp.up_proj"))
    assert errors(project, "scores", base="gguf: base.gguf,") == []
    (project / "file").write_text("{}")
    [error] = errors(project, "scores", base="gguf: base.gguf,")
    assert error.startswith("stages[0].method.scores: file: no scores in it")


def test_the_score_that_ranks_must_be_in_the_file(project):
    (project / "file").write_text(scores(*MATRICES))
    [error] = errors(project, "score: marchenko_pastur, scores")
    assert error.startswith("stages[0].method.scores: file: holds no marchenko_pastur scores; `trivium scan` writes")


def test_neither_torch_nor_numpy_is_needed(project):
    (project / "file").write_text(scores(*MATRICES))
    assert errors(project, "scores") == []
    script = (
        "import sys, pathlib; from stages.check import check_spec; from stages.pipeline import load_pipeline\n"
        f"check_spec(*load_pipeline(pathlib.Path({str(project / 'spec.yaml')!r})))\n"
        "print([name for name in ('torch', 'numpy', 'scipy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


# A list may spell names as the loaded model does, where the files spell them otherwise.


def test_names_of_a_backbone_that_is_stored_without_its_own(project):
    base = project / "bare"
    write_headers(base, {"h.0.attn.c_attn.weight": (32, 96), "h.0.mlp.c_fc.weight": (32, 128)}, model_type="gpt2")
    (project / "file").write_text("unfrozen_parameters: [transformer.h.0.mlp.c_fc]")
    chosen, also = listed_in(project / "file", stored_weights(read_layout(base)))
    assert (modules(chosen), also) == (["h.0.mlp.c_fc"], [])


@pytest.mark.parametrize(
    "name",
    ["mlp.experts.gate_up_proj", "mlp.experts.1.gate", "block_sparse_moe.experts.1.w1", "mlp.experts.1.gate_proj"],
)
def test_experts_by_the_names_in_memory_and_on_disk(project, name):
    write_headers(project / "base", llama(experts=3), model_type="mixtral")
    (project / "file").write_text(f"unfrozen_parameters: [{LAYER}{name}]")
    chosen, _ = listed_in(project / "file", stored_weights(read_layout(project / "base")))
    labels = {(matrix.type, matrix.expert) for matrix in chosen}
    every = {(f"experts.{kind}", number) for kind in ("gate", "up") for number in range(3)}
    assert labels == (every if name.endswith("gate_up_proj") else {("experts.gate", 1)})


@pytest.mark.model
@pytest.mark.parametrize("name", architectures.NAMES)
def test_whatever_names_a_weight_in_memory_means_the_same_by_the_headers(name, tmp_path):
    from stages.count import meta_model
    from stages.methods.parts import model_matrices

    folder = architectures.write_architecture(name, tmp_path / name)
    model = meta_model(folder)
    own, weights = model_matrices(model), stored_weights(read_layout(folder))
    key = {matrix.module: matrix.key for matrix in own}
    for matrix in own:
        (tmp_path / "file").write_text(f"unfrozen_parameters: ['{matrix.module}']")
        chosen, also = listed_in(tmp_path / "file", weights)
        assert ([one.key for one in chosen], also) == ([key[matrix.module]], [])
    for parameter, _ in model.named_parameters():
        (tmp_path / "file").write_text(f"unfrozen_parameters: ['{parameter}']")
        chosen, also = listed_in(tmp_path / "file", weights)
        assert {one.key for one in chosen} == {one.key for one in own if one.tensor == parameter}
        assert bool(chosen) != bool(also)
