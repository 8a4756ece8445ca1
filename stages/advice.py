"""What the literature, or a measurement, advises against: a warning with its source, never a refusal.

One function per piece of advice, all in the table `ADVICE`. None needs torch, and none reads more than the headers
of the base and a bounded number of rows.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from specs.load import Document, Problem
from specs.metric import JudgeSpec, LmEvalSpec, MetricSpec
from specs.pipeline import Location
from stages.data import SAMPLE, Count, read_source
from stages.depth import predictors
from stages.errors import InvalidInput
from stages.layout import Layout, read_layout
from stages.methods.lora import LowRank
from stages.metrics.harness import is_task_file
from stages.metrics.installed import not_here
from stages.objective import ObjectiveSpec
from stages.pipeline import Pipeline
from stages.requirements import rank_of, target_matrices

CPT_RANK = 256
"""The rank up to which LoRA was seen to stay behind full training in CPT."""
ALPHA_PER_RANK = (1.0, 4.0)
"""Alpha over rank that counts as near to the usual 2."""
SMALL_SET = 5_000
"""Rows below which repeated instruction fine-tuning soon learns them by heart."""
MANY_PASSES = 2.0
"""Passes over a small set that need no warning."""
ROUNDED_BELOW = {"bfloat16": 5e-5, "float16": 6e-6}
"""Learning rates at and below which rounding to a dtype takes a large part of an update. bfloat16: measured, 40% is
lost at this rate and 91% at a tenth of it. float16: inferred, its steps are 8 times finer."""
VERA_RATE = 1e-3
"""The learning rate under which VeRA hardly moves."""

BIDERMAN = "Biderman et al., arXiv 2405.09673"
HU = "Hu et al., arXiv 2106.09685, section 4"
OUYANG = "Ouyang et al., arXiv 2203.02155, section 3.5"
KOPICZKO = "Kopiczko et al., arXiv 2310.11454"
CHEN = "Chen et al., arXiv 2309.12307"
LEFT_OUT = "on_bad_row: drop"
ROUNDING = "measured: docs/decisions/0004"
REQUANTISING = "measured: docs/decisions/0007"
EXPERTS = "transformers 5: the experts of a layer are one parameter, no linear modules"


@dataclass(frozen=True, slots=True)
class Context:
    """What advice may look at beside the stage."""

    pipeline: Pipeline
    number: int
    """The stage's place in the pipeline, from 0."""
    folder: Path
    """What paths in the spec start from."""
    layout: Layout | None
    """The base's config and headers, if it is on disk as a plain checkpoint."""

    @property
    def previous(self) -> ObjectiveSpec | None:
        """The stage before."""
        return self.pipeline.stages[self.number - 1] if self.number else None

    @property
    def is_last(self) -> bool:
        """Whether the release follows."""
        return self.number == len(self.pipeline.stages) - 1


class Advice(NamedTuple):
    """One piece of advice."""

    field: Location
    """Where in the stage it belongs."""
    check: Callable[[ObjectiveSpec, Context], str | None]
    source: str


def warnings(pipeline: Pipeline, document: Document, base: Path | None = None) -> list[Problem]:
    """All advice on a spec that `stages.check` has found sound, each at its place, in the order of the file.

    Args:
        pipeline: the spec.
        document: the file it was read from.
        base: the base as a plain checkpoint, where it is known; without it, less can be said.
    """
    folder = document.path.parent.resolve()
    if base is None and pipeline.model.path is not None:
        base = folder / pipeline.model.path
    layout = _layout(base)
    found = []
    said: set[tuple[int, str]] = set()
    for place, stage in pipeline.placed_stages():
        number = int(place[1])
        context = Context(pipeline, number, folder, layout)
        for advice in ADVICE:
            text = advice.check(stage, context)
            if text is not None and (number, text) not in said:  # of an attempt, what is not true of the stage as well
                said.add((number, text))
                found.append(document.problem((*place, *advice.field), f"warning: {text} ({advice.source})"))
    for name, metric in pipeline.metrics.items():
        if (text := is_fetched(metric)) is not None:
            found.append(document.problem(("metrics", name, "task"), f"warning: {text}"))
    if layout is not None and (layers := predictors(layout)):
        numbers = ", ".join(map(str, layers))
        found.append(
            document.problem(
                ("model",),
                f"warning: layer {numbers} of the base is for multi-token prediction: it is not loaded, so neither "
                "trained nor released (transformers; DeepSeek-V3, arXiv 2412.19437)",
            )
        )
    return sorted(found)


