"""Whether the config of a checkpoint has the layers that its weights have: a model is built by the config alone.

A config with fewer layers than there are weights would be loaded without a word, as a pruned model, and trained as
one. Legitimate extras are known by what they hold: buffers (rotary frequencies, attention masks) are no layers, and
layers for multi-token prediction (DeepSeek-V3, arXiv 2412.19437, section 2.2; also GLM-4.5) have projections of their
own. transformers drops these on purpose.
"""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from stages.errors import InvalidInput
from stages.layout import Layout, read_layout, text_config

LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
"""What configs call the number of layers."""
PREDICTORS = "num_nextn_predict_layers"
"""What configs call the number of layers for multi-token prediction, which are numbered after the others."""
_PREDICTS = frozenset({"eh_proj", "shared_head.head"})
"""Matrices that only such a layer has: it joins the hidden state with the next token's embedding."""


def check_depth(folder: Path) -> None:
    """Hold the number of layers in the config of a checkpoint against its weights.

    A config can also ask for a thousand million layers, and building them, even without weights, would take for ever.

    Raises:
        InvalidInput: there are layers in the weights that the config leaves out, or far too few weights.
    """
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        return  # a config by itself, or a folder that is refused elsewhere
    if (problem := depth_problem(read_layout(folder))) is not None:
        raise InvalidInput(problem)


def depth_problem(layout: Layout) -> str | None:
    """Why the config and the weights of a checkpoint do not belong together; None where nothing speaks against it."""
    found = _asked(layout)
    if found is None:
        return None
    name, asked = found
    file = layout.folder / "config.json"
    if asked > len(layout.tensors):
        return (
            f"{file}: {name} is {asked:,}, and the files of the model hold {len(layout.tensors):,} weights in all; "
            "fetch the model again"
        )
    left_out = _left_out(layout, asked)
    if not left_out:
        return None
    first, last = min(left_out), max(left_out)
    which = f"layer {first}" if first == last else f"layers {first} to {last}"
    return (
        f"{file}: {name} is {asked}, and the weights hold {asked + len(left_out)} layers: {which} would be left out "
        f"without a word. Fetch config.json again; or, to train the smaller model on purpose, save it as one first "
        "(load it with transformers, then save_pretrained)"
    )


def predictors(layout: Layout) -> tuple[int, ...]:
    """The numbers of the layers for multi-token prediction, which are neither trained nor released."""
    found = _asked(layout)
    return () if found is None else tuple(sorted(_beyond(layout, found[1])[1]))


def _asked(layout: Layout) -> tuple[str, int] | None:
    config = text_config(layout.config)
    found = ((name, config[name]) for name in LAYERS if type(config.get(name)) is int)
    return next(((name, count) for name, count in found if count > 0), None)


def _left_out(layout: Layout, asked: int) -> set[int]:
    return _beyond(layout, asked)[0]


def _beyond(layout: Layout, asked: int) -> tuple[set[int], set[int]]:
    """The layers that are numbered beyond the config's: those that are as the others are, and those that predict."""
    types = _types_by_layer(layout)
    ordinary = [types[layer] for layer in types if layer < asked]
    several = text_config(layout.config).get(PREDICTORS)
    known = range(asked, asked + several) if isinstance(several, int) else range(0)
    whole, predicting = set(), set()
    for layer in types:
        if layer < asked:
            continue
        if layer in known or types[layer] & _PREDICTS:
            predicting.add(layer)
        elif any(one <= types[layer] for one in ordinary):
            whole.add(layer)
    return whole, predicting


def _types_by_layer(layout: Layout) -> dict[int, frozenset[str]]:
    """The module types of the matrices of each layer of the language model; a vision tower has layers of its own."""
    stacks = Counter(_stack(matrix.module, matrix.layer) for matrix in layout.matrices)
    if not stacks:
        return {}
    stack = _language(stacks)
    found: dict[int, set[str]] = {}
    for matrix in layout.matrices:
        if _stack(matrix.module, matrix.layer) == stack:
            found.setdefault(matrix.layer, set()).add(matrix.type)
    return {layer: frozenset(found[layer]) for layer in sorted(found)}


def _language(stacks: Counter[str]) -> str:
    """The stack of the language model: of those that are called layers, the one with most matrices."""
    seen = [stack for stack in stacks if not _sees(stack.split("."))]
    return max(seen or stacks, key=lambda stack: stacks[stack])


def _sees(parts: Iterable[str]) -> bool:
    return any(part.startswith(("vision", "visual", "audio", "mtp")) for part in parts)


def _stack(module: str, layer: int) -> str:
    """What stands before a layer's number in a module's name."""
    before, _, _ = f".{module}.".partition(f".{layer}.")
    return before.removeprefix(".")
