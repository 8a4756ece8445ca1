"""What the pending steps need on disk: held against what is really written, and asked before anything starts."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from methods_table import METHODS
from one_stage import CPT, TRAIN, only_job, write_spec
from tiny import write_data, write_model

from stages import checkpoint, disk, make
from stages.count import Count, count_stages, meta_model
from stages.disk import Estimate, Model, checkpoint_size, estimate, refuse_if_full, size, stage_sizes
from stages.errors import StageFailed
from stages.pipeline import load_pipeline
from stages.plan import make_plan
from stages.run import run_job

WITHIN = 0.15
COUNTED = Count(trainable=38_000, parameters=38_000)


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    write_model(folder / "base")
    write_data(folder)
    return folder


def planned(spec: Path, root: Path):
    return make_plan(load_pipeline(spec)[0], spec.parent, root)


def below(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


class Written(NamedTuple):
    checkpoint: int
    artifact: int
    peak: int


@pytest.fixture
def written(monkeypatch):
    """A function that runs a job and measures what it wrote."""

    def run(job) -> Written:
        one, peak = [], []
        prune, publish = checkpoint.prune, make.publish

        def look(folder, keep):
            one.append(below(checkpoint.by_step(folder)[0]))
            peak.append(below(Path(job.work)))
            prune(folder, keep)

        def look_again(folder, *given, **named):
            peak.append(below(Path(job.work)))
            return publish(folder, *given, **named)

        monkeypatch.setattr(checkpoint, "prune", look)
        monkeypatch.setattr(make, "publish", look_again)
        artifact = run_job(job)
        return Written(max(one), below(artifact.path), max(peak))

    return run


@pytest.mark.model
@pytest.mark.parametrize(
    ("method", "optimizer"),
    [
        ("full", "adamw"),
        ("full", "sgd"),
        ("spectrum, top_percent: 50", "adamw"),
        ("lora, rank: 8", "adamw"),
        ("qlora, rank: 8", "adamw"),
    ],
)
def test_the_estimate_is_what_is_really_written(method, optimizer, project, tmp_path, written):
    settings = f"{TRAIN}, checkpoint_every: 1, optimizer: {optimizer}".replace("max_steps: 3", "max_steps: 5")
    spec = write_spec(project, CPT, method, settings)
    job = only_job(spec, tmp_path)
    stage = job.pipeline.stages[0]
    count = count_stages(job.pipeline, project, project / "base", ["only"])["only"]
    beside = sum(file.stat().st_size for file in (project / "base").iterdir() if file.suffix != ".safetensors")
    model = Model(count.parameters, beside)
    peak, stays = stage_sizes(stage, model, count.trainable)
    found = written(job)
    assert checkpoint_size(stage, model, count.trainable) == pytest.approx(found.checkpoint, rel=WITHIN)
    assert stays == pytest.approx(found.artifact, rel=WITHIN)
    assert peak == pytest.approx(found.peak, rel=WITHIN)


@pytest.mark.model
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.kind)
def test_a_method_says_rightly_whether_its_checkpoints_hold_the_whole_model(method, project):
    from stages.methods.base import Start

    prepared = method.prepare(meta_model(project / "base"), Start(project / "base", sequence_length=64))
    assert method.checkpoints_whole is not hasattr(prepared.model, "peft_config")


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 bytes"), (999, "999 bytes"), (1_500, "1.5 kB"), (3.21e9, "3.21 GB"), (5e12, "5 TB")]
)
def test_sizes_are_shown_as_people_read_them(number, text):
    assert size(number) == text


def test_what_is_published_needs_nothing_and_what_is_pending_adds_up(project, tmp_path):
    spec = write_spec(project)
    plan = planned(spec, tmp_path)
    found = estimate(plan, {"only": COUNTED})
    assert found is not None
    assert found.complete
    assert [part.split(":")[0].strip() for part in found.parts] == ["base", "only", "release"]
    more = estimate(plan, {"only": Count(trainable=380_000, parameters=38_000)})
    assert more is not None
    assert more.needed > found.needed


def test_what_trains_and_is_not_counted_makes_it_a_lower_bound(project, tmp_path):
    found = estimate(planned(write_spec(project, CPT, "lora, rank: 8"), tmp_path), {})
    assert found is not None
    assert not found.complete
    assert re.fullmatch(rf"disk: at least [\d.]+ kB needed at the peak, [\d.]+ \w+ free in {tmp_path}", str(found))


def test_more_checkpoints_kept_need_more_and_a_short_run_writes_few(project, tmp_path):
    def needed(settings: str) -> int:
        found = estimate(planned(write_spec(project, train=settings), tmp_path), {"only": COUNTED})
        assert found is not None
        return found.needed

    long = TRAIN.replace("max_steps: 3", "max_steps: 300")
    assert needed(f"{long}, keep_checkpoints: 9") > 2 * needed(f"{long}, keep_checkpoints: 2")
    assert needed(f"{TRAIN}, keep_checkpoints: 9") == needed(f"{TRAIN}, keep_checkpoints: 2")


def test_what_a_stopped_run_left_is_not_needed_twice(project, tmp_path):
    plan = planned(write_spec(project), tmp_path)
    before = estimate(plan, {"only": COUNTED})
    left = plan.steps[1].work / "checkpoints/checkpoint-1/optimizer.pt"
    left.parent.mkdir(parents=True)
    left.write_bytes(bytes(100_000))
    after = estimate(plan, {"only": COUNTED})
    assert before is not None
    assert after is not None
    assert after.needed == pytest.approx(before.needed - 1.05 * 100_000, abs=2)
    assert "(100 kB are there already)" in after.parts[1]


def test_nothing_is_said_before_the_base_can_be_looked_at(project, tmp_path):
    spec = write_spec(project)
    spec.write_text(spec.read_text().replace("{path: base,", f"{{hub: a/b, revision: {'a1' * 20},"))
    assert estimate(planned(spec, tmp_path), {}) is None


def test_a_run_that_cannot_end_is_not_started(project, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    plan = planned(write_spec(project), tmp_path)
    with pytest.raises(StageFailed) as caught:
        refuse_if_full(estimate(plan, {"only": COUNTED}))
    first, *arithmetic, remedy = str(caught.value).splitlines()
    assert re.fullmatch(rf"disk: about [\d.]+ kB needed at the peak, 1 kB free in {tmp_path}: not enough, .*", first)
    assert [line.split(":")[0] for line in arithmetic] == ["  base", "  only", "  release"]
    assert re.fullmatch(
        r"Free [\d.]+ kB \(`trivium gc` shows .*\), lower train.keep_checkpoints, or .* \(--root .*", remedy
    )


def test_a_run_that_fits_is_started(project, tmp_path):
    refuse_if_full(estimate(planned(write_spec(project), tmp_path), {"only": COUNTED}))


def test_the_free_space_is_that_of_the_nearest_folder_that_exists(tmp_path):
    assert disk.free(tmp_path / "not/yet/there") == (shutil.disk_usage(tmp_path).free, tmp_path)


@pytest.mark.parametrize(("free", "fits"), [(10, True), (9, False)])
def test_an_estimate_fits_where_it_is_not_more_than_what_is_free(free, fits):
    assert Estimate(10, free, Path(), (), complete=True).fits is fits


@pytest.mark.parametrize("command", ["plan", "run"])
def test_the_commands_say_it_and_run_refuses_without_torch(command, project, tmp_path):
    spec = write_spec(project)
    script = (
        "import shutil, sys, flows.cli\n"
        "shutil.disk_usage = lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000)\n"
        "code = flows.cli._run(sys.argv[1:])\n"
        "sys.exit(code + 10 * ('torch' in sys.modules))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, command, spec, "--root", tmp_path],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == (4 if command == "run" else 0), done.stderr
    assert re.search(r"^disk: about [\d.]+ kB needed at the peak, 1 kB free in ", done.stdout, re.MULTILINE)
    if command == "run":
        assert done.stderr.startswith("trivium: disk: about ")
        assert not list(tmp_path.glob("it/.jobs/*"))
