"""`trivium data`: the reports of stages on the terminal, from a process of its own; nothing is trained or written."""

import subprocess
import sys
from pathlib import Path

import pytest
from tiny import SPEC, write_data, write_rows

pytestmark = pytest.mark.model


def trivium(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flows.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


@pytest.fixture
def spec(tmp_path, base_model) -> Path:
    write_data(tmp_path)
    (tmp_path / "base").symlink_to(base_model)
    (tmp_path / "spec.yaml").write_text(SPEC.replace("path: base", f"path: {base_model}"))
    return tmp_path / "spec.yaml"


def test_a_stage_is_reported_with_its_mask_and_what_is_there_twice_and_nothing_is_written(spec):
    hostile = "\x1b[2J[red]\u202e«"
    rows = [{"prompt": f"say {name} {hostile}", "completion": "a b c."} for name in "ab"]
    write_rows(spec.parent / "data/instructions.jsonl", rows)
    done = trivium("data", spec, "--stage", "answers")
    assert done.returncode == 0, done.stderr
    assert "answers (ift, sequences of 128 tokens)" in done.stdout
    assert "«a b c.<|im_end|>»" in done.stdout
    assert "say a \\x1b[2J[red]\\u202e«<|im_end|>" in done.stdout
    assert "end of a turn or document: <|im_end|>, learned in 2 of 2 rows" in done.stdout
    assert "knowledge" not in done.stdout
    assert not (spec.parent / "artifacts").exists()


def test_what_a_run_would_refuse_ends_with_2_after_the_report(spec):
    rows = [{"text": f"the {word} sat"} for word in ("cat", "dog", "cat")]
    write_rows(spec.parent / "data/corpus.jsonl", rows)
    spec.write_text(spec.read_text().replace("kind: cpt\n", "kind: cpt\n    data_limits: {duplicates: 10%}\n"))
    done = trivium("data", spec, "--stage", "knowledge")
    assert done.returncode == 2
    assert "duplicate: data/corpus.jsonl:3 is the same as data/corpus.jsonl:1" in done.stdout
    assert "trivium: stage knowledge: 1 of 3 rows are, or nearly are, an earlier one" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_unknown_stage_and_a_base_that_is_not_here_are_told(spec):
    done = trivium("data", spec, "--stage", "answer")
    assert done.returncode == 2
    assert "--stage: no stage 'answer' in" in done.stderr
    assert "its stages: knowledge, answers, manner" in done.stderr
    hub = f"{{hub: owner/model, revision: {'0a' * 20}"
    spec.write_text(spec.read_text().replace(f"{{path: {(spec.parent / 'base').resolve()}", hub))
    done = trivium("data", spec)
    assert done.returncode == 2
    assert "the base is not prepared yet" in done.stderr
