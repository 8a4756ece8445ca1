"""Which modules of a model get an adapter: presets and names become what PEFT matches."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from stages.errors import InvalidInput

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Targets = Literal["all-linear", "attention", "query-value"] | Annotated[tuple[str, ...], Field(min_length=1)]
"""``all-linear``: every linear layer but the output head and gates with one output. ``attention``: all projections of
attention. ``query-value``: query and value only (the whole fused projection where a model has one). Or names such as
``q_proj``. The experts of a mixture are no linear layers in transformers 5 and stay frozen."""

ATTENTION = frozenset({"self_attn", "attn", "attention", "self_attention"})
"""What layers call their attention."""
QUERY_VALUE = frozenset({"q_proj", "v_proj", "query", "value", "qkv_proj", "c_attn", "query_key_value", "Wqkv"})
"""What attention calls its query and value projections, alone or fused into one."""


def linear_modules(model: "PreTrainedModel") -> Iterator[tuple[str, Any]]:
    """Every linear layer (GPT-2's Conv1D too) except the output head, by name."""
    import torch
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if isinstance(module, (torch.nn.Linear, Conv1D)) and module is not head:
            yield name, module


def adapter_targets(model: "PreTrainedModel", wanted: "Targets") -> list[str]:
    """The endings of module names that ``wanted`` means in ``model``, for PEFT's ``target_modules``.

    Raises:
        InvalidInput: a name is an embedding, the output head or no module, or the preset finds nothing.
    """
    if not isinstance(wanted, str):
        _check_names(model, wanted)
        return list(wanted)
    found: dict[str, None] = {}
    for name, module in linear_modules(model):
        if is_target(name, sides(module), wanted):
            # Two components: GPT-2 calls a layer c_proj in attention and in the MLP.
            found[".".join(name.split(".")[-2:])] = None
    if not found:
        raise InvalidInput(f"target_modules: {wanted} finds no module in this model; name them, for example [q_proj]")
    return list(found)


def is_transposed(model: "PreTrainedModel", targets: list[str]) -> bool:
    """Whether the targets hold their weights as (in, out): PEFT's ``fan_in_fan_out``."""
    from transformers.pytorch_utils import Conv1D

    return any(isinstance(module, Conv1D) for name, module in linear_modules(model) if ends_with(name, targets))


def check_rank(model: "PreTrainedModel", targets: list[str], rank: int) -> None:
    """Refuse a rank that a target matrix cannot have.

    Raises:
        InvalidInput: ``rank`` is larger than the smaller side of a target.
    """
    for name, module in linear_modules(model):
        if ends_with(name, targets) and rank > min(sides(module)):
            out, into = sides(module)
            raise InvalidInput(
                f"rank {rank} is larger than {name} ({out} x {into}) allows; lower it to {min(out, into)} or less, or "
                "leave that module out of target_modules"
            )


def sides(module: Any) -> tuple[int, int]:
    """Outputs and inputs of a linear layer, also of one that is held in 4 bits or transposed."""
    if hasattr(module, "out_features"):
        return int(module.out_features), int(module.in_features)
    return int(module.nf), int(module.nx)


def is_target(name: str, shape: tuple[int, int], wanted: "Targets") -> bool:
    """Whether ``wanted`` means a linear module, by its name and its two sides in either order."""
    if not isinstance(wanted, str):
        return ends_with(name, wanted)
    *parents, last = name.split(".")
    in_attention = not ATTENTION.isdisjoint(parents)
    if min(shape) == 1:
        return False
    return wanted == "all-linear" or (in_attention and (wanted == "attention" or last in QUERY_VALUE))


def ends_with(name: str, targets: Sequence[str]) -> bool:
    """Whether PEFT would match a module's name."""
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _check_names(model: "PreTrainedModel", names: tuple[str, ...]) -> None:
    forbidden = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    modules = dict(model.named_modules())
    for wanted in names:
        hits = [name for name in modules if ends_with(name, [wanted])]
        if not hits:
            raise InvalidInput(f"target_modules names {wanted}, which this model does not have")
        if any(id(modules[name]) in forbidden for name in hits):
            raise InvalidInput(
                f"target_modules names {wanted}, an embedding: a merge of an adapter there is wrong where embeddings "
                "are tied; take it out, or train embeddings whole with method longlora, full or spectrum"
            )
