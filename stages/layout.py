"""Which weights a checkpoint holds, read from its config and the headers of its files.

Needs neither torch nor numpy, so `validate` and `plan` can ask. What is scored, ranked and selected is a
`Matrix`: a stored tensor, or a part of one where an architecture keeps several matrices in one tensor
(queries, keys and values; gate and up; all experts of a layer). The same split serves a loaded model:
`split` needs a name, a shape and the config only.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from stages.documents import read_object
from stages.errors import InvalidInput

INDEX = "model.safetensors.index.json"
SUFFIX = ".safetensors"
"""How a file of weights ends."""
CONV1D_MODELS = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
"""Model types whose linear layers are transformers' Conv1D: weights of shape (in, out)."""
HEADS = frozenset({"lm_head", "embed_out"})
"""Last parts of the names of output heads."""
_MAX_HEADER = 100_000_000
"""Bytes; the limit of the safetensors library itself."""
_POSITIONS = frozenset({"wpe", "embed_positions", "position_embeddings"})

_LAYER = re.compile(r"(?:^|\.)(\d+)\.")
_EXPERT = re.compile(r"(?:^|\.)experts\.(\d+)\.([^.]+)$")
_BANK = re.compile(r"(?:^|\.)(?:experts\.(?:gate_up_proj|down_proj)|input_linear|output_linear)$")
_EXPERT_TYPES = {"w1": "gate", "w3": "up", "w2": "down", "gate_proj": "gate", "up_proj": "up", "down_proj": "down"}
_HEAD_MAJOR = frozenset({"gpt_neox", "gpt_neox_japanese", "bloom"})
"""Model types that keep the rows of each head's query, key and value side by side."""
_FUSED_QKV = frozenset({"qkv_proj", "Wqkv", "query_key_value", "c_attn"})
_UNKNOWN_ORDER = frozenset({"codegen"})
"""Model types whose fused rows are ordered in a way of their own; they are scored whole."""


Key = tuple[int, str, int | None]
"""Layer, module type, expert."""


@dataclass(frozen=True, slots=True)
class Part:
    """Some rows or columns of a matrix: ``start`` to ``stop`` of each of the equal ``groups`` of its ``axis``."""

    label: str
    axis: int
    groups: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Tensor:
    """One stored tensor."""

    name: str
    file: Path
    dtype: str
    """As safetensors spells it: BF16, F16, F32, F64, ..."""
    shape: tuple[int, ...]
    start: int
    """First byte in the file."""
    stop: int
    """First byte after it."""


