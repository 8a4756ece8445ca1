"""The damage table: each harm to each thing that is kept, and the promise that holds for it.

What is promised: an artifact that was harmed is not served but set aside and made anew; a checkpoint gives way to the
one before it; a measurement is measured anew, and a verdict judged anew, and neither costs an artifact.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from unread import NAMES, Project, make_project

from flows.engine import is_done
from stages import checkpoint
from stages.artifact import VERDICT, damage, read, set_aside, sha256, verified
from stages.documents import read_json, write_json, write_sealed
from stages.errors import StageFailed
from stages.manifest import sealed
from stages.verify import verify

pytestmark = pytest.mark.crash


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def empty(file: Path) -> None:
    os.truncate(file, 0)


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def link(file: Path) -> None:
    """The same bytes, but elsewhere: somebody else may change them."""
    outside = file.parents[4] / f"{file.name}.elsewhere"
    shutil.move(file, outside)
    file.symlink_to(outside)


def put_a_pipe(file: Path) -> None:
    """Whoever opens it waits for a writer that never comes."""
    file.unlink()
    os.mkfifo(file)


HARMS = {
    "truncated": truncate,
    "emptied": empty,
    "a bit flipped": flip_a_bit,
    "deleted": Path.unlink,
    "made a link": link,
    "made a pipe": put_a_pipe,
    "made a folder": lambda file: (file.unlink(), file.mkdir()),
    "another file beside it": lambda file: file.with_name("extra.bin").write_bytes(b"x"),
}
"""Each is done to one file."""
Harm = Callable[[Path], object]
each_harm = pytest.mark.parametrize("harm", HARMS.values(), ids=HARMS)
GATES = (
    ("gates: [{metric: domain, improves_on: base, by: 5%}]", "gates: [{metric: domain, at_most: 2, confidence: null}]"),
    ("    gates: [{metric: answers, improves_on: previous}]\n", ""),
    ("    gates: [{metric: pairs, at_least: 0.6}]\n", ""),
)


@pytest.fixture
def done(tmp_path: Path) -> Project:
    """A project of which everything was published and measured, with an adapter and a probe in every artifact."""
    project = make_project(tmp_path / "project")
    project.edit(*GATES)
    project.publish(*NAMES)
    for step in project.plan().steps[1:]:
        manifest = step.artifact.manifest
        for name in ("adapter/adapter_model.safetensors", "probe.safetensors"):
            file = step.place / name
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(name.encode() * 8)
            manifest["files"][name] = {"sha256": sha256(file), "size": file.stat().st_size}
        write_json(step.place / "manifest.json", sealed(manifest["inputs"], manifest["record"], manifest["files"]))
    plan = project.plan()
    verdicts = [verdict.as_record() for verdict in plan.verdicts(plan.steps[1])]
    write_sealed(plan.steps[1].place / VERDICT, {"gates": verdicts, "passed": True})
    assert is_done(plan)
    return project


FILES = (
    "model/model.safetensors",
    "adapter/adapter_model.safetensors",
    "probe.safetensors",
    "training.json",
    "manifest.json",
)


@each_harm
@pytest.mark.parametrize("name", FILES)
def test_a_harmed_artifact_is_not_served_but_set_aside_and_made_anew(done: Project, name: str, harm: Harm) -> None:
    step = done.plan().steps[2]
    harm(step.place / name)
    assert [finding.path for finding in verify(done.root, lambda _: None).findings] == [step.place]
    found = done.plan()
    assert [one.name for one in found.pending] == ["answers"]
    assert found.steps[2].reason.startswith("damaged since it was published: ")
    assert found.steps[2].damaged == step.place
    artifact = read(step.place)
    if artifact is not None:
        with pytest.raises(StageFailed, match="Run `trivium run` on the spec: the folder is set aside"):
            verified(artifact)
    kept = set_aside(step.place)
    assert kept.exists()
    assert not step.place.exists()
    done.publish("answers")
    assert done.plan().pending == ()


@each_harm
def test_a_harmed_measurement_costs_one_measurement(done: Project, harm: Harm) -> None:
    step = done.plan().steps[2]
    harm(Path(step.measurements[0].file))
    found = done.plan()
    assert [one.artifact is None for one in found.steps] == [False] * 5
    missing = {one.name: [measurement.metric for measurement in one.missing] for one in found.pending}
    assert missing == ({} if harm is HARMS["another file beside it"] else {"answers": ["domain"]})
    # What is deleted is not missed by `verify`, which asks no spec; the plan asks for it.
    assert len(verify(done.root, lambda _: None).findings) == int(harm is not Path.unlink)


@each_harm
def test_a_harmed_verdict_is_judged_anew(done: Project, harm: Harm) -> None:
    file = done.plan().steps[1].place / VERDICT
    harm(file)
    found = done.plan()
    if harm is HARMS["another file beside it"]:
        assert found.steps[1].damaged == file.parent, "beside a verdict is inside the artifact"
        return
    assert found.pending == ()
    assert not is_done(found)
    assert len(verify(done.root, lambda _: None).findings) == int(harm is not Path.unlink)


@each_harm
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "rng/state.pth", "seal.json"])
def test_a_harmed_checkpoint_gives_way_to_the_one_before_it(tmp_path: Path, name: str, harm: Harm) -> None:
    folder = tmp_path / "a/b/c/checkpoints"
    for step in (4, 8):
        for file in ("model.safetensors", "optimizer.pt", "rng/state.pth"):
            path = folder / f"checkpoint-{step}" / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(f"{file} at {step}".encode())
        checkpoint.seal(folder / f"checkpoint-{step}")
    harm(folder / "checkpoint-8" / name)
    resumed = checkpoint.resume_from(folder, 4)
    assert resumed.checkpoint == folder / "checkpoint-4"
    assert (folder / ".set-aside/checkpoint-8.1").is_dir()


def test_an_edited_manifest_is_not_believed_and_one_sealed_again_is_held_against_the_files(
    done: Project,
) -> None:
    place = done.plan().steps[2].place
    manifest = read_json(place / "manifest.json")
    manifest["files"]["training.json"]["sha256"] = "0" * 64
    write_json(place / "manifest.json", manifest)
    assert read(place) is None
    write_json(place / "manifest.json", sealed(manifest["inputs"], manifest["record"], manifest["files"]))
    assert damage(read(place)) == ["training.json was changed"]


def test_what_was_published_before_a_harmed_artifact_and_after_it_is_kept(done: Project) -> None:
    before = done.plan()
    flip_a_bit(before.steps[2].place / "model/model.safetensors")
    kept = [step.artifact.path for step in done.plan().steps if step.artifact is not None]
    assert kept == [step.place for step in before.steps if step.name != "answers"]


@pytest.mark.parametrize("harm", ["flipped", "deleted", "added"])
def test_a_base_that_changes_after_the_plan_is_not_loaded(done: Project, harm: str) -> None:
    base = done.plan().steps[0].artifact
    file = done.folder / "base/model.safetensors"
    if harm == "flipped":
        before = file.stat()
        flip_a_bit(file)
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        complaint = f"{file} was changed"
    elif harm == "deleted":
        file.unlink()
        complaint = f"{file} is missing"
    else:
        file = file.with_name("chat_template.jinja")
        file.write_text("{{ messages }}")
        complaint = f"{file} is new"
    with pytest.raises(StageFailed) as caught:
        verified(base)
    assert complaint in str(caught.value)
    assert f"Put the files of {file.parent} back as they were, or run `trivium run` on the spec" in str(caught.value)


@pytest.mark.parametrize("harm", ["flipped", "deleted", "set aside"])
def test_an_adapter_whose_base_was_harmed_is_refused_and_names_it(done: Project, harm: str) -> None:
    steps = done.plan().steps
    below, last = steps[2].artifact, steps[3].artifact
    shutil.rmtree(last.path / "model")
    files = {"model.safetensors": sha256(below.path / "model/model.safetensors")}
    record = last.manifest["record"] | {"beneath": {"identity": below.identity, "files": files}}
    kept = {name: entry for name, entry in last.manifest["files"].items() if not name.startswith("model/")}
    write_json(last.path / "manifest.json", sealed(last.manifest["inputs"], record, kept))
    adapter = read(last.path)
    assert verified(adapter).loadable == last.path
    file = below.path / "model/model.safetensors"
    if harm == "flipped":
        flip_a_bit(file)
    elif harm == "deleted":
        file.unlink()
    else:
        set_aside(below.path)
    complaint = {
        "flipped": "model.safetensors of its base was changed",
        "deleted": "model.safetensors of its base is missing",
        "set aside": "the base that it belongs on",
    }[harm]
    with pytest.raises(StageFailed, match=complaint):
        verified(adapter)
