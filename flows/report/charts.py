"""Charts as SVG, in one way for the page and for the pictures in Prefect.

Colours are classes with a light and a dark value each, chosen by the reader's own setting; a chart that has to stand
alone carries the style inside it. No chart tells anything by colour only: there is a mark, a place or a number too.
"""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

STYLE = """\
.ink{fill:var(--ink,#1c2024)}.soft{fill:var(--soft,#5b6570)}.line{stroke:var(--line,#d5dae0);fill:none}
.one{stroke:var(--one,#1f6feb);fill:none}.two{stroke:var(--two,#9a6700);fill:none}.dot{fill:var(--one,#1f6feb)}
.passed{fill:var(--passed,#1a7f37);stroke:var(--passed,#1a7f37)}.failed{fill:var(--failed,#cf222e);stroke:var(--failed,#cf222e)}
.undecided{fill:var(--undecided,#9a6700);stroke:var(--undecided,#9a6700)}.heat{fill:var(--one,#1f6feb)}
.frame{stroke:var(--ink,#1c2024);fill:none}text{font:12px system-ui,sans-serif}"""
"""Classes of charts; the page gives the variables their values."""
_ALONE = (
    "@media(prefers-color-scheme:dark){svg{--ink:#e6e9ec;--soft:#9aa4ae;--line:#3a424b;--one:#6ea8fe;--two:#d4a72c;"
    "--passed:#57ab5a;--failed:#ff7b72;--undecided:#d4a72c}}"
)
_LEFT, _BOTTOM, _TOP, _RIGHT = 58, 40, 14, 18
"""Room around the plotting area, in pixels."""
_HUGE, _TINY = 1e300, 1e-300
"""What is larger has no place on a scale, and what is smaller no scale of its own."""


@dataclass(frozen=True, slots=True)
class Point:
    """A model in the plane of what it learned and what it kept."""

    name: str
    x: float
    y: float
    x_error: float
    """Half of the 95% interval."""
    y_error: float


@dataclass(frozen=True, slots=True)
class Axis:
    """What is drawn along a side."""

    label: str
    upward: bool
    """Whether larger numbers are better; if not, the axis is turned round, so that better is always up or right."""


def scatter(points: Sequence[Point], x: Axis, y: Axis) -> str:
    """Learning against forgetting: a point for the base and each stage, in order, joined by a line."""
    width, height = 620, 380
    points = [replace(p, x_error=_drawable(p.x_error), y_error=_drawable(p.y_error)) for p in points]
    across = _scale([p.x - p.x_error for p in points] + [p.x + p.x_error for p in points], _LEFT, width - _RIGHT, x)
    up = _scale([p.y - p.y_error for p in points] + [p.y + p.y_error for p in points], height - _BOTTOM, _TOP, y)
    parts = [_grid_x(across, height), _grid_y(up, width)]
    track = " ".join(f"{across(p.x):.1f},{up(p.y):.1f}" for p in points)
    parts.append(f'<polyline class="line" points="{track}"/>')
    for number, p in enumerate(points):
        at_x, at_y = across(p.x), up(p.y)
        parts += [
            f'<path class="one" d="M{across(p.x - p.x_error):.1f} {at_y:.1f}H{across(p.x + p.x_error):.1f}"/>',
            f'<path class="one" d="M{at_x:.1f} {up(p.y - p.y_error):.1f}V{up(p.y + p.y_error):.1f}"/>',
            f'<circle class="dot" cx="{at_x:.1f}" cy="{at_y:.1f}" r="5"/>',
        ]
        left = at_x > width * 0.7 if number % 2 else at_x > width * 0.85
        above = number % 2 == 0
        parts.append(
            _text(
                at_x + (-9 if left else 9), at_y + (-9 if above else 18), f"{number} {p.name}",
                "ink", "end" if left else "start",
            )
        )  # fmt: skip
    parts.append(_text((width + _LEFT) / 2, height - 4, f"{x.label} (better to the right)", "soft", "middle"))
    parts.append(_upright(14, (height - _BOTTOM) / 2, f"{y.label} (better is up)"))
    listed = "; ".join(f"{p.name}: {p.x:.4g}, {p.y:.4g}" for p in points)
    return _svg(width, height, parts, f"{x.label} against {y.label}. {listed}")


def _drawable(error: float) -> float:
    """Half of an interval; 0 where it is no number or has no end."""
    return error if abs(error) < _HUGE else 0.0


