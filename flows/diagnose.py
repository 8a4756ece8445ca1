"""`trivium diagnose`: what training changed in the weights, stage by stage."""

from collections.abc import Iterable, Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table

from flows.project import Root, SpecFile, root_of
from flows.terminal import err, out
from stages.artifact import Artifact
from stages.diagnostics.update import told
from stages.errors import InvalidInput

_TOP = 3
"""Module types and layers that are named: those where most of the change went."""


def diagnose(spec: SpecFile, *, root: Root = None) -> None:
    """Say what training changed in the weights: how much, where, in how many directions, and what is new there.

    A stage that was published without diagnostics is compared with its start now; nothing else is made anew.
    """
    from flows.engine import Run
    from stages.diagnostics.stage import diagnostics_of

    plan = Run(spec, root_of(spec, root)).plan()
    done = [step for step in plan.steps if step.stage is not None and step.artifact is not None]
    if not done:
        raise InvalidInput(f"{spec}: no stage is published yet; `trivium run {spec}` makes them")
    found: dict[str, Mapping[str, Any]] = {}
    for step in done:
        assert step.artifact is not None  # noqa: S101 - chosen so
        kept = diagnostics_of(step.artifact)
        if kept is None or (kept["depth"] == "norms" and plan.pipeline.diagnostics == "spectra"):
            kept = _now(step.name, step.artifact)
        found[step.name] = kept
    for name, one in found.items():
        if one["reason"] is not None:
            out.print(f"{name}: {one['reason']}", markup=False, soft_wrap=True)
    compared = {name: one for name, one in found.items() if one["reason"] is None}
    if compared:
        out.print(_table(compared))
        _print_cosines(list(compared.values())[-1]["lineage"])


def _now(name: str, artifact: Artifact) -> dict[str, Any]:
    from stages.diagnostics.stage import diagnose_later
    from stages.log import quiet

    with err.status(f"comparing {name} with its start"), quiet():
        return diagnose_later(artifact)


def _table(found: Mapping[str, Mapping[str, Any]]) -> Table:
    table = Table(title="what training changed", title_justify="left")
    table.add_column("")
    for name in found:
        table.add_column(escape(name), justify="right")
    for label, say in _ROWS.items():
        table.add_row(label, *(say(one) for one in found.values()))
    return table


def _size(one: Mapping[str, Any]) -> str:
    return f"{one['norm']:.3g} ({100 * one['relative_norm']:.2g}%)"


def _changed(one: Mapping[str, Any]) -> str:
    return f"{len(one['matrices'])} of {len(one['matrices']) + one['unchanged']}"


def _middle(name: str) -> Any:
    def say(one: Mapping[str, Any]) -> str:
        if not (values := told(one, name)):
            return "–"
        return f"{values[len(values) // 2]:.3g} ({values[0]:.3g} to {values[-1]:.3g})"

    return say


def _intruders(one: Mapping[str, Any]) -> str:
    if not (found := told(one, "intruders")):
        return "–"
    untold = len(one["matrices"]) - len(found)
    beside = f", {untold} matrices not told" if untold else ""
    return f"{sum(found)} in {sum(map(bool, found))} matrices{beside}"


def _most(name: str) -> Any:
    def say(one: Mapping[str, Any]) -> str:
        best = sorted(one[name].items(), key=lambda pair: -pair[1])[:_TOP]
        return "\n".join(f"{escape(kind)} {100 * part:.0f}%" for kind, part in best) or "–"

    return say


def _share(name: str) -> Any:
    return lambda one: "–" if one[name] is None else f"{100 * one[name]:.2g}%"


def _rounding(one: Mapping[str, Any]) -> str:
    return "–" if one["rounding"] is None else f"{one['rounding']['norm']:.3g}"


_ROWS = {
    "norm of the update (of the weights)": _size,
    "matrices changed": _changed,
    "effective rank: median (least to most)": _middle("effective_rank"),
    "stable rank: median (least to most)": _middle("stable_rank"),
    "intruders among the leading directions": _intruders,
    "where it went, by module type": _most("types"),
    "where it went, by layer": _most("layers"),
    "outside the layers": _share("outside"),
    "outside what was to train": _share("unplanned"),
    "norm of what quantising changed": _rounding,
}


def _print_cosines(lineage: Mapping[str, Any]) -> None:
    """How the stages' updates lie to one another: below zero, a later one takes back what an earlier one did."""
    names: Iterable[str] = lineage["names"]
    table = Table(title="cosine between the updates", title_justify="left")
    table.add_column("")
    for name in names:
        table.add_column(escape(name), justify="right")
    for name, row in zip(names, lineage["cosines"], strict=True):
        table.add_row(escape(name), *("–" if one is None else f"{one:+.3f}" for one in row))
    out.print(table)
    out.print(f"from the base: {lineage['from_base']:.3g} ({100 * lineage['relative_from_base']:.2g}% of its norm)")
