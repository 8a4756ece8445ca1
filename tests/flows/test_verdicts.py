"""How verdicts are told: on a run's one line, on the terminal and in the Prefect report."""

from pathlib import Path

import pytest

from flows.engine import Outcome
from flows.summary import Summary
from flows.terminal import out, print_summary
from stages.gate import Verdict

PASSED = Verdict("a at least 1, at 95%", "passed", reason="a 2 is at least 1")
FAILED = Verdict("b at least 1, at 95%", "failed", reason="b 0 is not at least 1")
UNDECIDED = Verdict("c at least 1, at 95%", "undecided", reason="c 1.1 may be at least 1; undecided: about 90 examples")


@pytest.mark.parametrize(
    ("verdicts", "line"),
    [
        ((), "done"),
        ((PASSED, PASSED), "2 of 2 gates passed"),
        ((PASSED, FAILED), "1 of 2 gates failed: b 0 is not at least 1"),
        ((UNDECIDED,), "1 of 1 gates undecided: c 1.1 may be at least 1; undecided: about 90 examples"),
        (
            (UNDECIDED, FAILED, PASSED),
            "1 of 3 gates failed, 1 undecided: c 1.1 may be at least 1; undecided: about 90 examples | "
            "b 0 is not at least 1",
        ),
    ],
)
def test_a_stage_says_in_one_line_what_its_gates_came_to(verdicts, line):
    outcome = Outcome(None, kept=False, verdicts=verdicts)
    assert outcome.line == line
    assert outcome.passed == all(verdict is PASSED for verdict in verdicts)


def summary(*verdicts: Verdict) -> Summary:
    return Summary("tiny", ("", "base"), (), (), tuple(("knowledge", verdict) for verdict in verdicts), Path("model"))


def test_the_terminal_tells_all_three_outcomes():
    with out.capture() as said:
        print_summary(summary(PASSED, FAILED, UNDECIDED))
    assert said.get().splitlines() == [
        "gate passed knowledge: a 2 is at least 1",
        "gate failed knowledge: b 0 is not at least 1",
        "gate undecided knowledge: c 1.1 may be at least 1; undecided: about 90 examples",
    ]
