"""Verdicts: pure functions of gates and measurements. Nothing here trains, evaluates or needs torch."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any, Literal

from specs.gate import CONFIDENCE, GateSpec, share
from stages.interval import FEWEST, Interval, count_differing, counted, reported, resampled
from stages.measure import Measure

ROUNDING = 1e-9
"""Binary fractions: 0.50 - 0.48 is a little more than 0.02, and a gate that allows 0.02 means 0.02."""
DIGITS = 6
"""Significant ones of an interval in a verdict: fewer than what two machines agree on."""
SCALES = ({0.0, 1.0}, {0.0, 0.5, 1.0})
"""Values of an example that are counted, not resampled: missed and hit, and a tie between them."""

Outcome = Literal["passed", "failed", "undecided"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one gate came to, with the numbers it rests on."""

    gate: str
    """The rule in words."""
    outcome: Outcome
    """`undecided`: the sample is too small to tell. It does not pass."""
    value: float | None = None
    reference: float | None = None
    """What the value is compared with: the other model's value, or the threshold."""
    difference: float | None = None
    """value - reference, in the metric's unit."""
    low: float | None = None
    """The difference is at least this with the gate's confidence, or with 95% where the value alone is judged."""
    high: float | None = None
    """The difference is at most this, as sure as that."""
    required: float | None = None
    """The difference that is just good enough."""
    margin: float | None = None
    """How far the value is beyond what is just good enough, in the metric's unit; below 0 it falls short."""
    confidence: float | None = None
    """None where the value alone is judged. Among several attempts it is more than the gate says: see `shared`."""
    n: int | None = None
    enough: int | None = None
    """Examples that would decide what is undecided; None where no number would."""
    reason: str = ""
    """One line for people."""

    @property
    def passed(self) -> bool:
        """Whether the next stage may start on account of this gate."""
        return self.outcome == "passed"

    def as_record(self) -> dict[str, Any]:
        """For verdict files and tables."""
        return asdict(self)


Measured = Callable[[str, str, str | None], Measure | None]
"""(where, metric, measure) -> what was measured there; where is `here`, `base`, `previous` or a stage."""


@dataclass(frozen=True, slots=True)
class _Claim:
    """What a gate says, so that more is always better: a mean of sign x (ours - factor x theirs) reaches threshold."""

    ours: Measure
    theirs: Measure | None
    reference: float
    sign: int
    factor: float
    threshold: float
    needed: float
    """The gain over the reference that is just good enough; a loss that is allowed is a negative one."""

    @property
    def gain(self) -> float:
        return self.sign * (self.ours.value - self.reference)


_resampled = lru_cache(maxsize=256)(resampled)
"""One command judges a gate several times: to plan, to record the verdict, to show it."""


def judge(gates: tuple[GateSpec, ...], measured: Measured, attempts: int = 1) -> list[Verdict]:
    """One verdict per gate, in the order of the spec.

    Args:
        gates: the stage's.
        measured: looks a measure up.
        attempts: at the stage that are planned; each gate's doubt is shared by them.
    """
    verdicts = []
    for gate in gates:
        verdict = _verdict(shared(gate, attempts), measured)
        if attempts > 1 and gate.confidence is not None:
            said = f"{verdict.reason}; {attempts} attempts share the doubt of {100 * gate.confidence:.4g}%"
            verdict = replace(verdict, reason=said)
        verdicts.append(verdict)
    return verdicts


def shared(gate: GateSpec, attempts: int) -> GateSpec:
    """The gate as each of several attempts is judged by it: 1 - confidence is divided by their number (Bonferroni).

    Whichever attempt is taken, and however often was tried: that any of them passes wrongly happens no more often than
    the confidence allows a single one.
    """
    if gate.confidence is None or attempts == 1:
        return gate
    return gate.model_copy(update={"confidence": 1 - (1 - gate.confidence) / attempts})


def preference(verdicts: Sequence[Verdict]) -> tuple[int, float]:
    """What attempts at a stage are ordered by, the best being largest: gates passed, then the first one's margin."""
    margin = verdicts[0].margin if verdicts else None
    return sum(one.passed for one in verdicts), -math.inf if margin is None else margin


def _verdict(gate: GateSpec, measured: Measured) -> Verdict:
    ours = measured("here", gate.metric_name, gate.measure)
    if ours is None:
        return _refused(gate, "was not measured here")
    if ours.n == 0:
        return _refused(gate, "was measured on no examples")
    if not math.isfinite(ours.value):
        return _refused(gate, f"is {ours.value}")
    if gate.reference is None:
        claim = _above_threshold(gate, ours)
    else:
        theirs = measured(gate.reference, gate.metric_name, gate.measure)
        if theirs is None or theirs.n == 0 or not math.isfinite(theirs.value):
            return _refused(gate, f"was not measured on {gate.reference}")
        claim = _beside_model(gate, ours, theirs)
    return _judged(gate, claim)