def curves(steps: Sequence[int], losses: Sequence[float], rates: Sequence[float], label: str) -> str:
    """Training loss over the steps, and the learning rate as a dashed line on a scale of its own."""
    width, height = 620, 240
    highest = max((rate for rate in rates if math.isfinite(rate)), default=0.0)
    across = _scale([float(step) for step in steps], _LEFT, width - 60, None)
    up = _scale(losses, height - _BOTTOM, _TOP, None)
    right = _scale([0.0, highest], height - _BOTTOM, _TOP, None)
    draw = zip(steps, losses, rates, strict=True)
    places = [(across(step), up(loss), right(rate)) for step, loss, rate in draw]
    parts = [_grid_x(across, height, whole=True), _grid_y(up, width - 42)]
    parts.append(_path([(x, y) for x, _, y in places], "two", 'stroke-dasharray="5 4"'))
    parts.append(_path([(x, y) for x, y, _ in places], "one", 'stroke-width="2"'))
    parts += [
        _text((width + _LEFT) / 2, height - 4, "step", "soft", "middle"),
        _upright(14, (height - _BOTTOM) / 2, "training loss"),
        _text(width - 56, _TOP + 4, f"{highest:.2g}", "soft", "start"),
        _text(width - 56, height - _BOTTOM, "0", "soft", "start"),
        _upright(width - 6, (height - _BOTTOM) / 2, "learning rate (dashed)"),
    ]
    ends = f"from {losses[0]:.4g} to {losses[-1]:.4g}" if losses else "none"
    return _svg(width, height, parts, f"{label}: training loss {ends} in {steps[-1] if steps else 0} steps")


@dataclass(frozen=True, slots=True)
class Cell:
    """A matrix type in a layer."""

    row: str
    column: int
    shade: float
    """From 0 to 1."""
    marked: bool
    said: str
    """What a pointer that rests on it is told."""


