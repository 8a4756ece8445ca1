"""Verdicts: pure functions of gates and measurements. Nothing here trains, evaluates or needs torch."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from specs.gate import GateSpec, absolute
from stages.measure import Measure, difference

ROUNDING = 1e-9
"""Binary fractions: 0.50 - 0.48 is a little more than 0.02, and a gate that allows 0.02 means 0.02."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one gate came to, with the numbers it rests on."""

    gate: str
    """The rule in words."""
    passed: bool
    value: float | None
    reference: float | None
    change: float | None
    standard_error: float | None
    n: int | None
    reason: str
    """One line for people."""

    def as_record(self) -> dict[str, Any]:
        """For verdict files and tables."""
        return asdict(self)


Measured = Callable[[str, str, str | None], Measure | None]
"""(where, metric, measure) -> what was measured there; where is `here`, `base`, `previous` or a stage."""


def judge(gates: tuple[GateSpec, ...], measured: Measured) -> list[Verdict]:
    """One verdict per gate, in the order of the spec."""
    return [_verdict(gate, measured) for gate in gates]


def _verdict(gate: GateSpec, measured: Measured) -> Verdict:
    ours = measured("here", gate.metric_name, gate.measure)
    if ours is None:
        return _refused(gate, "was not measured here")
    if ours.n == 0:
        return _refused(gate, "was measured on no examples")
    if not math.isfinite(ours.value):
        return _refused(gate, f"is {ours.value}")
    if gate.reference is None:
        return _against_threshold(gate, ours)
    theirs = measured(gate.reference, gate.metric_name, gate.measure)
    if theirs is None or not math.isfinite(theirs.value):
        return _refused(gate, f"was not measured on {gate.reference}")
    return _against_model(gate, ours, theirs)


def _refused(gate: GateSpec, why: str) -> Verdict:
    return Verdict(str(gate), False, None, None, None, None, None, f"{gate.metric} {why}")


def _against_threshold(gate: GateSpec, ours: Measure) -> Verdict:
    margin = _margin(gate, ours.standard_error)
    if margin is None:
        return _refused(gate, "has no standard error, and the gate asks for one")
    if gate.at_least is not None:
        threshold, passed, sign = gate.at_least, ours.value - margin >= gate.at_least, ">="
    else:
        threshold = gate.at_most if gate.at_most is not None else math.nan
        passed, sign = ours.value + margin <= threshold, "<="
    noise = f" with {margin:.3g} to spare" if margin else ""
    reason = f"{gate.metric} {ours.value:.4g} {sign if passed else f'not {sign}'} {threshold:g}{noise}"
    return Verdict(
        str(gate), passed, ours.value, threshold, ours.value - threshold, ours.standard_error, ours.n, reason
    )


def _against_model(gate: GateSpec, ours: Measure, theirs: Measure) -> Verdict:
    change, error = difference(ours, theirs)
    gain = change if ours.better == "higher" else -change
    margin = _margin(gate, error)
    if margin is None:
        return _refused(gate, "has no standard error, and the gate asks for one")
    slack = ROUNDING * max(1.0, abs(theirs.value))
    if gate.improves_on is not None:
        needed = absolute(gate.by, theirs.value)
        passed = gain >= needed - slack and gain > margin
        wanted = f"needed a gain of {needed:.3g}" + (f" and more than {margin:.3g}" if margin else "")
    else:
        allowed = absolute(gate.within, theirs.value)
        passed = gain - margin >= -allowed - slack
        wanted = f"allowed a loss of {allowed:.3g}" + (f" less {margin:.3g}" if margin else "")
    word = "better" if gain >= 0 else "worse"
    reason = (
        f"{gate.metric} {ours.value:.4g} is {abs(gain):.3g} {word} than {theirs.value:.4g} ({gate.reference}); {wanted}"
    )
    return Verdict(str(gate), passed, ours.value, theirs.value, change, error, ours.n, reason)


def _margin(gate: GateSpec, error: float | None) -> float | None:
    """How far beyond the threshold the value must be, or None where that cannot be told."""
    if gate.noise == 0:
        return 0.0
    return None if error is None or not math.isfinite(error) else gate.noise * error