def interval_of(measure: Measure, confidence: float) -> tuple[float, float] | None:
    """Between which values a measure lies by itself with a confidence, two-sided; None where its noise is unknown.

    Args:
        measure: what was measured on one model.
        confidence: of the interval: 0.95 leaves 2.5% beyond each end.
    """
    if measure.n == 0 or not math.isfinite(measure.value):
        return None
    alone = GateSpec(metric="value", at_least=0.0, confidence=(1 + confidence) / 2)
    claim = _above_threshold(alone, measure)
    found = _from_examples(alone, claim) if measure.numerators else _from_errors(alone, claim)
    if found is None or not (math.isfinite(found.low) and math.isfinite(found.high)):
        return None
    return found.low, found.high


def _refused(gate: GateSpec, why: str) -> Verdict:
    return Verdict(str(gate), "failed", confidence=gate.confidence, reason=f"{gate.metric} {why}")


def _above_threshold(gate: GateSpec, ours: Measure) -> _Claim:
    sign = 1 if gate.at_least is not None else -1
    threshold = gate.at_least if gate.at_least is not None else gate.at_most
    assert threshold is not None  # noqa: S101 - the spec has one rule
    return _Claim(ours, None, threshold, sign, factor=0.0, threshold=sign * threshold, needed=0.0)


def _beside_model(gate: GateSpec, ours: Measure, theirs: Measure) -> _Claim:
    """A share of the reference is as noisy as the reference, so it is put on its side of the comparison."""
    sign = 1 if ours.better == "higher" else -1
    amount, direction = (gate.by, 1) if gate.improves_on is not None else (gate.within, -1)
    part = share(amount)
    if part is None:
        needed = direction * float(amount)
        return _Claim(ours, theirs, theirs.value, sign, factor=1.0, threshold=needed, needed=needed)
    part *= direction * math.copysign(1, theirs.value)
    return _Claim(ours, theirs, theirs.value, sign, factor=1 + sign * part, threshold=0.0, needed=part * theirs.value)


def _judged(gate: GateSpec, claim: _Claim) -> Verdict:
    paired = claim.ours.numerators and (claim.theirs is None or claim.ours.is_paired_with(claim.theirs))
    interval = _from_examples(gate, claim) if paired else _from_errors(gate, claim)
    slack = ROUNDING * max(1.0, abs(claim.reference))
    least = claim.needed - slack
    if gate.improves_on is not None and claim.needed == 0:
        least = math.nextafter(0, 1)  # as good as the reference is no improvement
    if gate.confidence is None:
        outcome: Outcome = "passed" if claim.gain >= least else "failed"
    elif interval is not None:
        shift = claim.needed - claim.threshold
        outcome = _decided(interval.low + shift, interval.high + shift, least)
    else:
        return _refused(
            gate,
            "has neither results per example nor a standard error, so its noise is unknown: gate another measure, or "
            "write `confidence: null` to judge the value alone",
        )
    return _stated(gate, claim, interval, outcome)


def _decided(low: float, high: float, least: float) -> Outcome:
    if low >= least:
        return "passed"
    return "failed" if high < least else "undecided"


def _from_examples(gate: GateSpec, claim: _Claim) -> Interval:
    """The interval of the mean that the claim is about."""
    ours, theirs = claim.ours, claim.theirs
    confidence = gate.confidence or CONFIDENCE

    def combined(mine: float, other: float) -> float:
        return claim.sign * (mine - claim.factor * other)

    others = ours.numerators if theirs is None else theirs.numerators
    rows = [row for row in zip(ours.numerators, others, ours.weights, strict=True) if any(row)]
    tops = [combined(mine, other) for mine, other, _ in rows]
    weights = [weight for _, _, weight in rows]
    found = {number for mine, other, _ in rows for number in (mine, other)}
    scale = next((one for one in SCALES if found <= one), None)
    in_bounds = set(weights) == {1.0} and min(found) >= 0 and max(found) <= 1
    if in_bounds and (scale is not None or count_differing(tops) < FEWEST):
        possible = {combined(mine, other) for mine in scale or SCALES[0] for other in scale or SCALES[0]}
        shares = dict.fromkeys(sorted(possible | set(tops)), 0.0)
        for top, count in Counter(tops).items():
            shares[top] = count / len(rows)
        interval = counted(shares, len(rows), claim.threshold, confidence)
    else:
        interval = _resampled(tuple(tops), tuple(weights), claim.threshold, confidence)
    if interval.enough is None or len(rows) == ours.n:
        return interval
    return replace(interval, enough=math.ceil(interval.enough * ours.n / len(rows)))  # some examples never count


