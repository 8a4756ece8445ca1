"""What a method requires of its stage and of the model, without torch: from the spec, the config and the headers.

`validate` holds every stage against a base that is on disk, a run against one that had to be prepared first, so
that a method that cannot serve a model never starts on it.
"""

import difflib
from collections.abc import Iterable, Iterator

from specs.pipeline import Location
from stages.layout import HEADS, Layout
from stages.methods.base import MethodSpec
from stages.methods.targets import ends_with, is_target
from stages.objective import ObjectiveSpec

EMBEDDINGS = HEADS | {
    "embed_tokens", "embed_in", "wte", "wpe", "word_embeddings", "tok_embeddings", "embed_positions",
}  # fmt: skip
"""Last parts of the names of embeddings and output heads."""
RANKS = ("initial_rank", "rank")
"""Fields that hold the rank of an update, the first one that a method has."""


def stage_problems(stage: ObjectiveSpec, layout: Layout | None) -> Iterator[tuple[Location, str]]:
    """What is wrong between a stage, its method and the base: each with its place in the stage and a message.

    Args:
        stage: the stage.
        layout: the base's config and headers; None where it is not on disk yet, and only the spec is looked at.
    """
    method = stage.method
    if stage.kind not in method.objectives:
        suited = " and ".join(method.objectives)
        yield ("method", "kind"), f"method {method.kind} does not suit objective {stage.kind}; it suits {suited}"
    if not method.narrows and stage.train.weights_dtype != "float32":
        yield (
            ("train", "weights_dtype"),
            f"method {method.kind} holds its linear layers in few bits and the rest in float32 whatever this says; "
            "remove it (train.precision: bfloat16 is what multiplies in bfloat16)",
        )
    refused = None if layout is None else method.unsupported(layout.config)
    if refused is not None:
        yield ("method", "kind"), refused
        return
    yield from _position_problems(stage, layout)
    for field, message in () if layout is None else method.field_problems(layout.config):
        yield ("method", field), message
    for number, name in enumerate(method.targets() or ()):
        problem = _target_problem(name, layout)
        if problem:
            yield ("method", "target_modules", number), problem
    if layout is not None:
        yield from _rank_problems(method, layout)


def target_matrices(method: MethodSpec, layout: Layout) -> dict[str, tuple[int, int]]:
    """The matrices that a method with target modules adapts: module name -> shape as it is stored.

    Empty for methods without target modules. The same modules that PEFT finds in the loaded model: a test holds
    the two together.
    """
    wanted = getattr(method, "target_modules", None)
    if wanted is None:
        return {}
    return {name: shape for name, shape in layout.linear_shapes.items() if is_target(name, shape, wanted)}


def rank_of(method: MethodSpec) -> tuple[str, int] | None:
    """The field that holds the rank of a method's updates, and the rank; None where it has none."""
    field = next((name for name in RANKS if name in type(method).model_fields), None)
    return None if field is None else (field, getattr(method, field))


def by_nearness(found: str, names: Iterable[str]) -> list[str]:
    """Names in order of their likeness to what was found."""
    return sorted(names, key=lambda name: (-difflib.SequenceMatcher(None, found, name).ratio(), name))


def _position_problems(stage: ObjectiveSpec, layout: Layout | None) -> Iterator[tuple[Location, str]]:
    """Virtual tokens stand at positions of their own: what they and a sequence take together the model must have."""
    config = {} if layout is None else layout.config
    limit = config.get("max_position_embeddings", config.get("n_positions"))
    taken = stage.method.positions
    if not taken or not isinstance(limit, int):
        return
    if taken >= limit:
        yield (
            ("method", "virtual_tokens"),
            f"{taken} leave no position for text, as this model has {limit}; must be below {limit}",
        )
    elif taken + stage.train.sequence_length > limit:
        yield (
            ("train", "sequence_length"),
            f"{stage.train.sequence_length} tokens and {taken} virtual ones are more than this model has positions "
            f"({limit}); the longest sequence here is {limit - taken}",
        )


def _target_problem(wanted: str, layout: Layout | None) -> str | None:
    """Why a named target module cannot have an adapter."""
    last = wanted.rsplit(".", 1)[-1]
    outside = set() if layout is None else {layout.embedding, layout.head}
    if last in EMBEDDINGS or any(
        name is not None and ends_with(name.removesuffix(".weight"), [wanted]) for name in outside
    ):
        return (
            f"{wanted!r} is an embedding or the output head: where the two are tied, a merged adapter there gives "
            "another model than the trained one; remove it. Methods full, longlora, and spectrum with "
            "`embeddings: true` train embeddings whole"
        )
    if layout is None:
        return None
    if any(ends_with(name, [wanted]) for name in layout.linear_shapes):
        return None
    experts = {matrix.tensor.removesuffix(".weight") for matrix in layout.matrices if matrix.expert is not None}
    if any(ends_with(name, [wanted]) for name in experts):
        reason = f"{wanted!r} are this model's experts, which are no linear modules in memory and get no adapter"
    else:
        reason = f"this model has no linear module {wanted!r}"
    present = by_nearness(last, layout.linear_modules)
    return f"{reason}; it has, nearest first: {', '.join(present)}"


def _rank_problems(method: MethodSpec, layout: Layout) -> Iterator[tuple[Location, str]]:
    ranked = rank_of(method)
    matrices = target_matrices(method, layout)
    if ranked is None or not method.rank_is_bounded or not matrices:
        return
    field, rank = ranked
    transposed = layout.is_conv1d
    limits = {name: method.rank_limit(*(reversed(shape) if transposed else shape)) for name, shape in matrices.items()}
    name, limit = min(limits.items(), key=lambda entry: entry[1])
    if rank > limit:
        shape = matrices[name]
        yield (
            ("method", field),
            f"{rank} is larger than {method.rank_bound} of {name} ({shape[0]} x {shape[1]}); the largest {field} "
            f"allowed here is {limit}, or leave that module out of target_modules",
        )