@dataclass(frozen=True, slots=True)
class Matrix:
    """What is scored and selected as one: a two-dimensional weight inside a numbered layer, or a part of one."""

    tensor: str
    """The tensor or parameter that holds it."""
    module: str
    """Its name: the tensor's without ``.weight``, plus the part's label."""
    type: str
    """What is ranked together: what follows the layer's number; ``experts.gate`` for all experts."""
    layer: int
    expert: int | None
    shape: tuple[int, int]
    index: int | None = None
    """Its place along the first of three dimensions, where the tensor holds all experts."""
    part: Part | None = None

    @property
    def key(self) -> Key:
        """What names it in a checkpoint and in memory alike, though the two may spell it differently."""
        return self.layer, self.type, self.expert

    @property
    def whole(self) -> bool:
        """Whether it is all of its tensor."""
        return self.index is None and self.part is None

    @property
    def size(self) -> int:
        """Number of its weights."""
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class Layout:
    """A checkpoint folder: its config and its tensors, none of them read."""

    folder: Path
    config: dict[str, Any]
    tensors: tuple[Tensor, ...]

    @property
    def model_type(self) -> str:
        """The architecture's name in transformers."""
        return str(self.config.get("model_type", ""))

    @cached_property
    def matrices(self) -> tuple[Matrix, ...]:
        """Every matrix inside the numbered layers, in order of layer; fused ones and experts in parts."""
        return matrices(((tensor.name, tensor.shape) for tensor in self.tensors), self.config)

    @cached_property
    def tensor(self) -> dict[str, Tensor]:
        """The tensors by name."""
        return {tensor.name: tensor for tensor in self.tensors}

    @cached_property
    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """Every linear module inside the numbered layers: name -> shape as it is stored.

        Experts and their routers are left out: transformers 5 holds them as bare parameters, which no adapter
        reaches. The head is in `head`.
        """
        experts = {matrix.expert for matrix in self.matrices} - {None}
        of_experts = {matrix.tensor for matrix in self.matrices if matrix.expert is not None}
        return {
            tensor.name.removesuffix(".weight"): (tensor.shape[0], tensor.shape[1])
            for tensor in self.tensors
            if tensor.name.endswith(".weight") and len(tensor.shape) == 2 and _LAYER.search(tensor.name)
            if tensor.name not in of_experts and not (experts and tensor.shape[0] == len(experts))
        }

    @property
    def linear_modules(self) -> frozenset[str]:
        """Last parts of the names of `linear_shapes`, as adapters target them."""
        return frozenset(name.rsplit(".", 1)[-1] for name in self.linear_shapes)

    @property
    def embedding(self) -> str | None:
        """Name of the tensor of the input embedding."""
        return self._outside(head=False)

    @property
    def head(self) -> str | None:
        """Name of the tensor of the output head; None where it is the embedding."""
        return None if self.is_tied else self._outside(head=True)

    @property
    def is_tied(self) -> bool:
        """Whether the output head is the input embedding, stored twice or not."""
        tied = text_config(self.config).get("tie_word_embeddings", self.config.get("tie_word_embeddings"))
        return self._outside(head=True) is None if tied is None else bool(tied)

    @property
    def is_moe(self) -> bool:
        """Whether layers hold experts."""
        return any(matrix.expert is not None for matrix in self.matrices)

    @property
    def is_conv1d(self) -> bool:
        """Whether linear layers are transformers' Conv1D."""
        return self.model_type in CONV1D_MODELS

    @property
    def is_quantised(self) -> bool:
        """Whether the stored weights are quantised."""
        return bool(self.config.get("quantization_config"))

    @property
    def has_biases(self) -> bool:
        """Whether any linear layer has a bias."""
        linear = {matrix.tensor.removesuffix(".weight") for matrix in self.matrices}
        return any(
            tensor.name.removesuffix(".bias") in linear for tensor in self.tensors if tensor.name[-5:] == ".bias"
        )

    def _outside(self, *, head: bool) -> str | None:
        for tensor in self.tensors:
            if tensor.name.endswith(".weight") and len(tensor.shape) == 2 and _LAYER.search(tensor.name) is None:
                last = tensor.name.split(".")[-2]
                if (last in HEADS) == head and last not in _POSITIONS:
                    return tensor.name
        return None


def read_layout(folder: Path) -> Layout:
    """Read config and headers of a plain checkpoint.

    Raises:
        InvalidInput: no config, no safetensors files, a damaged header, or a file that the index names is missing.
    """
    if not (folder / "config.json").is_file():
        raise InvalidInput(f"{folder}: not the folder of a model: it has no config.json")
    config = read_object(folder / "config.json")
    tensors = [tensor for file in _files(folder) for tensor in _header(file)]
    return Layout(folder, config, tuple(tensors))


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config of the language model, which models of several modalities nest."""
    nested = config.get("text_config")
    return nested if isinstance(nested, Mapping) else config


def matrices(weights: Iterable[tuple[str, tuple[int, ...]]], config: Mapping[str, Any]) -> tuple[Matrix, ...]:
    """The matrices of a checkpoint or of a model: (name, shape) pairs in, ordered by layer, then as they came."""
    found = [matrix for name, shape in weights for matrix in split(name, tuple(shape), config)]
    first = {matrix.type: number for number, matrix in reversed(list(enumerate(found)))}
    return tuple(sorted(found, key=lambda matrix: (matrix.layer, first[matrix.type], matrix.expert or 0)))


def identify(module: str) -> Key | None:
    """Layer, type and expert that a module's name means, however old or new the spelling; None outside the layers."""
    position = _LAYER.search(module)
    if position is None:
        return None
    layer, rest = int(position[1]), module[position.end() :]
    expert = _EXPERT.search(rest)
    if expert is not None:
        return layer, f"experts.{_EXPERT_TYPES.get(expert[2], expert[2])}", int(expert[1])
    # As transformers 5 renames them in memory.
    return layer, rest.replace("block_sparse_moe.", "mlp.").replace("router.layer", "router"), None