def _from_errors(gate: GateSpec, claim: _Claim) -> Interval | None:
    """The interval from the standard errors that a library states, or None where it states none."""
    errors = [claim.ours.standard_error, 0.0 if claim.theirs is None else claim.theirs.standard_error]
    if any(error is None or not math.isfinite(error) for error in errors):
        return None
    mine, other = (float(error or 0.0) for error in errors)
    value = claim.sign * (claim.ours.value - (0.0 if claim.theirs is None else claim.factor * claim.theirs.value))
    error = math.hypot(mine, claim.factor * other)
    return reported(value, error, claim.ours.n, claim.threshold, gate.confidence or CONFIDENCE)


def _stated(gate: GateSpec, claim: _Claim, interval: Interval | None, outcome: Outcome) -> Verdict:
    shift = claim.needed - claim.threshold
    ends = [] if interval is None else sorted(claim.sign * (end + shift) for end in (interval.low, interval.high))
    low, high = ends or (-math.inf, math.inf)
    enough = None
    if outcome == "undecided" and interval is not None and interval.enough is not None:
        enough = max(interval.enough, claim.ours.n + 1)
    return Verdict(
        gate=str(gate),
        outcome=outcome,
        value=claim.ours.value,
        reference=claim.reference,
        difference=claim.ours.value - claim.reference,
        low=_short(low),
        high=_short(high),
        required=_short(claim.sign * claim.needed),
        margin=_short(claim.gain - claim.needed),
        confidence=gate.confidence,
        n=claim.ours.n,
        enough=enough,
        reason="; ".join(_reason(gate, claim, (low, high), outcome, enough)),
    )


def _short(number: float) -> float | None:
    return float(f"{number:.{DIGITS}g}") if math.isfinite(number) else None


def _reason(
    gate: GateSpec, claim: _Claim, ends: tuple[float, float], outcome: Outcome, enough: int | None
) -> list[str]:
    ours, sure = claim.ours, f"at {100 * (gate.confidence or CONFIDENCE):.4g}%"
    over = f"over {ours.n:,} example{'' if ours.n == 1 else 's'}"
    if claim.theirs is None:
        rule = f"at {'least' if claim.sign > 0 else 'most'} {claim.reference:g}"
        verb = {"passed": "is", "failed": "is not", "undecided": "may be"}[outcome]
        parts = [f"{gate.metric} {ours.value:.4g} {verb} {rule}"]
        if any(map(math.isfinite, ends)):
            low, high = (claim.reference + end for end in ends)
            parts.append(f"{low:.3g} to {high:.3g} {sure} {over}")
    else:
        word, turn = ("better", claim.sign) if claim.gain >= 0 else ("worse", -claim.sign)
        low, high = sorted(turn * end for end in ends)
        spread = "" if not any(map(math.isfinite, ends)) else f", {low:.3g} to {high:.3g} {sure} {over}"
        parts = [
            f"{gate.metric} {ours.value:.4g} is {abs(claim.gain):.3g} {word} than {claim.theirs.value:.4g} "
            f"({gate.reference}){spread}",
            _wanted(gate, claim.needed),
        ]
    if gate.confidence is None:
        parts.append("the value alone was judged")
    if outcome == "undecided":
        parts.append(f"undecided: {_remedy(gate, claim, ends, enough)}")
    return parts


def _wanted(gate: GateSpec, needed: float) -> str:
    if gate.improves_on is not None:
        return f"needed a gain of {needed:.3g}" if needed else "needed a gain"
    return f"allowed a loss of {-needed:.3g}" if needed else "allowed no loss"


def _remedy(gate: GateSpec, claim: _Claim, ends: tuple[float, float], enough: int | None) -> str:
    if enough is not None and not any(map(math.isfinite, ends)):
        return (
            f"too few of {claim.ours.n:,} examples differ to know how much they vary, about {_about(enough):,} may do"
        )
    if enough is not None:
        return f"about {_about(enough):,} examples would decide"
    if gate.keeps is not None and not claim.needed:
        return "no number of examples shows that nothing at all is lost: allow a loss with `within`"
    return "it is too close to what is asked for any number of examples to decide"


def _about(count: int) -> int:
    """Two digits, rounded up."""
    unit = int(10 ** max(0, len(str(count)) - 2))
    return -(-count // unit) * unit
