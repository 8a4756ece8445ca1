"""What refers to what, what may go, and what `verify` finds: over a project whose weights nobody reads."""

import json
import os
import shutil
from pathlib import Path

import pytest
from unread import NAMES, Project, flip, make_project

from stages import checkpoint
from stages.artifact import LOCKS, SET_ASIDE, WORK, read
from stages.documents import write_json, write_sealed
from stages.errors import InvalidInput, TryAgain
from stages.garbage import find_garbage, remove
from stages.job import write_job
from stages.lock import exclusive
from stages.store import CURRENT, current, remember, root_at
from stages.verify import verify, weigh

RATE = ("learning_rate: 5e-3", "learning_rate: 1e-3")
BACK = RATE[::-1]


@pytest.fixture
def done(tmp_path) -> Project:
    """Everything published, remembered as a run remembers it, the release linked to."""
    project = make_project(tmp_path / "project")
    project.publish(*NAMES)
    ran(project)
    return project


def ran(project: Project) -> None:
    """What a run leaves beside the artifacts."""
    plan = project.plan()
    remember(plan, project.folder / "spec.yaml")
    for step in plan.steps:
        job = plan.job(step)
        file = plan.store / f".jobs/{step.name}-{step.key[:16]}.json"
        write_job(job, file)
        file.with_suffix(".log").write_text("said\n")
        with exclusive(job.lock):
            pass
    link = plan.store / "model"
    link.unlink(missing_ok=True)
    link.symlink_to(Path(plan.steps[-1].place.name) / "model")


def ran_again(project: Project, *edits: tuple[str, str]) -> None:
    project.edit(*edits)
    project.publish(*[step.name for step in project.plan().steps if step.artifact is None])
    ran(project)


def garbage(project: Project) -> set[str]:
    return {str(item.path.relative_to(project.root / "tiny")) for item in find_garbage(project.root).items}


def artifacts(project: Project) -> set[str]:
    return {path.name for path in (project.root / "tiny").glob("[0-9]*")}


def of(found: set[str]) -> set[str]:
    """The artifacts among what was found, by the names of their steps."""
    return {name[3:-9] for name in found if name[0].isdigit()}


def place(project: Project, name: str) -> Path:
    return next(step.place for step in project.plan().steps if step.name == name)


# gc: what refers to what


def test_what_the_last_run_names_is_never_garbage(done):
    assert garbage(done) == set()


def test_what_an_edit_left_behind_goes_and_its_job_and_lock_with_it(done):
    old = artifacts(done)
    before = done.plan()
    ran_again(done, RATE)
    gone = {step.place.name for step in before.steps[1:]}
    files = {f".jobs/{step.name}-{step.key[:16]}.{kind}" for step in before.steps[1:] for kind in ("json", "log")}
    locks = {f".locks/{step.work.name}.lock" for step in before.steps[1:]}
    assert gone < old
    assert garbage(done) == gone | files | locks
    left, stayed = remove(done.root, find_garbage(done.root).items)
    assert (len(left), stayed) == (len(gone | files | locks), [])
    assert garbage(done) == set()
    assert done.plan().pending == ()
    assert artifacts(done) == {step.place.name for step in done.plan().steps}
    assert sorted(path.name for path in (done.root / "tiny" / LOCKS).iterdir()) == sorted(
        f"{step.work.name}.{kind}" for step in done.plan().steps for kind in ("lock",)
    )


def test_an_edit_that_was_taken_back_is_kept_though_no_run_has_seen_it(done):
    ran_again(done, RATE)
    done.edit(BACK)
    assert done.plan().pending == ()
    assert garbage(done) == set()


def test_the_newest_of_each_stage_stays_though_no_spec_names_it(done):
    shutil.rmtree(done.root / "tiny" / CURRENT)
    (done.root / "tiny/model").unlink()
    assert garbage(done) == set()


def test_the_newest_is_told_by_its_number_and_not_by_the_clock(done):
    ran_again(done, RATE)
    new = {step.place.name for step in done.plan().steps}
    shutil.rmtree(done.root / "tiny" / CURRENT)
    for path in (done.root / "tiny").glob("[0-9]*"):
        age = 2e9 if path.name not in new else 1e9
        os.utime(path, (age, age))
    assert of(garbage(done)) == {"knowledge", "answers", "manner", "release"}
    assert not garbage(done) & new