def spellings(matrix: Matrix) -> frozenset[str]:
    """The module names of a matrix, today's and those of older transformers (experts had modules of their own)."""
    name = matrix.module
    found = {name, name.replace(".mlp.", ".block_sparse_moe."), name.replace(".block_sparse_moe.", ".mlp.")}
    stem = re.match(r"(.*\.)(?:mlp|block_sparse_moe)\.experts\.", name)
    if stem is not None and matrix.expert is not None:
        label = matrix.type.rsplit(".", 1)[-1]
        last = [label, *(name for name, what in _EXPERT_TYPES.items() if what == label)]
        found |= {
            f"{stem[1]}{block}.experts.{matrix.expert}.{name}" for block in ("mlp", "block_sparse_moe") for name in last
        }
    return frozenset(found)


def split(name: str, shape: tuple[int, ...], config: Mapping[str, Any]) -> list[Matrix]:
    """The matrices in one tensor: none outside the layers or for vectors, several in a fused one."""
    module = name.removesuffix(".weight")
    key = identify(module)
    if key is None:
        return []
    layer, kind, expert = key
    if len(shape) == 3 and _BANK.search(module):
        return _bank(name, module, layer, (shape[0], shape[1], shape[2]), config)
    if len(shape) != 2 or not name.endswith(".weight") or min(shape) < 2:
        return []  # a vector, or a row: one singular value has no spectrum
    rows, columns = shape
    parts = [] if expert is not None else _parts(kind.rsplit(".", 1)[-1], (rows, columns), config)
    if not parts:
        return [Matrix(name, module, kind, layer, expert, (rows, columns))]
    return [
        Matrix(name, f"{module}.{p.label}", f"{kind}.{p.label}", layer, None, _shape((rows, columns), p), part=p)
        for p in parts
    ]


def _bank(name: str, module: str, layer: int, shape: tuple[int, int, int], config: Mapping[str, Any]) -> list[Matrix]:
    """All experts of a layer in one tensor, as transformers 5 holds them in memory."""
    experts, matrix = shape[0], (shape[1], shape[2])
    if module.endswith(("down_proj", "output_linear")):
        parts: list[Part | None] = [None]
    else:
        kind = str(config.get("model_type", ""))
        axis = 1 if kind.startswith(("gpt_oss", "llama4")) else 0
        parts = list(_interleaved(axis, matrix) if kind == "gpt_oss" else _consecutive(axis, ("gate", "up"), matrix))
    stem = module.rsplit(".", 1)[0].removesuffix(".experts") + ".experts"
    return [
        Matrix(
            name, f"{stem}.{number}.{label}", f"experts.{label}", layer, number,
            matrix if part is None else _shape(matrix, part), number, part,
        )
        for number in range(experts)
        for part in parts
        for label in ["down" if part is None else part.label]
    ]  # fmt: skip


