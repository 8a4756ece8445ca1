"""Texts of others on the terminal: what looks like markup is text."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flows import terminal
from stages.plan import Plan, Step

TEXT = "train.document_end: None -> '[/INST]'; content of data/part-[a-c]*.jsonl"


@pytest.fixture
def step(tmp_path: Path) -> Step:
    return Step(1, "knowledge", None, {}, tmp_path, tmp_path, None, TEXT, None, ())


def printed(text: str) -> str:
    """What was printed, put together again where the terminal broke its lines."""
    return " ".join(text.split())


def test_a_reason_of_the_plan_is_printed_as_it_is(step: Step, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline: Any = SimpleNamespace(metrics={})
    terminal.print_plan(Plan(pipeline, step.place, step.place, (step,)), {})
    assert TEXT in printed(capsys.readouterr().out)


def test_what_a_step_says_is_printed_as_it_is(step: Step, capsys: pytest.CaptureFixture[str]) -> None:
    with terminal.Watcher() as hear:
        hear(step, {"event": "info", "message": TEXT})
    assert TEXT in printed(capsys.readouterr().err)