def undecisive(pipeline: Pipeline, document: Document) -> list[Problem]:
    """The metrics that no gate uses. They stand in the report, which may be all that is wanted: `validate` asks."""
    gated = {gate.metric_name for _, gate in pipeline.placed_gates()}
    gated |= {metric.answers for metric in pipeline.metrics.values() if isinstance(metric, JudgeSpec)}
    return [
        document.problem(
            ("metrics", name),
            "warning: no gate uses this metric: it is measured on the base and after every stage, stands in the report "
            "and decides nothing; name it in a gate, or remove it if nobody reads it",
        )
        for name in pipeline.metrics
        if name not in gated
    ]


def is_fetched(metric: MetricSpec) -> str | None:
    """What a task reads may have to come from the hub first."""
    if not isinstance(metric, LmEvalSpec) or is_task_file(metric.task) or not (datasets := not_here(metric.task)):
        return None
    return (
        f"task {metric.task} needs the network when it is first measured: {', '.join(datasets)} is not in the datasets "
        "cache; what the hub holds then is what is measured, whatever it was before"
    )


def low_rank_in_cpt(stage: ObjectiveSpec, context: Context) -> str | None:
    """Low-rank updates learn less than full training from raw text."""
    ranked = rank_of(stage.method)
    if stage.kind != "cpt" or ranked is None or not _is_adapter(stage):
        return None
    rank, comparable = ranked[1], stage.method.rank_is_bounded
    if comparable and rank >= CPT_RANK:
        return None
    useful = useful_rank(stage, context)
    wider = comparable and (useful is None or useful[1] >= CPT_RANK)
    instead = f", or a rank of {CPT_RANK} and more" if wider else ""
    return (
        f"method {stage.method.kind} at rank {rank} learns less in continued pre-training than whole weights do; "
        f"use method spectrum or full{instead}"
    )


def alpha_far_from_twice_the_rank(stage: ObjectiveSpec, context: Context) -> str | None:
    """The update's scale that is usual, and that was compared with others, is 2."""
    alpha, ranked = getattr(stage.method, "alpha", None), rank_of(stage.method)
    if alpha is None or ranked is None or stage.method.kind == "rslora":
        return None
    field, rank = ranked
    low, high = ALPHA_PER_RANK
    if low <= alpha / rank <= high:
        return None
    return (
        f"alpha {alpha:g} is {alpha / rank:.2g} times the {field} of {rank}; twice the rank, {2 * rank}, is the "
        "default and what that paper advises: remove alpha, or use method rslora if the rank is to vary"
    )


def many_passes_over_a_small_set(stage: ObjectiveSpec, context: Context) -> str | None:
    """Repeated answers are soon known by heart."""
    if stage.kind != "ift":
        return None
    train = stage.train
    if train.epochs is not None and train.epochs <= MANY_PASSES:
        return None
    rows = _rows(stage, context.folder)
    if not rows or rows >= SMALL_SET:
        return None
    # Packed sequences hold several rows each, so steps give a lower bound.
    passes = train.epochs if train.epochs is not None else (train.max_steps or 0) * train.batch_size / rows
    if passes <= MANY_PASSES:
        return None
    return (
        f"{passes:.3g} passes over {rows:,.0f} rows: on a small set, answers are learned by heart after the first "
        "pass or two; use epochs: 2 or less, or more rows, and gate on a metric over held-out rows"
    )