def heat(cells: Sequence[Cell], label: str) -> str:
    """Module types over layers: the darker the more, a frame around those that were chosen."""
    rows = sorted({cell.row for cell in cells})
    columns = 1 + max((cell.column for cell in cells), default=0)
    left = 20 + 7 * max((len(row) for row in rows), default=0)
    side = max(7.0, min(22.0, (760 - left) / columns))
    width, height = left + side * columns + 8, 22.0 * len(rows) + 34
    parts = []
    for place, row in enumerate(rows):
        parts.append(_text(left - 8, 22 * place + 20, row, "ink", "end"))
    for cell in cells:
        x, y = left + side * cell.column, 22 * rows.index(cell.row) + 5
        frame = ' class="frame" stroke-width="1.6"' if cell.marked else ' class="line"'
        parts.append(
            f'<g><title>{_safe(cell.said)}</title><rect class="heat" x="{x:.1f}" y="{y}" width="{side - 2:.1f}" '
            f'height="19" fill-opacity="{0.06 + 0.9 * min(1.0, max(0.0, cell.shade)):.2f}"/>'
            f'<rect{frame} x="{x:.1f}" y="{y}" width="{side - 2:.1f}" height="19"/></g>'
        )
    step = max(1, columns // 10)
    for column in range(0, columns, step):
        parts.append(_text(left + side * (column + 0.5) - 1, height - 12, str(column), "soft", "middle"))
    parts.append(_text(left - 8, height - 12, "layer", "soft", "end"))
    return _svg(width, height, parts, label)


def interval(low: float, high: float, required: float, outcome: str) -> str:
    """A difference's interval as a bar, and what was required of it as a tick."""
    width, height = 150, 22
    ends = [low, high, required, 0.0]
    across = _scale(ends, 8, width - 8, None, room=0.06)
    parts = [
        f'<path class="line" d="M{across(0.0):.1f} 2V20" stroke-dasharray="2 2"/>',
        f'<path class="{_word(outcome)}" stroke-width="5" stroke-linecap="round" '
        f'd="M{across(low):.1f} 11H{across(high):.1f}"/>',
        f'<path class="frame" stroke-width="2" d="M{across(required):.1f} 3V19"/>',
    ]
    said = f"difference {low:.4g} to {high:.4g}, required {required:.4g}: {outcome}"
    return _svg(width, height, parts, said, fixed=True)


def bars(shares: Sequence[tuple[str, float]], label: str) -> str:
    """Shares of a whole, the largest first; those that are no numbers are left out."""
    shares = [(name, share) for name, share in shares if math.isfinite(share)]
    left = 20 + 7 * max((len(name) for name, _ in shares), default=0)
    width, height = left + 300, 22 * len(shares) + 6
    largest = max((share for _, share in shares), default=1.0) or 1.0
    parts = []
    for place, (name, share) in enumerate(shares):
        y = 22 * place + 3
        parts += [
            _text(left - 8, y + 14, name, "ink", "end"),
            f'<rect class="dot" x="{left}" y="{y + 2}" width="{230 * share / largest:.1f}" height="15" rx="2"/>',
            _text(left + 230 * share / largest + 6, y + 14, f"{100 * share:.3g}%", "soft", "start"),
        ]
    return _svg(width, height, parts, f"{label}: " + ", ".join(f"{n} {100 * s:.3g}%" for n, s in shares))


def alone(chart: str) -> str:
    """A chart as a picture of its own, for places that know none of the page's style."""
    return chart.replace(">", f"><style>{STYLE}{_ALONE}</style>", 1)


class _Scale:
    def __init__(self, low: float, high: float, start: float, stop: float) -> None:
        self.low, self.high, self._start, self._stop = low, high, start, stop

    def __call__(self, value: float) -> float:
        """Where a value stands; what lies beyond the ends stands at them, what is no number nowhere (nan)."""
        value = min(max(value, min(self.low, self.high)), max(self.low, self.high))
        return self._start + (value - self.low) / (self.high - self.low) * (self._stop - self._start)

    def ticks(self, *, whole: bool = False) -> list[float]:
        """Some four round numbers between the ends."""
        low, high = sorted((self.low, self.high))
        step = 10 ** math.floor(math.log10((high - low) / 4))
        step = next(step * times for times in (1, 2, 5, 10) if (high - low) / (step * times) <= 5)
        if whole:
            step = max(1.0, step)
        first = math.ceil(low / step - 1e-9)
        return [round(number * step, 12) for number in range(first, math.floor(high / step + 1e-9) + 1)]


def _scale(values: Sequence[float], start: float, stop: float, axis: Axis | None, room: float = 0.1) -> _Scale:
    # Beyond what is drawn, the difference of two ends would be no number.
    finite = [value for value in values if abs(value) < _HUGE] or [0.0]
    low, high = min(finite), max(finite)
    more = room * (high - low)
    if more < 1e-12 * max(abs(low), abs(high)) or more < _TINY:  # nothing that a float could part
        more = 0.05 * max(abs(low), abs(high))
        more = more if more > _TINY else 1.0
    low, high = low - more, high + more
    if axis is not None and not axis.upward:
        low, high = high, low
    return _Scale(low, high, start, stop)


def _grid_x(across: _Scale, height: float, *, whole: bool = False) -> str:
    return "".join(
        f'<path class="line" d="M{across(tick):.1f} {_TOP}V{height - _BOTTOM}"/>'
        + _text(across(tick), height - _BOTTOM + 15, f"{tick:g}", "soft", "middle")
        for tick in across.ticks(whole=whole)
    )


def _grid_y(up: _Scale, width: float) -> str:
    return "".join(
        f'<path class="line" d="M{_LEFT} {up(tick):.1f}H{width - _RIGHT}"/>'
        + _text(_LEFT - 6, up(tick) + 4, f"{tick:g}", "soft", "end")
        for tick in up.ticks()
    )


def _path(places: Sequence[tuple[float, float]], kind: str, more: str) -> str:
    """A line through places; where a number is missing it is broken."""
    pieces, pen = [], "M"
    for x, y in places:
        if not (math.isfinite(x) and math.isfinite(y)):
            pen = "M"
            continue
        pieces.append(f"{pen}{x:.1f} {y:.1f}")
        pen = "L"
    return f'<path class="{kind}" {more} d="{"".join(pieces)}"/>'


def _text(x: float, y: float, text: str, kind: str, anchor: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{_safe(text)}</text>'


def _upright(x: float, y: float, text: str) -> str:
    return (
        f'<text class="soft" x="{x:.1f}" y="{y:.1f}" text-anchor="middle" transform="rotate(-90 {x:.1f} {y:.1f})">'
        f"{_safe(text)}</text>"
    )


def _svg(width: float, height: float, parts: Sequence[str], label: str, *, fixed: bool = False) -> str:
    size = f'width="{width:.0f}" height="{height:.0f}"' if fixed else f'style="max-width:{width:.0f}px"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" {size} role="img" '
        f'aria-label="{_safe(label)}">{"".join(parts)}</svg>'
    )


def _safe(text: str) -> str:
    return html.escape(text, quote=True)


def _word(outcome: str) -> str:
    return outcome if outcome in ("passed", "failed", "undecided") else "undecided"