def test_ancestors_of_what_is_kept_are_kept(done):
    """The release of an older spec is still linked to: its whole chain stays."""
    old = {step.place.name for step in done.plan().steps}
    link = (done.root / "tiny/model").readlink()
    ran_again(done, RATE)
    (done.root / "tiny/model").unlink()
    (done.root / "tiny/model").symlink_to(link)
    assert not garbage(done) & old


def test_a_base_beneath_an_adapter_is_kept(done):
    ran_again(done, RATE)
    old = next(path for path in artifacts(done) if path.startswith("01-") and path in garbage(done))
    newest = place(done, "manner")
    manifest = json.loads((newest / "manifest.json").read_text())
    manifest["record"]["beneath"] = {"identity": read(done.root / "tiny" / old).identity, "files": {}}
    from stages.manifest import sealed

    write_json(newest / "manifest.json", sealed(manifest["inputs"], manifest["record"], manifest["files"]))
    assert old not in garbage(done)


def test_two_specs_of_one_pipeline_keep_each_others_artifacts(done):
    second = done.folder / "second.yaml"
    second.write_text((done.folder / "spec.yaml").read_text())
    remember(done.plan(), second)
    ran_again(done, RATE)
    assert garbage(done) == set()
    second.unlink()
    assert garbage(done) == set()
    assert any("second.yaml: this spec is gone" in line for line in find_garbage(done.root).left)
    assert len(list((done.root / "tiny" / CURRENT).iterdir())) == 2


def test_a_project_that_was_moved_as_a_whole_still_protects_what_it_names(done):
    ran_again(done, RATE)
    before = garbage(done)
    moved = Project(done.folder.with_name("moved"))
    shutil.move(done.folder, moved.folder)
    assert current(moved.root / "tiny").gone == ()
    assert garbage(moved) == before


def test_where_a_record_of_a_run_is_broken_nothing_of_the_pipeline_goes(done):
    ran_again(done, RATE)
    [record] = (done.root / "tiny" / CURRENT).iterdir()
    for text in ("", "{}", "[" * 9999, '{"spec": 5, "steps": {}}', '{"spec": "x", "steps": {"a": {"identity": "x"}}}'):
        record.write_text(text)
        assert garbage(done) == set()
        [line] = find_garbage(done.root).left
        assert f"{record}: cannot be read" in line
        assert "run `trivium run` on the specs of tiny, then remove it" in line


def unfinished(project: Project, name: str, steps: tuple[int, ...] = (10,)) -> Path:
    step = next(step for step in project.plan().steps if step.name == name)
    for number in steps:
        folder = step.work / f"checkpoints/checkpoint-{number}"
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"half-way")
        checkpoint.seal(folder)
    return step.work


def test_checkpoints_stay_while_a_spec_goes_on_with_them(done):
    done.edit(RATE)
    work = unfinished(done, "knowledge")
    assert garbage(done) == set(), "the spec as it is now goes on there"
    ran(done)
    done.edit(BACK)
    assert garbage(done) == set(), "the last run goes on there"
    ran(done)
    name = f".work/{work.name}"
    assert name in garbage(done)
    remove(done.root, find_garbage(done.root).items)
    assert not work.exists()
    assert list((done.root / "tiny" / WORK).iterdir()) == []


def test_what_a_crash_after_publishing_left_goes(done):
    work = unfinished(done, "knowledge")
    assert garbage(done) == {f".work/{work.name}"}


def test_without_any_record_of_a_run_checkpoints_stay(done):
    done.edit(RATE)
    work = unfinished(done, "knowledge")
    shutil.rmtree(done.root / "tiny" / CURRENT)
    assert garbage(done) == set()
    assert any(f"{work}: no run has said yet" in line for line in find_garbage(done.root).left)


