"""Pairwise comparison by a judge: what it is asked, how its letters are read, and what is counted of them."""

from collections.abc import Callable, Sequence
from typing import Any

from specs.metric import PLACEHOLDER, JudgeSpec
from stages.errors import StageFailed
from stages.measure import Measure, ratio

MEASURES = ("win_rate", "tie_rate", "consistency", "first_rate", "longer_rate")
DEFAULT = "win_rate"
VERSION = 1
"""Of what is measured and kept."""
UNREADABLE = 0.1
"""The share of replies without a letter above which nothing is measured: such a judge was not understood."""

Ask = Callable[[Sequence[str]], list[str | None]]
"""Questions in, one letter of A, B, C for each out; None where the reply held none."""


def compare(
    spec: JudgeSpec, label: str, ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]], ask: Ask
) -> tuple[dict[str, Measure], dict[str, Any], list[dict[str, Any]]]:
    """Let a judge choose between two models' answers to the same prompts, in both orders (Zheng et al. 2023).

    A pair is won where the judge prefers our answer in both orders, lost where it prefers theirs in both, and tied
    elsewhere: a choice that follows the order is no choice. Two equal answers tie, and nobody is asked.

    Args:
        spec: the metric as the spec has it.
        label: what messages call it.
        ours: the samples that a generation metric kept of this model.
        theirs: those of the other one, for the same prompts in the same order.
        ask: the judge.

    Returns:
        Measures, of which an example is a prompt; what is shown beside them; and each pair with the judge's letters.

    Raises:
        StageFailed: the prompts are not the same, or too many replies could not be read.
    """
    pairs = list(zip(ours[: spec.limit], theirs[: spec.limit], strict=False))
    if len(ours) != len(theirs) or any(own["prompt"] != other["prompt"] for own, other in pairs):
        raise StageFailed(f"metric {label}: the two models answered different prompts; remove their evaluations")
    open_ones = [number for number, (own, other) in enumerate(pairs) if own["answer"] != other["answer"]]
    questions = [
        question(spec.prompt, *order) for number in open_ones for order in (pairs[number], pairs[number][::-1])
    ]
    replies = ask(questions)
    _refuse_unreadable(label, questions, replies)
    letters = {number: (replies[2 * n], replies[2 * n + 1]) for n, number in enumerate(open_ones)}
    points = [_points(letters.get(number, ("C", "C"))) for number in range(len(pairs))]
    samples = [
        {"prompt": own["prompt"], "answer": own["answer"], "other": other["answer"],
         "letters": list(letters.get(number, ())), "points": points[number]}
        for number, (own, other) in enumerate(pairs)
    ]  # fmt: skip
    shown = {
        "prompts": len(pairs),
        "equal": len(pairs) - len(open_ones),
        "asked": len(questions),
        "unreadable": sum(reply is None for reply in replies),
    }
    return _measures(points, letters, pairs), shown, samples


def question(prompt: str, a: dict[str, Any], b: dict[str, Any]) -> str:
    """The judge's prompt with both answers in it; what stands in braces inside them is left as it is.

    Args:
        prompt: with placeholders.
        a: the sample that is shown first.
        b: the other one.
    """
    messages = a["prompt"]
    asked = (
        messages[0]["content"] if len(messages) == 1 else "\n\n".join(f"{m['role']}: {m['content']}" for m in messages)
    )
    values = {"prompt": asked, "answer_a": a["answer"], "answer_b": b["answer"], "reference": a["reference"] or ""}
    return PLACEHOLDER.sub(lambda found: values[found[1]], prompt)


def _points(letters: tuple[str | None, str | None]) -> float:
    """1 where ours won in both orders, 0 where theirs did, 0.5 elsewhere."""
    return {("A", "B"): 1.0, ("B", "A"): 0.0}.get(letters, 0.5)  # type: ignore[arg-type]


def _measures(
    points: list[float],
    letters: dict[int, tuple[str | None, str | None]],
    pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]],
) -> dict[str, Measure]:
    ones = [1.0] * len(points)
    alike = [float(number not in letters or letters[number] in _ALIKE) for number in range(len(points))]
    found = {
        "win_rate": ratio(points, ones, "higher"),
        "tie_rate": ratio([float(point == 0.5) for point in points], ones, "lower"),
        "consistency": ratio(alike, ones, "higher"),
    }
    chosen = [[letter for letter in letters.get(number, ()) if letter in ("A", "B")] for number in range(len(points))]
    if any(chosen):  # of all choices, those for the answer that stood first; a fair judge has half of them
        first = [float(own.count("A")) for own in chosen]
        found["first_rate"] = ratio(first, [float(len(own)) for own in chosen], "lower")
    longer = [_longer_won(point, *pair) for point, pair in zip(points, pairs, strict=True)]
    if any(one is not None for one in longer):
        weights = [float(one is not None) for one in longer]
        found["longer_rate"] = ratio([float(bool(one)) for one in longer], weights, "lower")
    return found


_ALIKE = (("A", "B"), ("B", "A"), ("C", "C"))


def _longer_won(point: float, own: dict[str, Any], other: dict[str, Any]) -> bool | None:
    """Whether the answer with more tokens was preferred; None where none was, or both are as long."""
    if point == 0.5 or own["tokens"] == other["tokens"]:
        return None
    return bool((own["tokens"] > other["tokens"]) == (point == 1.0))


def _refuse_unreadable(label: str, questions: Sequence[str], replies: Sequence[str | None]) -> None:
    unread = [number for number, reply in enumerate(replies) if reply is None]
    if unread and len(unread) > UNREADABLE * len(questions):
        raise StageFailed(
            f"metric {label}: {len(unread)} of {len(questions)} replies of the judge hold no letter A, B or C, so "
            "nothing is measured; take another judge, ask for one letter in its prompt, or give an endpoint that "
            "thinks aloud more tokens (parameters.max_tokens)"
        )
