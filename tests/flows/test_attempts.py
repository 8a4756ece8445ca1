"""A stage that is refused and tried again, for real: stopped in the second attempt, gone on with, shown in Prefect."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tiny
from running import SPEC, run, sealed, states

from flows.engine import Plain, Run, nothing_to_do, run_chain
from stages.artifact import VERDICT
from stages.plan import Step

RETRY = """\
    on_gate_failure:
      retry:
        - train: {learning_rate: x1000}
        - method: {top_percent: 25}
"""
SECOND = "knowledge (attempt 2 of 3: learning_rate 0.005)"


def write(folder: Path) -> Path:
    """The first attempt learns nothing, the second does, the third is never needed."""
    return tiny.write_project(folder, SPEC.replace("learning_rate: 5e-3", "learning_rate: 5e-6") + RETRY)


@pytest.mark.model
@pytest.mark.flow
def test_a_refused_stage_is_tried_again_and_a_run_that_was_stopped_goes_on_with_its_attempt(tmp_path: Path) -> None:
    spec = write(tmp_path / "project")
    asked = Run(spec, spec.parent / "artifacts")
    heard: Counter[tuple[str, str]] = Counter()

    def stop(step: Step, event: dict[str, Any]) -> None:
        heard[step.title, event["event"]] += 1
        if step.attempt == 2 and event["event"] == "progress" and event["step"] >= 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_chain(asked, Plain(stop))
    assert [title for title, kind in heard if kind == "progress"] == [
        "knowledge (attempt 1 of 3: as written)",
        SECOND,
    ]
    assert sealed(spec)

    plan = asked.plan()
    assert re.search(r"resumes at step [1-4]0", plan.steps[1].reason), plan.steps[1].reason
    first = next(step for step in plan.others if step.attempt == 1)
    refused = (first.place / VERDICT).read_bytes()
    assert not json.loads(refused)["passed"]

    done = run(spec)
    assert done.returncode == 0, done.stderr
    assert f"run      1 {SECOND} (cpt, spectrum): attempt 2 of 3: learning_rate 0.005; resumes at step" in done.stdout
    assert "attempt 1 of 3 (as written): refused by its gates" in done.stdout
    assert "attempt 3 of 3 (top_percent 25.0): only if the gates refuse those before it" in done.stdout
    assert f"gate passed {SECOND}: domain" in done.stdout
    assert "gate failed knowledge (attempt 1 of 3: as written): domain" in done.stdout
    assert states(spec, SECOND) == ["COMPLETED"]
    plan = asked.plan()
    assert [step.reason for step in plan.steps] == ["published"] * 3
    assert plan.steps[1].attempt == 2
    assert (first.place / VERDICT).read_bytes() == refused
    assert json.loads((plan.steps[1].place / VERDICT).read_text())["passed"]
    assert plan.others[-1].artifact is None
    assert nothing_to_do(asked, plan)

    # A stricter gate refuses what passed: only the attempt that was never made is made, and then the best is told.
    spec.write_text(spec.read_text().replace("by: 1%", "by: 99%"))
    third = run(spec)
    assert third.returncode == 3, third.stderr
    assert (
        "stage knowledge (attempt 2 of 3: learning_rate 0.005): all 3 attempts were refused, and this is the best"
        in (third.stderr)
    )
    assert Counter(states(spec, "knowledge (attempt 3 of 3: top_percent 25.0)")) == {"FAILED": 1}
    assert Counter(states(spec, SECOND)) == {"COMPLETED": 1, "FAILED": 1}
    assert states(spec, "train").count("COMPLETED") == 2
