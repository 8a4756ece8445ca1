"""Bases of which only the config and the headers are real: enough to validate and to plan."""

import json
from pathlib import Path
from typing import Any

GGUF_HEADER = b"GGUF" + (3).to_bytes(4, "little") + (1).to_bytes(8, "little") + (1).to_bytes(8, "little")
"""How a GGUF file of one tensor and one setting begins."""


def write_headers(folder: Path, shapes: dict[str, tuple[int, ...]], **config: Any) -> None:
    """A base of which only the config and the headers are real."""
    folder.mkdir(parents=True, exist_ok=True)
    entries, end = {}, 0
    for name, shape in shapes.items():
        size = 4
        for side in shape:
            size *= side
        entries[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    header = json.dumps(entries).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(end))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"} | config))


def llama(experts: int = 0) -> dict[str, tuple[int, ...]]:
    """Names and shapes of one layer; keys and values are narrower than the rest."""
    layer = "model.layers.0."
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (320, 32),
        layer + "self_attn.q_proj.weight": (32, 32),
        layer + "self_attn.k_proj.weight": (16, 32),
        layer + "self_attn.v_proj.weight": (16, 32),
        layer + "self_attn.o_proj.weight": (32, 32),
        layer + "input_layernorm.weight": (32,),
        "lm_head.weight": (320, 32),
    }
    if experts:
        shapes[layer + "block_sparse_moe.gate.weight"] = (experts, 32)
        for number in range(experts):
            for name, shape in {"w1": (64, 32), "w2": (32, 64), "w3": (64, 32)}.items():
                shapes[f"{layer}block_sparse_moe.experts.{number}.{name}.weight"] = shape
    else:
        shapes |= {f"{layer}mlp.{name}_proj.weight": (64, 32) for name in ("gate", "up")}
        shapes[f"{layer}mlp.down_proj.weight"] = (32, 64)
    return shapes