def test_what_was_set_aside_and_half_written_files_of_dead_processes_go(done):
    store = done.root / "tiny"
    done.edit(RATE)
    ran(done)
    work = unfinished(done, "knowledge")
    aside = [store / SET_ASIDE / "01-old-00000000.1", work / "checkpoints" / SET_ASIDE / "checkpoint-3.1"]
    for folder in aside:
        folder.mkdir(parents=True)
        (folder / "file").write_text("x")
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    base = place(done, "base")
    dead = [store / f".x.json.{child}-00000000.partial", base / f".verdict.json.{child}-00000000.partial"]
    alive = [store / f".y.json.{os.getpid()}-00000000.partial", store / ".notes.partial"]
    for file in (*dead, *alive):
        file.write_text("{")
    found = garbage(done)
    assert found == {str(path.relative_to(store)) for path in (*aside, *dead)}
    assert remove(done.root, find_garbage(done.root).items)[1] == []
    assert all(file.exists() for file in alive)
    assert not any(path.exists() for path in (*aside, *dead))
    assert work.is_dir()


def test_what_is_not_ours_stays(done):
    store = done.root / "tiny"
    kept = [store / "notes", store / ".scans", store / WORK / "mine", store / ".jobs/readme", done.root / "99-notes"]
    for folder in kept:
        folder.mkdir(parents=True)
        (folder / "file").write_text("x")
    ran_again(done, RATE)
    remove(done.root, find_garbage(done.root).items)
    assert all((folder / "file").is_file() for folder in kept)


# gc: locks, links, crashes


def test_a_step_at_work_keeps_its_folder_its_start_and_its_files(done):
    done.edit(("rank: 4", "rank: 8"))
    ran(done)
    work = unfinished(done, "answers")
    plan = done.plan()
    job = plan.job(next(step for step in plan.steps if step.name == "answers"))
    done.edit(("rank: 8", "rank: 4"))
    ran_again(done, RATE)
    old = Path(job.start).name
    assert old in garbage(done), "as long as nobody works on what starts from it"
    with exclusive(job.lock):
        found = find_garbage(done.root)
        names = garbage(done)
        assert old not in names
        assert not any(work.name in name or name.startswith(f".jobs/answers-{job_key(job)}") for name in names)
        assert any(f"{work}: a process works on this step" in line for line in found.left)


def job_key(job) -> str:
    from specs.base import fingerprint

    return fingerprint(job.identity)[:16]


def test_what_is_locked_or_referred_to_between_listing_and_removal_stays(done):
    before = done.plan()
    ran_again(done, RATE)
    listed = find_garbage(done.root).items
    with exclusive(before.job(before.steps[1]).lock):
        gone, stayed = remove(done.root, [item for item in listed if item.path == before.steps[1].place])
    assert gone == []
    assert "is being worked on by process" in stayed[0]
    done.edit(BACK)
    ran(done)
    gone, stayed = remove(done.root, listed)
    assert gone == []
    assert all("referred to by now" in line for line in stayed)
    assert before.steps[1].place.is_dir()


def test_a_lock_that_was_cleared_away_is_not_held_by_two(tmp_path):
    path = tmp_path / "x.lock"
    with exclusive(path):
        path.unlink()
        with exclusive(path), pytest.raises(TryAgain), exclusive(path):
            pytest.fail("held twice")


def test_links_are_not_followed(done, tmp_path):
    outside = tmp_path / "outside"
    shutil.copytree(done.root / "tiny", outside, symlinks=True)
    (done.root / "other").symlink_to(outside)
    ran_again(done, RATE)
    shutil.rmtree(done.root / "tiny/.jobs")
    (done.root / "tiny/.jobs").symlink_to(outside / ".jobs")
    (done.root / "tiny" / SET_ASIDE).mkdir()
    (done.root / "tiny" / SET_ASIDE / "link").symlink_to(outside)
    before = sorted(outside.rglob("*"))
    found = find_garbage(done.root)
    assert f"{done.root / 'other'}: a link, which is not followed" in found.left
    assert remove(done.root, found.items)[1] == []
    assert sorted(outside.rglob("*")) == before
    assert not (done.root / "tiny" / SET_ASIDE).exists()


