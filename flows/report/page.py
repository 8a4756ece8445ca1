"""The page: facts and charts, put together and written."""

import math
import os
from collections.abc import Callable
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.report import charts, facts
from flows.summary import counted, summarise
from specs.printable import printable
from specs.secrets import redact
from stages.diagnostics.update import in_words, told
from stages.documents import write_text
from stages.pipeline import spec_as_run
from stages.plan import Plan

if TYPE_CHECKING:
    from jinja2 import Template

REPORT = "report.html"
"""The newest report, in the folder of a pipeline's artifacts."""
REPORTS = "reports"
"""Those of all runs, by the time of their end."""
_GOOD = {"passed", "approved", "released", "made", "kept"}
_BAD = {"refused", "failed", "rejected"}
_SECTIONS = (
    ("gates", "Gates"), ("metrics", "Measurements"), ("curves", "Training"), ("maps", "Spectrum"),
    ("updates", "Updates"), ("data", "Data"), ("samples", "Samples"), ("costs", "Cost"), ("lineage", "Lineage"),
)  # fmt: skip
_PLACES = {"curves": "training", "maps": "spectrum", "costs": "cost"}


def write_report(plan: Plan, spec: Path, file: Path | None = None) -> Path:
    """Write the report of a plan and return where it is.

    Args:
        plan: as it stands.
        spec: the file that it was read from.
        file: where to; by default beside the artifacts.

    Raises:
        OSError: it cannot be written.
    """
    place = plan.store / REPORT if file is None else file
    write_text(place, html_of(plan, spec))
    return place


def keep_report(plan: Plan, spec: Path) -> Path:
    """Write the report of a run: one of its own, and the pipeline's newest.

    Raises:
        OSError: it cannot be written.
    """
    newest, text = plan.store / REPORT, html_of(plan, spec)
    for place in (newest, plan.store / REPORTS / f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}.html"):
        write_text(place, text)
    return newest


def html_of(plan: Plan, spec: Path) -> str:
    """The report as one HTML page, without a script and without anything from elsewhere."""
    text = _template("page.html.jinja").render(_values(plan, spec))
    return redact(text, os.environ)


@cache
def _template(name: str) -> "Template":
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined, finalize=_shown
    )
    environment.globals |= {"tone": _tone, "counted": counted}
    return environment.from_string(Path(__file__).with_name(name).read_text(encoding="utf-8"))


def _shown(value: Any) -> Any:
    """A text of others as the page may have it, before it is escaped: a secret with an & would not be found after."""
    from markupsafe import Markup

    return printable(redact(value, os.environ)) if type(value) is str and not isinstance(value, Markup) else value


def _sound(make: Callable[..., Any], *given: Any) -> Any:
    """What ``make`` draws of a document; None where the document is damaged or of another version."""
    from jinja2 import TemplateError

    try:
        return make(*given)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, TemplateError):
        return None


def _values(plan: Plan, spec: Path) -> dict[str, Any]:
    from markupsafe import Markup

    chain, stages = facts.chain(plan), facts.stages(plan)
    summary, trade = summarise(plan), facts.trade(plan)
    values: dict[str, Any] = {
        "name": plan.pipeline.name,
        "chain": chain,
        "outcome": _outcome(plan, chain) if not summary.withheld else f"No model: {summary.withheld}",
        "written": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "gates": [(name, verdict, _bar(verdict, Markup)) for name, verdict in summary.verdicts],
        "decisions": summary.decisions,
        "metrics": (summary.columns, summary.metrics),
        "released": (("", *summary.release_columns[1:]), summary.release_metrics),
        "trade": trade,
        "trade_chart": None if trade is None else Markup(charts.scatter(trade.points, trade.x, trade.y)),  # noqa: S704
        "curves": [(stage.name, Markup(loss_chart(stage))) for stage in stages if stage.curve],  # noqa: S704
        "maps": [
            (stage.name, Markup(chart))  # noqa: S704
            for stage in stages
            if stage.spectrum and (chart := _sound(spectrum_chart, stage)) is not None
        ],
        "updates": [one for stage in stages if (one := _sound(_update, stage, Markup)) is not None],
        "cosines": next((one for stage in reversed(stages) if (one := _sound(_cosines, stage)) is not None), None),
        "data": [one for stage in stages if (one := _sound(_data, stage, Markup)) is not None],
        "samples": facts.samples(plan),
        "costs": facts.costs(plan),
        "lineage": facts.lineage(plan),
        "spec": printable(spec_as_run(plan.pipeline, spec)),
        "chart_style": Markup(charts.STYLE),  # noqa: S704 - ours
    }
    there = [
        (_PLACES.get(name, name), title)
        for name, title in _SECTIONS
        if (values[name] if name != "metrics" else values[name][1])
    ]
    return values | {"sections": [*there, ("spec", "Spec")]}


def pictures(stage: facts.Stage) -> dict[str, tuple[str, str]]:
    """What of a stage can be drawn: by a short name, its title and the chart."""
    found = {}
    if stage.curve:
        found["loss"] = ("training loss and learning rate", loss_chart(stage))
    if stage.spectrum and (chart := _sound(spectrum_chart, stage)) is not None:
        found["spectrum"] = ("which weight matrices Spectrum trained", chart)
    if (chart := _sound(update_chart, stage)) is not None:
        found["update"] = ("what training changed, by layer and module type", chart)
    return found


def loss_chart(stage: facts.Stage) -> str:
    """Loss and learning rate of a stage."""
    entries = stage.curve
    return charts.curves(
        [int(one["step"]) for one in entries],
        [one["loss"] for one in entries],
        [one["rate"] for one in entries],
        stage.name,
    )


