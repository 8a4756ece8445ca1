"""A real model, SmolLM2-135M: it learns a domain, forgets some of the rest, and gates tell the one from the other."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flows import templates
from stages.metrics.results import measure_name
from stages.pipeline import load_pipeline
from stages.plan import Plan, make_plan

pytestmark = [pytest.mark.flow, pytest.mark.timeout(900)]
FORGETS = "{metric: general, keeps: base, within: 0.1%}"
QUIZ = "{metric: quiz, improves_on: base, by: 0.3}"
STAGES = """\
stages:
  - name: answers
    kind: ift
    method: {kind: top_layers, layers: 4}
    data: [{path: data/instructions.jsonl}]
    train: {learning_rate: 2e-3, max_steps: 8, sequence_length: 128, batch_size: 2, micro_batch_size: 2}
    gates: [{metric: domain, improves_on: base}, GATES]
"""
SPEC = """\
name: tutor
model: {gguf: base/SmolLM2-135M-Instruct.Q4_1.gguf, dtype: bfloat16}
seed: 17
metrics:
  domain: {kind: perplexity, data: {path: data/instructions.heldout.jsonl}, sequence_length: 256}
  general: {kind: perplexity, data: {path: data/general.heldout.jsonl}, sequence_length: 256}
  quiz: {kind: lm_eval, task: tasks/stdlib_qa.yaml, metric: acc, limit: 8, sequence_length: 256, batch_size: 4}
"""
NEXT = """\
  - name: manner
    kind: dpo
    method: {kind: lora, rank: 4}
    data: [{path: data/preferences.jsonl}]
    train: {learning_rate: 1e-4, max_steps: 2, sequence_length: 256, batch_size: 1}
"""


def run(spec: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flows.cli", "run", str(spec), "--no-prefect", *options]
    environment = os.environ | {"COLUMNS": "200"}
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=600, env=environment)


def written(folder: Path) -> dict[str, tuple[int, int]]:
    """Weights and measurements of every step, by name: inode and time of writing."""
    files = [*folder.glob("artifacts/tutor/0*/model/*"), *folder.glob("artifacts/tutor/0*/evaluation/*.json")]
    return {str(path.relative_to(folder)): (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}


def planned(spec: Path) -> Plan:
    pipeline, _ = load_pipeline(spec)
    return make_plan(pipeline, spec.parent.resolve(), spec.parent / "artifacts")


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A chain of two stages, of which gates refuse the first; what it printed."""
    folder = tmp_path_factory.mktemp("real") / "project"
    templates.write("quickstart", folder)
    spec = folder / "spec.yaml"
    spec.write_text(SPEC + STAGES.replace("GATES", f"{FORGETS}, {QUIZ}") + NEXT)
    return spec, run(spec)


def test_gates_tell_what_was_learned_from_what_was_forgotten(refused: tuple[Path, subprocess.CompletedProcess]) -> None:
    spec, done = refused
    assert done.returncode == 3, done.stderr
    plan = planned(spec)
    base, trained = plan.steps[0], plan.steps[1]
    domain, general = (
        [step.evaluation(name).measures["bits_per_byte"].value for step in (base, trained)]
        for name in ("domain", "general")
    )
    assert domain[1] < 0.98 * domain[0]
    assert general[1] > 1.002 * general[0]
    assert "gate passed answers: domain" in done.stdout
    assert "gate failed answers: general" in done.stdout
    assert "gate undecided answers: quiz" in done.stdout
    assert "trivium: stage answers: 1 of 3 gates failed, 1 undecided: general" in done.stderr
    assert "manner: load" not in done.stderr
    assert not (spec.parent / "artifacts/tutor/model").exists()


def test_a_lower_threshold_is_judged_from_what_was_measured(refused: tuple[Path, subprocess.CompletedProcess]) -> None:
    spec, _ = refused
    before = written(spec.parent)
    lowered = FORGETS.replace("0.1%", "60%")
    spec.write_text(SPEC + STAGES.replace("GATES", lowered) + NEXT)
    done = run(spec, "--until", "answers")
    assert done.returncode == 0, done.stderr
    assert "gate passed answers: general" in done.stdout
    for phase in ("load", "train", "merge", "evaluate"):
        assert f"answers: {phase}" not in done.stderr
    assert written(spec.parent) == before


def test_the_harness_by_itself_finds_on_the_release_what_the_gate_saw(
    refused: tuple[Path, subprocess.CompletedProcess], tmp_path: Path
) -> None:
    spec = refused[0].with_name("released.yaml")
    spec.write_text(SPEC + STAGES.replace("GATES", "{metric: quiz, at_least: 0, confidence: null}"))
    done = run(spec)
    assert done.returncode == 0, done.stderr
    assert "answers: train" not in done.stderr
    command = [
        *(sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu", "--batch_size", "4"),
        *("--model_args", f"pretrained={spec.parent}/artifacts/tutor/model,dtype=auto,max_length=256"),
        *("--tasks", "stdlib_qa", "--include_path", str(spec.parent / "tasks"), "--limit", "8"),
        *("--output_path", str(tmp_path)),
    ]
    harness = subprocess.run(
        command, cwd=spec.parent / "tasks", capture_output=True, text=True, check=False, timeout=300, env=os.environ
    )
    assert harness.returncode == 0, harness.stderr[-2000:]
    (file,) = tmp_path.rglob("results_*.json")
    found = json.loads(file.read_text())["results"]["stdlib_qa"]
    values = {measure_name(key): value for key, value in found.items() if "," in key and "_stderr" not in key}
    measures = planned(spec).steps[1].evaluation("quiz").measures
    assert values.keys() == {"acc", "acc_norm"}
    assert values == {name: measures[name].value for name in values}