def test_a_removal_that_breaks_off_leaves_nothing_that_looks_whole(done, monkeypatch):
    before = done.plan()
    ran_again(done, RATE)
    rmtree = shutil.rmtree

    def break_off(path, *_):
        (path / "training.json").unlink()
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(shutil, "rmtree", break_off)
    gone, stayed = remove(done.root, find_garbage(done.root).items)
    assert not any(item.path.is_dir() for item in gone)
    assert sum("Input/output error; remove it by hand" in line for line in stayed) == 4
    assert not any(step.place.exists() for step in before.steps[1:])
    monkeypatch.setattr(shutil, "rmtree", rmtree)
    assert {name.split("/")[0] for name in garbage(done) if "lock" not in name} == {SET_ASIDE}
    assert remove(done.root, find_garbage(done.root).items)[1] == []
    assert done.plan().pending == ()


def test_damaged_artifacts_are_reported_and_stay(done):
    before = done.plan()
    ran_again(done, RATE)
    (before.steps[1].place / "training.json").unlink()
    (before.steps[2].place / "manifest.json").write_text("{")
    found = find_garbage(done.root)
    assert of(garbage(done)) == {"manner", "release"}
    assert f"{before.steps[1].place}: damaged; `trivium verify` says what to do" in found.left
    assert any(line.startswith(f"{before.steps[2].place}: its manifest cannot be read") for line in found.left)


# verify


def report(project: Project):
    read_bytes: list[int] = []
    found = verify(project.root, read_bytes.append)
    return found, sum(read_bytes)


def test_a_whole_store_is_whole_and_what_was_looked_at_is_counted(done):
    work = unfinished(done, "knowledge", (4, 8))
    write_sealed(place(done, "knowledge") / "verdict.json", {"passed": True})
    found, read_bytes = report(done)
    assert found.findings == []
    assert (found.artifacts, found.evaluations, found.verdicts, found.checkpoints, found.bases) == (5, 16, 1, 2, 1)
    assert found.bytes == read_bytes == weigh(done.root)
    assert work.is_dir()


DAMAGES = {
    "flipped": (lambda p: flip(p / "model/model.safetensors"), ["model/model.safetensors was changed"]),
    "truncated": (lambda p: os.truncate(p / "training.json", 1), ["training.json has 1 bytes instead of 2"]),
    "missing": (lambda p: (p / "training.json").unlink(), ["training.json is missing"]),
    "extra": (lambda p: (p / "model/x.py").touch(), ["model/x.py does not belong there"]),
    "manifest": (lambda p: flip(p / "manifest.json", 40), ["its manifest is missing, was changed or cannot be read"]),
    "several": (
        lambda p: ((p / "model/x.py").touch(), (p / "training.json").unlink()),
        ["training.json is missing", "model/x.py does not belong there"],
    ),
}


@pytest.mark.parametrize(("harm", "what"), DAMAGES.values(), ids=DAMAGES)
def test_damage_is_told_file_by_file_with_what_depends_on_it_and_what_to_do(done, harm, what):
    folder = place(done, "answers")
    depends = [place(done, "manner").name, place(done, "release").name, "model (the link to the release)"]
    harm(folder)
    [finding] = report(done)[0].findings
    assert (finding.path, finding.what, finding.depends) == (folder, what, depends)
    assert "`trivium run` on its spec sets it aside and makes it anew" in finding.remedy


def test_what_a_file_browser_or_an_editor_leaves_is_no_finding_and_costs_nothing(done):
    folder = place(done, "answers")
    for name in (".DS_Store", "model/Thumbs.db", "model/desktop.ini", "training.json~", "model/._model.safetensors"):
        (folder / name).touch()
    assert report(done)[0].findings == []
    assert place(done, "answers") == folder
    assert done.plan().pending == ()


def test_a_stray_file_that_no_loader_reads_is_named_and_nothing_is_made_anew(done):
    folder = place(done, "answers")
    (folder / "model/notes.md").touch()
    [finding] = report(done)[0].findings
    assert (finding.path, finding.what) == (folder, ["model/notes.md does not belong there"])
    assert finding.remedy == "remove it: what was published is whole, nothing is made anew"
    assert done.plan().pending == ()


