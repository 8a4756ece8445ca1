"""What a stage's process reads is what the spec said: nothing is spelt out that was left to its default."""

from pathlib import Path

import pytest
from methods_table import METHODS
from tiny import SPEC

from stages.job import Job, read_job, write_job
from stages.pipeline import load_pipeline

RATE = "learning_rate: 5e-3"
TRAINS = ["schedule: constant", "schedule: constant_with_warmup", "weights_dtype: bfloat16", "extra: {adam_beta2: 0.9}"]


def survives(spec: str, folder: Path) -> None:
    (folder / "spec.yaml").write_text(spec)
    pipeline, _ = load_pipeline(folder / "spec.yaml")
    job = Job(
        kind="stage", pipeline=pipeline, folder=".", name="knowledge", identity={}, target="t", work="w", start=None,
        make=True, measurements=(),
    )  # fmt: skip
    write_job(job, folder / "jobs/job.json")
    assert read_job(folder / "jobs/job.json") == job


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.kind)
def test_every_method_survives_the_job(method, tmp_path):
    settings = method.model_dump_json(exclude_unset=True)
    spec = SPEC.replace("{kind: qlora, rank: 4}", settings) if method.kind != "longlora" else SPEC
    spec = spec.replace("{kind: spectrum, top_percent: 50}", settings) if method.mergeable else spec
    survives(spec, tmp_path)


@pytest.mark.parametrize("setting", TRAINS)
def test_every_setting_survives_the_job(setting, tmp_path):
    survives(SPEC.replace(RATE, f"{RATE}, {setting}"), tmp_path)


def test_settings_that_stand_beside_no_others_survive_the_job(tmp_path):
    survives(SPEC.replace("{kind: spectrum, top_percent: 50}", "{kind: spectrum, unfrozen: list.yaml}"), tmp_path)
    survives(SPEC.replace("max_steps: 10,", "max_steps: 10, loss: sft,"), tmp_path)