def rows_left_out(stage: ObjectiveSpec, context: Context) -> str | None:
    """Rows that cannot be used are worth a look, also where a run goes on without them."""
    found = []
    for source in stage.data:
        if source.path is None or source.on_bad_row == "fail":
            continue
        count = Count(source.label)
        try:
            deque(read_source(source, context.folder, stage.normalise, SAMPLE, count), maxlen=0)
        except InvalidInput:
            continue  # what is refused is told by `stages.check`
        if count.bad:
            of = f"{'the first ' if count.sampled else ''}{count.rows} rows"
            first = count.as_record(context.folder)["first_dropped"][0]
            found.append(f"{count.bad} of {of} of {source.label} will be left out; the first is {first}")
    return "; ".join(found) or None


def rank_beyond_use(stage: ObjectiveSpec, context: Context) -> str | None:
    """An update with more parameters than its matrix saves nothing."""
    useful = useful_rank(stage, context)
    if useful is None or not isinstance(stage.method, LowRank) or stage.method.rank <= useful[1]:
        return None
    name, most, (rows, columns) = useful
    return (
        f"above rank {most}, the update of {name} ({rows} x {columns}) has more parameters than the matrix itself; "
        "use a smaller rank, name larger target_modules, or train whole matrices with spectrum or full"
    )


def release_rounds_the_update(stage: ObjectiveSpec, context: Context) -> str | None:
    """Small updates fall between two numbers of a narrow dtype."""
    dtype, rate = context.pipeline.model.dtype, stage.train.learning_rate
    if not context.is_last or not stage.method.mergeable or not _is_adapter(stage):
        return None
    if rate > ROUNDED_BELOW.get(dtype, 0):
        return None
    return (
        f"at a learning rate of {rate:g}, the release's cast to {dtype} rounds away a large part of what was learned "
        "(bfloat16: 40% of LoRA's update at 5e-5, 91% at 5e-6); write model.dtype: float32, or let gates judge it"
    )


def weights_round_the_last_stage(stage: ObjectiveSpec, context: Context) -> str | None:
    """Holding the start in bfloat16 rounds what the stage before taught it."""
    before, dtype = context.previous, stage.train.weights_dtype
    # Methods that quantise hold the rest in float32.
    if before is None or _quantises(stage) or before.train.learning_rate > ROUNDED_BELOW.get(dtype, 0):
        return None
    return (
        f"weights_dtype {dtype} rounds away a large part of what stage {before.name} learned at a learning rate of "
        f"{before.train.learning_rate:g}, and the merge keeps the rounded weights; remove weights_dtype"
    )


def quantised_once_more(stage: ObjectiveSpec, context: Context) -> str | None:
    """The merge of a quantised stage lies on the grid of its base, and the next quantisation rounds back to it."""
    before = context.previous
    if before is None or before.method.kind != "qlora" or not before.method.exact_merge:
        return None
    same_grid = getattr(stage.method, "quantization", None) == getattr(before.method, "quantization", None)
    if not same_grid:
        return None
    return (
        f"method {stage.method.kind} quantises a start whose base stage {before.name} had quantised already: what was "
        "learned there is mostly rounded away again; use qa_lora in both, whose merge survives, or a method on "
        "unquantised weights in one of the two"
    )


def vera_at_a_small_rate(stage: ObjectiveSpec, context: Context) -> str | None:
    """VeRA's vectors are multiplied by small random matrices."""
    rate = stage.train.learning_rate
    if stage.method.kind != "vera" or rate >= VERA_RATE:
        return None
    return f"method vera hardly moves at a learning rate of {rate:g}; use one 10 to 100 times as large as for lora"