def test_an_edited_base_is_told_by_its_file_and_what_to_do(done):
    file = done.folder / "base/model.safetensors"
    base = place(done, "base")
    flip(file)
    (done.folder / "base/chat_template.jinja").write_text("new")
    [finding] = report(done)[0].findings
    assert finding.path == base
    assert finding.what == [f"{file.with_name('chat_template.jinja')} is new", f"{file} was changed"]
    assert len(finding.depends) == 5
    assert finding.remedy.startswith(f"Put the files of {file.parent} back as they were, or run `trivium run`")


ADDED = {
    "an evaluation was edited": (
        lambda folder: edit(next(folder.glob("evaluation/*")), "n", 3), "not as it was written"
    ),
    "an evaluation is empty": (
        lambda folder: os.truncate(next(folder.glob("evaluation/*")), 0), "not as it was written"
    ),
    "an evaluation of another model": (
        lambda folder: swap(*sorted(folder.glob("evaluation/*"))[:2]), "it is called as another measurement"
    ),
    "an evaluation is a link": (lambda folder: relink(next(folder.glob("evaluation/*"))), "not as it was written"),
    "a verdict was edited": (lambda folder: edit(folder / "verdict.json", "passed", True), "not as it was written"),
    "a verdict is a link": (lambda folder: relink(folder / "verdict.json"), "not as it was written"),
}  # fmt: skip


def edit(file: Path, key: str, value) -> None:
    document = json.loads(file.read_text())
    document["body"][key] = value
    file.write_text(json.dumps(document))


def swap(first: Path, second: Path) -> None:
    shutil.copy(first, second)


def relink(file: Path) -> None:
    file.symlink_to(file.rename(file.with_name(".elsewhere.partial")))


@pytest.mark.parametrize(("harm", "what"), ADDED.values(), ids=ADDED)
def test_what_was_added_after_publishing_is_verified_by_itself(done, harm, what):
    folder = place(done, "knowledge")
    write_sealed(folder / "verdict.json", {"passed": False})
    harm(folder)
    [finding] = report(done)[0].findings
    assert (finding.what, finding.depends) == ([what], [])
    assert "`trivium run`" in finding.remedy


def test_a_damaged_checkpoint_is_told_and_a_torn_one_is_not_counted(done):
    done.edit(RATE)
    work = unfinished(done, "knowledge", (4, 8, 12))
    flip(work / "checkpoints/checkpoint-8/model.safetensors")
    (work / "checkpoints/checkpoint-12/seal.json").unlink()
    found, _ = report(done)
    assert found.checkpoints == 2
    [finding] = found.findings
    assert finding.path == work / "checkpoints/checkpoint-8"
    assert finding.what == ["model.safetensors was changed since it was sealed"]
    assert "sets it aside and resumes at the checkpoint before it" in finding.remedy


def test_a_link_to_a_model_that_is_gone_is_told(done):
    shutil.rmtree(place(done, "release"))
    [finding] = report(done)[0].findings
    assert finding.path == done.root / "tiny/model"


def test_a_folder_with_another_artifacts_name_is_told(done):
    folder = place(done, "answers")
    folder.rename(folder.with_name("02-answers-00000000"))
    [finding] = report(done)[0].findings
    assert "called as another artifact" in finding.what[0]


# Where the store is


def test_the_root_is_found_from_itself_a_project_or_a_spec(done):
    for named in (done.root, done.folder, done.folder / "spec.yaml"):
        assert root_at(named, "runs") == done.root


@pytest.mark.parametrize("named", ["nowhere", "data", "data/corpus.jsonl"])
def test_a_place_without_artifacts_is_refused_with_what_to_name(done, named):
    with pytest.raises(InvalidInput, match="no artifacts there; name the folder that holds them"):
        root_at(done.folder / named, "artifacts")


def test_the_folder_of_one_pipeline_is_refused_with_the_one_above_it(done):
    with pytest.raises(InvalidInput, match=f"name the one above it: {done.root}"):
        root_at(done.root / "tiny", "artifacts")