def _parts(last: str, shape: tuple[int, int], config: Mapping[str, Any]) -> list[Part]:
    """How a fused projection is split; empty for a plain one, and where the config does not explain its size."""
    settings = text_config(config)
    kind = str(settings.get("model_type", ""))
    if kind in _UNKNOWN_ORDER:
        return []
    if last == "gate_up_proj" and shape[0] % 2 == 0:
        return _consecutive(0, ("gate", "up"), shape)
    if last == "c_attn" and kind in CONV1D_MODELS and shape[1] % 3 == 0:
        return _consecutive(1, ("q", "k", "v"), shape)
    heads, groups, width = _attention(settings)
    if last not in _FUSED_QKV or (heads + 2 * groups) * width != shape[0]:
        return []
    by_group = kind in _HEAD_MAJOR or (kind == "falcon" and groups > 1) or (kind == "gpt_bigcode" and groups == heads)
    if by_group:
        return _sized((heads // groups * width, width, width), groups)
    return _sized((heads * width, groups * width, groups * width), 1)


def _sized(sizes: tuple[int, int, int], groups: int) -> list[Part]:
    starts = (0, sizes[0], sizes[0] + sizes[1])
    return [
        Part(label, 0, groups, start, start + size) for label, start, size in zip("qkv", starts, sizes, strict=True)
    ]


def _consecutive(axis: int, labels: tuple[str, ...], shape: tuple[int, int]) -> list[Part]:
    size = shape[axis] // len(labels)
    return [Part(label, axis, 1, number * size, (number + 1) * size) for number, label in enumerate(labels)]


def _interleaved(axis: int, shape: tuple[int, int]) -> list[Part]:
    return [Part(label, axis, shape[axis] // 2, number, number + 1) for number, label in enumerate(("gate", "up"))]


def _attention(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """Heads, groups that share key and value, and rows per head; zeros where the config does not say."""
    heads = _first(config, "num_attention_heads", "n_head", "n_heads", "num_heads")
    hidden = _first(config, "hidden_size", "n_embd", "d_model")
    width = _first(config, "head_dim") or hidden // (heads or 1)
    groups = _first(config, "num_key_value_heads", "num_kv_heads") or heads
    kind = config.get("model_type")
    if kind == "falcon" and not config.get("new_decoder_architecture", False):
        groups = 1 if config.get("multi_query", True) else heads
    if kind == "gpt_bigcode":
        groups = 1 if config.get("multi_query", True) else heads
    if kind == "dbrx":
        groups = int(config.get("attn_config", {}).get("kv_n_heads", heads))
    return heads, groups, width


def _first(config: Mapping[str, Any], *names: str) -> int:
    values = (config.get(name) for name in names)
    return next((value for value in values if isinstance(value, int) and value > 0), 0)


def _shape(shape: tuple[int, int], part: Part) -> tuple[int, int]:
    size = part.groups * (part.stop - part.start)
    return (size, shape[1]) if part.axis == 0 else (shape[0], size)


def _files(folder: Path) -> list[Path]:
    index = folder / INDEX
    if not index.is_file():
        found = sorted(folder.glob(f"[!.]*{SUFFIX}"))  # a hidden one is no weight file: macOS keeps notes there
        if not found:
            raise InvalidInput(f"{folder}: no safetensors files; convert the weights with save_pretrained first")
        return found
    named = read_object(index).get("weight_map")
    if not isinstance(named, dict) or not all(isinstance(name, str) for name in named.values()):
        raise InvalidInput(f"{index}: its weight_map should give the file of each weight, and does not; fetch it again")
    # A file elsewhere would be loaded, and be no part of what the model is known by.
    strange = next((name for name in named.values() if Path(name).name != name or Path(name).suffix != SUFFIX), None)
    if strange is not None:
        raise InvalidInput(f"{index}: names {strange[:60]!r}, which is no *{SUFFIX} file beside it; fetch it again")
    files = [folder / name for name in sorted(set(named.values()))]
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        raise InvalidInput(f"{index}: names {', '.join(missing) or 'no files'}, missing here; fetch them again")
    return files


def _header(file: Path) -> list[Tensor]:
    """The tensors of one file, in the order of their bytes."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 0 < length <= min(size - 8, _MAX_HEADER):
            raise InvalidInput(f"{file}: not a whole safetensors file ({size} bytes); fetch it again (or git lfs pull)")
        try:
            header = json.loads(stream.read(length))
        except (ValueError, RecursionError) as error:
            raise InvalidInput(f"{file}: its header cannot be read ({error}); fetch it again") from error
    base = 8 + length
    try:
        found = [
            Tensor(
                name, file, str(entry["dtype"]), tuple(int(side) for side in entry["shape"]), base + first, base + last
            )
            for name, entry in header.items()
            if name != "__metadata__"
            for first, last in [entry["data_offsets"]]
        ]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InvalidInput(f"{file}: its header does not describe tensors; fetch it again") from error
    if any(tensor.stop > size for tensor in found):
        raise InvalidInput(f"{file}: cut off: its header promises more than its {size} bytes; fetch it again")
    return sorted(found, key=lambda tensor: tensor.start)
