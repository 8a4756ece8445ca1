"""Where a run writes: below its root, in the caches that docs/security.md lists, and nowhere else."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from specs.load import SpecError
from stages.artifact import files_below, set_aside
from stages.errors import StageFailed
from stages.pipeline import load_pipeline

ONE_STAGE = tiny.SPEC[: tiny.SPEC.index("  - name: answers")].replace("max_steps: 12", "max_steps: 2")


def snapshot(*folders: Path) -> set[str]:
    """Every file below some folders, with its content's size."""
    return {f"{path}:{path.stat().st_size}" for folder in folders for path in folder.rglob("*") if path.is_file()}


@pytest.mark.model
def test_a_run_writes_below_its_root_and_into_the_caches_of_the_libraries_only(tmp_path):
    spec = tiny.write_project(tmp_path / "p", ONE_STAGE)
    home, scratch, cwd = tmp_path / "home", tmp_path / "tmp", tmp_path / "cwd"
    for folder in (home, scratch, cwd):
        folder.mkdir()
    before = snapshot(tmp_path)
    own = {"HOME": str(home), "TMPDIR": str(scratch), "HF_HOME": str(home / "hf"), "HF_HUB_OFFLINE": "1"}
    caches = ("HF_DATASETS_CACHE", "MPLCONFIGDIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME")
    clean = {name: value for name, value in os.environ.items() if name not in caches}
    done = subprocess.run(
        [sys.executable, "-m", "flows.cli", "run", str(spec), "--no-prefect", "--root", str(tmp_path / "root")],
        cwd=cwd,
        env=clean | own | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in (0, 3), done.stderr
    written = {Path(name.rpartition(":")[0]).relative_to(tmp_path) for name in snapshot(tmp_path) - before}
    outside = {path for path in written if path.parts[0] != "root"}
    allowed = (Path("home/hf"), Path("home/.cache/matplotlib"), Path("home/.config/matplotlib"))
    assert not [path for path in outside if not any(path.is_relative_to(place) for place in allowed)]
    assert {path.parts[1] for path in written if path.parts[0] == "root"} <= {"tiny", ".digests.json", ".prefect"}


# Names


@pytest.mark.parametrize("name", ["../up", "/tmp/x", ".", "..", "a/b", ".hidden", "CON:", "x" * 64, "a\\nb", "", "Up"])
@pytest.mark.parametrize("line", ["name: tiny\n", "  - name: knowledge\n"])
def test_a_name_cannot_lead_out_of_the_root(name, line, tmp_path):
    changed = line.replace(line.split(": ")[1].strip(), f'"{name}"')
    (tmp_path / "spec.yaml").write_text(tiny.SPEC.replace(line, changed, 1))
    with pytest.raises(SpecError, match="name: "):
        load_pipeline(tmp_path / "spec.yaml")


# Strangers in a folder


@pytest.mark.parametrize("kind", ["link to a file", "link to a folder", "link to nothing", "pipe", "socket"])
def test_an_artifact_holds_files_and_folders_only(kind, tmp_path):
    folder = tmp_path / "artifact"
    (folder / "model").mkdir(parents=True)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "file").touch()
    place = folder / "model/x"
    if kind == "pipe":
        os.mkfifo(place)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as made, pytest.MonkeyPatch.context() as patch:
            patch.chdir(place.parent)  # the length of its path is limited
            made.bind("x")
    else:
        target = {"link to a file": "file", "link to a folder": ".", "link to nothing": "absent"}[kind]
        place.symlink_to(elsewhere / target)
    with pytest.raises(StageFailed, match=r"model/x: neither a regular file nor a folder; remove it"):
        files_below(folder)


def test_a_device_is_refused_without_being_read():
    with pytest.raises(StageFailed, match="neither a regular file nor a folder"):
        files_below(Path("/dev"))


@pytest.mark.model
def test_a_root_behind_a_link_is_the_folder_that_it_leads_to(tmp_path, run_spec):
    """A link that the user made is the user's will; artifacts name the real place."""
    from flows.cli import root_of
    from stages.plan import make_plan
    from stages.run import run_job

    spec = tiny.write_project(tmp_path / "p", ONE_STAGE)
    (tmp_path / "disk").mkdir()
    (tmp_path / "root").symlink_to(tmp_path / "disk")
    root = root_of(spec, tmp_path / "root")
    assert root == (tmp_path / "disk").resolve()
    plan = make_plan(load_pipeline(spec)[0], spec.parent, root)
    artifact = run_job(plan.job(plan.steps[0]).model_copy(update={"measurements": ()}))
    assert artifact.path.is_relative_to(tmp_path / "disk")


@pytest.mark.model
def test_an_artifact_that_became_a_link_is_made_anew_and_what_it_leads_to_is_left_alone(chain, tmp_path):
    from stages.plan import make_plan

    store = Path(shutil.copytree(chain.store.parent, tmp_path / "runs"))
    place = next(store.glob("tiny/01-knowledge-*"))
    elsewhere = Path(shutil.move(place, tmp_path / "elsewhere"))
    place.symlink_to(elsewhere)
    before = snapshot(elsewhere)
    step = make_plan(chain.pipeline, chain.folder, store).steps[1]
    assert step.artifact is None
    assert step.reason.startswith("damaged since it was published")
    assert set_aside(place).is_symlink()
    assert not place.exists()
    assert snapshot(elsewhere) == before
