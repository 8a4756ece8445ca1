"""Which weights a checkpoint holds, from config and headers alone; no torch, no numpy."""

import json
import subprocess
import sys
from math import prod
from pathlib import Path

import pytest

from stages.errors import InvalidInput
from stages.layout import INDEX, Part, identify, matrices, read_layout, spellings, split

SIZES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}


def write_file(file: Path, shapes: dict[str, tuple[int, ...]], dtype: str = "BF16") -> None:
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        size = prod(shape) * SIZES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(offset))


def write_header(folder: Path, header: bytes) -> None:
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)


def write_folder(folder: Path, shapes: dict[str, tuple[int, ...]], **config: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    write_file(folder / "model.safetensors", shapes)
    return folder


LLAMA = {
    "lm_head.weight": (40, 16),
    "model.embed_tokens.weight": (40, 16),
    "model.layers.0.input_layernorm.weight": (16,),
    "model.layers.0.mlp.down_proj.weight": (16, 24),
    "model.layers.0.self_attn.q_proj.weight": (16, 16),
    "model.layers.10.self_attn.q_proj.weight": (16, 16),
    "model.layers.2.self_attn.q_proj.weight": (16, 16),
    "model.norm.weight": (16,),
}


def test_a_plain_checkpoint(tmp_path):
    layout = read_layout(write_folder(tmp_path, LLAMA, model_type="llama", tie_word_embeddings=False))
    assert layout.model_type == "llama"
    assert [(one.module, one.type, one.layer) for one in layout.matrices] == [
        ("model.layers.0.mlp.down_proj", "mlp.down_proj", 0),
        ("model.layers.0.self_attn.q_proj", "self_attn.q_proj", 0),
        ("model.layers.2.self_attn.q_proj", "self_attn.q_proj", 2),
        ("model.layers.10.self_attn.q_proj", "self_attn.q_proj", 10),
    ]
    assert layout.linear_modules == {"q_proj", "down_proj"}
    assert (layout.embedding, layout.head) == ("model.embed_tokens.weight", "lm_head.weight")
    traits = (layout.is_tied, layout.is_moe, layout.is_conv1d, layout.is_quantised, layout.has_biases)
    assert not any(traits)
    tensor = layout.tensor["model.layers.0.mlp.down_proj.weight"]
    assert (tensor.dtype, tensor.shape, tensor.stop - tensor.start) == ("BF16", (16, 24), 2 * 16 * 24)
    assert tensor.file == tmp_path / "model.safetensors"
    assert all(one.whole for one in layout.matrices)


def test_a_tied_head_is_not_listed_twice_even_where_it_is_stored_twice(tmp_path):
    assert read_layout(write_folder(tmp_path / "a", LLAMA, tie_word_embeddings=True)).head is None
    once = {name: shape for name, shape in LLAMA.items() if name != "lm_head.weight"}
    layout = read_layout(write_folder(tmp_path / "b", once))
    assert layout.is_tied
    assert layout.head is None
    assert layout.embedding == "model.embed_tokens.weight"


def test_position_embeddings_are_no_input_embedding(tmp_path):
    shapes = {"transformer.wpe.weight": (99, 16), "transformer.wte.weight": (40, 16)}
    assert read_layout(write_folder(tmp_path, shapes, model_type="gpt2")).embedding == "transformer.wte.weight"


def test_shards_by_their_index(tmp_path):
    write_folder(tmp_path, {}, model_type="llama")
    (tmp_path / "model.safetensors").unlink()
    write_file(tmp_path / "a.safetensors", {"model.layers.0.mlp.up_proj.weight": (8, 4)})
    write_file(tmp_path / "b.safetensors", {"model.layers.1.mlp.up_proj.weight": (8, 4)})
    write_file(tmp_path / "stale.safetensors", {"model.layers.7.mlp.up_proj.weight": (8, 4)})
    weights = {f"model.layers.{n}.mlp.up_proj.weight": f"{file}.safetensors" for n, file in enumerate("ab")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    assert [one.layer for one in read_layout(tmp_path).matrices] == [0, 1]
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(InvalidInput, match=r"index.json: names b.safetensors, missing here"):
        read_layout(tmp_path)


ATTENTION = {"hidden_size": 64, "num_attention_heads": 4}
FUSED = [
    (
        "phi3", "qkv_proj", (128, 64), {"num_key_value_heads": 2},
        [Part("q", 0, 1, 0, 64), Part("k", 0, 1, 64, 96), Part("v", 0, 1, 96, 128)],
    ),
    ("phi3", "gate_up_proj", (192, 64), {}, [Part("gate", 0, 1, 0, 96), Part("up", 0, 1, 96, 192)]),
    (
        "gpt2", "c_attn", (64, 192), {},
        [Part("q", 1, 1, 0, 64), Part("k", 1, 1, 64, 128), Part("v", 1, 1, 128, 192)],
    ),
    (
        "gpt_neox", "query_key_value", (192, 64), {},
        [Part("q", 0, 4, 0, 16), Part("k", 0, 4, 16, 32), Part("v", 0, 4, 32, 48)],
    ),
    (
        "falcon", "query_key_value", (96, 64), {"multi_query": True},
        [Part("q", 0, 1, 0, 64), Part("k", 0, 1, 64, 80), Part("v", 0, 1, 80, 96)],
    ),
    (
        "falcon", "query_key_value", (192, 64), {"multi_query": False},
        [Part("q", 0, 4, 0, 16), Part("k", 0, 4, 16, 32), Part("v", 0, 4, 32, 48)],
    ),
    (
        "falcon", "query_key_value", (128, 64), {"new_decoder_architecture": True, "num_kv_heads": 2},
        [Part("q", 0, 2, 0, 32), Part("k", 0, 2, 32, 48), Part("v", 0, 2, 48, 64)],
    ),
    (
        "gpt_bigcode", "c_attn", (96, 64), {"multi_query": True},
        [Part("q", 0, 1, 0, 64), Part("k", 0, 1, 64, 80), Part("v", 0, 1, 80, 96)],
    ),
    ("codegen", "qkv_proj", (192, 64), {}, [None]),
    ("phi3", "qkv_proj", (130, 64), {}, [None]),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "name", "shape", "config", "parts"), FUSED)
def test_fused_projections_are_split_as_the_config_says(kind, name, shape, config, parts):
    settings = ATTENTION | config | {"model_type": kind}
    found = split(f"model.layers.3.attn.{name}.weight", shape, settings)
    assert [one.part for one in found] == parts
    assert sum(one.size for one in found) == prod(shape)
    assert {one.layer for one in found} == {3}
    assert all(one.type == f"attn.{name}" + (f".{one.part.label}" if one.part else "") for one in found)
    assert split(f"model.layers.3.attn.{name}.weight", shape, {"text_config": settings}) == found


@pytest.mark.parametrize(
    ("stored", "kind"),
    [
        ("model.layers.1.block_sparse_moe.experts.5.w1.weight", "gate"),
        ("model.layers.1.block_sparse_moe.experts.5.w3.weight", "up"),
        ("model.layers.1.block_sparse_moe.experts.5.w2.weight", "down"),
        ("model.layers.1.mlp.experts.5.gate_proj.weight", "gate"),
        ("model.layers.1.mlp.experts.5.up_proj.weight", "up"),
        ("model.layers.1.mlp.experts.5.down_proj.weight", "down"),
    ],
)
def test_an_expert_on_disk_is_the_expert_in_memory(stored, kind):
    (on_disk,) = split(stored, (48, 64), {})
    in_memory = matrices(
        [
            ("model.layers.1.mlp.experts.gate_up_proj", (8, 96, 64)),
            ("model.layers.1.mlp.experts.down_proj", (8, 64, 48)),
        ],
        {"model_type": "mixtral"},
    )
    assert len(in_memory) == 24
    (same,) = [one for one in in_memory if one.key == on_disk.key]
    assert on_disk.type == f"experts.{kind}"
    assert on_disk.module in spellings(same)
    assert (same.index, same.expert, same.size) == (5, 5, 48 * 64)
    assert not same.whole


def test_experts_of_gpt_oss_interleave_gate_and_up():
    found = split("model.layers.0.mlp.experts.gate_up_proj", (2, 64, 96), {"model_type": "gpt_oss"})
    assert [(one.type, one.expert, one.shape) for one in found] == [
        ("experts.gate", 0, (64, 48)), ("experts.up", 0, (64, 48)),
        ("experts.gate", 1, (64, 48)), ("experts.up", 1, (64, 48)),
    ]  # fmt: skip
    assert found[0].part == Part("gate", 1, 48, 0, 1)


def test_types_do_not_overlap_and_vectors_are_no_matrices():
    shapes = {
        "model.layers.0.mlp.gate.weight": (4, 64),
        "model.layers.1.mlp.gate_proj.weight": (96, 64),
        "model.layers.0.mlp.shared_expert_gate.weight": (1, 64),
        "model.layers.0.mlp.shared_expert.gate_proj.weight": (96, 64),
        "model.layers.0.norm.weight": (64,),
        "model.layers.0.conv.weight": (64, 1, 4),
        "model.embed_tokens.weight": (100, 64),
    }
    assert [one.type for one in matrices(shapes.items(), {})] == [
        "mlp.gate", "mlp.shared_expert.gate_proj", "mlp.gate_proj",
    ]  # fmt: skip


def test_names_old_and_new_mean_the_same():
    assert identify("model.layers.2.block_sparse_moe.gate") == identify("model.layers.2.mlp.gate")
    assert identify("model.layers.2.mlp.experts.3.up_proj") == (2, "experts.up", 3)
    assert identify("model.layers.2.mlp.experts.3.up") == (2, "experts.up", 3)
    assert identify("model.norm") is None


def test_routers_and_experts_are_no_linear_modules(tmp_path):
    shapes = {f"model.layers.0.mlp.experts.{n}.up_proj.weight": (8, 16) for n in range(4)}
    shapes |= {"model.layers.0.mlp.gate.weight": (4, 16), "model.layers.0.self_attn.q_proj.weight": (16, 16)}
    layout = read_layout(write_folder(tmp_path, shapes | {"model.layers.0.self_attn.q_proj.bias": (16,)}))
    assert layout.linear_modules == {"q_proj"}
    assert layout.is_moe
    assert layout.has_biases


def endless_header(folder):
    """As long as the file, which takes no room on the disk and much in memory."""
    with (folder / "model.safetensors").open("wb") as file:
        file.write((1 << 34).to_bytes(8, "little"))
        file.truncate((1 << 34) + 8)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "not the folder of a model: it has no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json: cannot be read as JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), "config.json: not a JSON object"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no safetensors files"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\x08"), "not a whole safetensors file"),
        (lambda folder: (folder / "model.safetensors").write_bytes(bytes(64)), "not a whole safetensors file"),
        (endless_header, "not a whole safetensors file"),
        (
            lambda folder: (folder / "model.safetensors").write_bytes((4).to_bytes(8, "little") + b"oops" + bytes(9)),
            "its header cannot be read",
        ),
        (
            lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-1]),
            "cut off: its header promises more",
        ),
        (lambda folder: write_header(folder, b"[]"), "its header does not describe tensors"),
        (lambda folder: write_header(folder, b'{"a": 3}'), "its header does not describe tensors"),
        (lambda folder: write_header(folder, b'{"a": {"dtype": "F32", "shape": 3}}'), "does not describe tensors"),
        *(
            (lambda folder, text=text: (folder / INDEX).write_text(text), message)
            for text, message in {
                "": "index.json: cannot be read as JSON",
                "[]": "index.json: not a JSON object",
                "[" * 9999: "index.json: cannot be read as JSON",
                "{}": "its weight_map should give the file of each weight",
                '{"weight_map": []}': "its weight_map should give the file of each weight",
                '{"weight_map": {"a": 1}}': "its weight_map should give the file of each weight",
                '{"weight_map": {}}': "names no files",
                '{"weight_map": {"a": "gone.safetensors"}}': "names gone.safetensors, missing here",
                '{"weight_map": {"a": "../a.safetensors"}}': r"names '../a.safetensors', which is no",
                '{"weight_map": {"a": "/dev/zero"}}': r"names '/dev/zero', which is no \*.safetensors file beside it",
            }.items()
        ),
    ],
)
def test_a_broken_checkpoint_is_refused(tmp_path, harm, message):
    harm(write_folder(tmp_path, LLAMA))
    with pytest.raises(InvalidInput, match=message):
        read_layout(tmp_path)


def test_neither_torch_nor_numpy_is_imported():
    script = "import sys, stages.layout; print([name for name in ('torch', 'numpy', 'scipy') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
