"""A project with data and a base that only looks like a model: the store and its plans never read a weight."""

import os
from dataclasses import dataclass
from pathlib import Path

from headers import llama, write_headers
from tiny import TEMPLATE, write_data

from stages import artifact, evaluate
from stages.artifact import publish
from stages.measure import ratio
from stages.pipeline import load_pipeline
from stages.plan import Plan, make_plan

SPEC = """\
name: tiny
model: {path: base, dtype: float32}
seed: 3
metrics:
  domain: {kind: perplexity, data: {path: data/heldout.jsonl}, sequence_length: 128}
  answers: {kind: perplexity, data: {path: data/instructions.heldout.jsonl}, sequence_length: 128}
  qa: {kind: lm_eval, task: tasks/qa.yaml, metric: acc_norm, sequence_length: 128}
  pairs: {kind: preference, data: {path: data/pairs.heldout.jsonl}, sequence_length: 128}
stages:
  - name: knowledge
    kind: cpt
    method: {kind: spectrum, top_percent: 50}
    data: [{path: data/corpus.jsonl}]
    train: {learning_rate: 5e-3, max_steps: 12, sequence_length: 64, batch_size: 4, micro_batch_size: 2}
    gates: [{metric: domain, improves_on: base, by: 5%}]
  - name: answers
    kind: ift
    method: {kind: lora, rank: 4}
    data: [{path: data/instructions.jsonl}]
    train: {learning_rate: 1e-2, max_steps: 12, sequence_length: 128, batch_size: 2}
    gates: [{metric: answers, improves_on: previous}]
  - name: manner
    kind: dpo
    method: {kind: qlora, rank: 4}
    data: [{path: data/pairs.jsonl}]
    train: {learning_rate: 1e-2, max_steps: 10, sequence_length: 128, batch_size: 4, micro_batch_size: 4}
    gates: [{metric: pairs, at_least: 0.6}]
"""
"""Not `tiny.SPEC`: that one is tuned to train well, and these tests edit its text."""
NAMES = ["base", "knowledge", "answers", "manner", "release"]
WEIGHTS = bytes(range(256)) * 4


@dataclass
class Project:
    """A spec with its data and a base that only looks like a model: planning reads no weights."""

    folder: Path

    @property
    def root(self) -> Path:
        return self.folder / "runs"

    def write(self, spec: str) -> None:
        (self.folder / "spec.yaml").write_text(spec)

    def edit(self, *changes: tuple[str, str]) -> None:
        spec = (self.folder / "spec.yaml").read_text()
        for old, new in changes:
            assert old in spec
            spec = spec.replace(old, new, 1)
        self.write(spec)

    def plan(self, **options) -> Plan:
        pipeline, _ = load_pipeline(self.folder / "spec.yaml")
        return make_plan(pipeline, self.folder, self.root, **options)

    def publish(self, *names: str, files: dict[str, str] | None = None, beneath: bool = False) -> None:
        """Publish the named steps under the identities of today's plan, with all their measurements.

        The release gets ``files`` besides, and is base + adapter if ``beneath``.
        """
        for step in self.plan().steps:
            if step.name not in names:
                continue
            work = self.root / ".fake"
            (work / "model").mkdir(parents=True)
            (work / "model/model.safetensors").write_bytes(step.key.encode())
            (work / "training.json").write_text("{}")
            record: dict = {"stage": step.name, "published": f"2026-01-01T00:00:{step.order:02d}"}
            if step.name == "base":
                record["model_path"] = str((self.folder / self.plan().pipeline.model.path).resolve())
            if step.name == "release":
                for name, text in (files or {}).items():
                    (work / name).parent.mkdir(exist_ok=True)
                    (work / name).write_text(text)
                if beneath:
                    record["beneath"] = artifact.beneath(self.plan().steps[-2].key, work / "model")
            publish(work, step.target, identity=step.identity, record=record)
            for one in step.measurements:
                found = evaluate.Evaluation({"x": ratio([1.0, 2.0], [1.0, 1.0], "lower")}, "x", {}, {}, 0.1)
                evaluate.save(found, Path(one.file), one.identity)


def make_project(folder: Path) -> Project:
    """A project of which nothing was run."""
    made = Project(folder)
    (made.folder / "base").mkdir(parents=True)
    (made.folder / "base/config.json").write_text('{"model_type": "llama"}')
    (made.folder / "base/model.safetensors").write_bytes(WEIGHTS)
    write_data(made.folder)
    made.write(SPEC)
    return made


def released_project(folder: Path, name: str = "tiny", **settings) -> Project:
    """A project whose chain is published to its release and whose gates pass: they judge the value that all have."""
    project = make_project(folder)
    write_headers(project.folder / "base", llama())
    (project.folder / "base/chat_template.jinja").write_text(TEMPLATE)
    project.edit(
        ("name: tiny", f"name: {name}"),
        ("improves_on: base, by: 5%", "at_most: 2, confidence: null"),
        ("improves_on: previous", "at_most: 2, confidence: null"),
        ("at_least: 0.6", "at_least: 1, confidence: null"),
    )
    project.publish(*NAMES, **settings)
    return project


def rewrite_unnoticed(file: Path, content: bytes) -> None:
    """Another content of the same size in the same file with the same time of change."""
    before = file.stat()
    assert len(content) == before.st_size
    with file.open("r+b") as handle:
        handle.write(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = file.stat()
    assert (after.st_size, after.st_mtime_ns, after.st_ino) == (before.st_size, before.st_mtime_ns, before.st_ino)


def flip(file: Path, position: int = 0) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    rewrite_unnoticed(file, bytes(content))