def spectrum_chart(stage: facts.Stage) -> str:
    """Ranks of all matrices, and those that Spectrum trains; of the experts of a layer the best one shows."""
    rows = stage.spectrum
    sizes: dict[str, int] = {}
    best: dict[tuple[str, int], dict[str, Any]] = {}
    for row in rows:
        sizes[row["type"]] = sizes.get(row["type"], 0) + 1
        place = (row["type"], row["layer"])
        if place not in best or row["rank"] < best[place]["rank"]:
            best[place] = row | {"selected": row["selected"] or best.get(place, {}).get("selected", False)}
    cells = [
        charts.Cell(
            kind, layer, 1 - (row["rank"] - 1) / sizes[kind], bool(row["selected"]),
            f"{row['module']}: rank {row['rank']} of {sizes[kind]}{', trained' if row['selected'] else ''}",
        )
        for (kind, layer), row in best.items()
    ]  # fmt: skip
    chosen = sum(bool(row["selected"]) for row in rows)
    return charts.heat(cells, f"{stage.name}: {chosen} of {len(rows)} matrices were trained")


def update_chart(stage: facts.Stage) -> str | None:
    """Relative size of the update by layer and module type; None where no matrix changed.

    Of the experts of a layer the one that moved most shows: a page holds thousands of them, one upon the other.
    """
    rows = [row for row in (stage.update or {}).get("matrices", ()) if row["relative_norm"] is not None]
    if not rows:
        return None
    most: dict[tuple[str, int], dict[str, Any]] = {}
    for row in sorted(rows, key=lambda row: float(row["relative_norm"])):
        place = (row["type"], row["layer"])
        most[place] = row | {"planned": row["planned"] or most.get(place, row)["planned"]}
    largest = rows[0]["relative_norm"] if len(rows) == 1 else max(row["relative_norm"] for row in rows)
    cells = [
        charts.Cell(
            kind, layer, row["relative_norm"] / (largest or 1.0), bool(row["planned"]),
            f"{row['name']}: {100 * row['relative_norm']:.3g}% of its norm",
        )
        for (kind, layer), row in most.items()
    ]  # fmt: skip
    return charts.heat(cells, f"{stage.name}: size of the update by layer, at most {100 * largest:.3g}% of a matrix")


def _data(stage: facts.Stage, markup: Any) -> Any:
    if stage.data is None:
        return None
    return markup(_template("data.html.jinja").render(stage=stage.name, report=stage.data))


def _cosines(stage: facts.Stage) -> dict[str, Any] | None:
    found = (stage.update or {}).get("lineage")
    if not found:
        return None
    rows = [[None if one is None else float(one) for one in row] for row in found["cosines"]]
    return {"rows": list(zip(found["names"], rows, strict=True)), "from_base": float(found["relative_from_base"])}


def _update(stage: facts.Stage, markup: Any) -> dict[str, Any] | None:
    found = stage.update
    if found is None:
        return None
    chart = update_chart(stage)
    types = sorted(found.get("types", {}).items(), key=lambda pair: -pair[1])
    intruders = told(found, "intruders")
    listed = [
        ("matrices changed", f"{len(found['matrices'])} of {len(found['matrices']) + found.get('unchanged', 0)}"),
        ("norm", f"{found.get('norm', 0.0):.4g} ({100 * found.get('relative_norm', 0.0):.3g}% of the weights)"),
        ("effective rank", _spread(told(found, "effective_rank"))),
        ("stable rank", _spread(told(found, "stable_rank"))),
        (
            "intruders",
            f"{sum(intruders)} in {sum(map(bool, intruders))} of {len(intruders)} matrices" if intruders else "–",
        ),
        ("outside the layers", f"{100 * found.get('outside', 0.0):.3g}% of the squared norm"),
    ]
    if found.get("unplanned") is not None:
        listed.append(("outside what was to train", f"{100 * found['unplanned']:.3g}%"))
    if found.get("rounding"):
        listed.append(("what quantising changed", f"{found['rounding']['norm']:.4g}"))
    return {
        "stage": stage.name,
        "words": in_words(found),
        "against": found["against"] if found["against"] != "start" else "",
        "heat": None if chart is None else markup(chart),
        "marked": any(row["planned"] for row in found["matrices"]),
        "types": markup(charts.bars(types, f"{stage.name}: share of the update by module type")),
        "facts": listed,
    }


def _spread(known: list[float]) -> str:
    if not known:
        return "–"
    return f"{known[len(known) // 2]:.3g} in the middle, {known[0]:.3g} to {known[-1]:.3g}"


def _bar(verdict: Any, markup: Any) -> Any:
    ends = (verdict.low, verdict.high, verdict.required)
    if None in ends or any(math.isnan(end) for end in ends):
        return None
    return markup(charts.interval(verdict.low, verdict.high, verdict.required, verdict.outcome))


def _outcome(plan: Plan, chain: list[facts.Link]) -> str:
    """The one sentence at the top: of attempts, the one that the chain goes on with counts."""
    own = {step.title for step in plan.steps}
    chain = [link for link in chain if link.name in own]
    for link in chain:
        if link.state in ("refused", "undecided", "rejected"):
            return f"Stopped at {link.name}: its gates do not let it pass"
        if link.state == "waiting":
            return f"Waits for a person's decision on {link.name}"
    missing = next((link.name for link in chain if link.state in ("missing", "unmeasured")), None)
    if missing is not None:
        return f"Not finished: {missing} is next"
    warned = [link.name for link in chain if link.state == "warned"]
    return "Released" + (f", with a warning at {', '.join(warned)}" if warned else "")


def _tone(state: str) -> str:
    return "good" if state in _GOOD else "bad" if state in _BAD else "" if state == "missing" else "open"