def experts_stay_frozen(stage: ObjectiveSpec, context: Context) -> str | None:
    """Most weights of a mixture of experts are out of an adapter's reach."""
    if context.layout is None or not context.layout.is_moe or not _is_adapter(stage):
        return None
    total = sum(matrix.size for matrix in context.layout.matrices)
    experts = sum(matrix.size for matrix in context.layout.matrices if matrix.expert is not None)
    return (
        f"the experts, {100 * experts / total:.0f}% of the weights inside the layers, stay frozen: method "
        f"{stage.method.kind} adapts linear modules; methods full and spectrum train them"
    )


def groups_that_hold_everything(stage: ObjectiveSpec, context: Context) -> str | None:
    """A group as long as the sequence is full attention."""
    size, length = getattr(stage.method, "group_size", None), stage.train.sequence_length
    if stage.method.kind != "longlora" or size is None or size < length:
        return None
    return (
        f"a group of {size} tokens holds a whole sequence of {length}: attention is not sparse, and training as slow "
        "as without groups; remove group_size (a quarter of the sequence), or raise train.sequence_length"
    )


def context_that_is_never_trained(stage: ObjectiveSpec, context: Context) -> str | None:
    """Positions beyond the longest sequence are interpolated and never seen."""
    wanted, length = getattr(stage.method, "context_length", None), stage.train.sequence_length
    if wanted is None or wanted <= length:
        return None
    return (
        f"context_length {wanted} stretches the rope, and no sequence is longer than {length}: what it is stretched "
        "for is never trained; raise train.sequence_length to it"
    )


ADVICE = (
    Advice(("method", "rank"), low_rank_in_cpt, BIDERMAN),
    Advice(("method", "alpha"), alpha_far_from_twice_the_rank, BIDERMAN),
    Advice(("data",), rows_left_out, LEFT_OUT),
    Advice(("train", "epochs"), many_passes_over_a_small_set, OUYANG),
    Advice(("method", "rank"), rank_beyond_use, HU),
    Advice(("train", "learning_rate"), release_rounds_the_update, ROUNDING),
    Advice(("train", "weights_dtype"), weights_round_the_last_stage, ROUNDING),
    Advice(("method", "kind"), quantised_once_more, REQUANTISING),
    Advice(("train", "learning_rate"), vera_at_a_small_rate, KOPICZKO),
    Advice(("method", "target_modules"), experts_stay_frozen, EXPERTS),
    Advice(("method", "group_size"), groups_that_hold_everything, CHEN),
    Advice(("method", "context_length"), context_that_is_never_trained, CHEN),
)
"""All advice on stages there is."""


def useful_rank(stage: ObjectiveSpec, context: Context) -> tuple[str, int, tuple[int, int]] | None:
    """The target matrix that allows the smallest useful rank, that rank, and its shape.

    Up to rank r = in x out / (in + out) the two factors have at most as many parameters as the matrix.
    """
    if context.layout is None:
        return None
    matrices = target_matrices(stage.method, context.layout)
    found = [(rows * columns // (rows + columns), name, (rows, columns)) for name, (rows, columns) in matrices.items()]
    if not found:
        return None
    most, name, shape = min(found)
    return name, most, shape


def _is_adapter(stage: ObjectiveSpec) -> bool:
    return getattr(stage.method, "target_modules", None) is not None


def _quantises(stage: ObjectiveSpec) -> bool:
    return "quantization" in type(stage.method).model_fields or stage.method.kind == "qa_lora"


def _rows(stage: ObjectiveSpec, folder: Path) -> float | None:
    """Rows per pass, weights applied; None where a source is not on disk or cannot be read. Stops at the bound."""
    total = 0.0
    for source in stage.data:
        if source.path is None:
            return None
        try:
            rows = read_source(source, folder, stage.normalise, SMALL_SET)
            total += source.weight * sum(1 for _ in islice(rows, SMALL_SET))
        except InvalidInput:
            return None
        if total >= SMALL_SET:
            break
    return total


def _layout(base: Path | None) -> Layout | None:
    if base is None:
        return None
    try:
        return read_layout(base)
    except InvalidInput:
        return None
