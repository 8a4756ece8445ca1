import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from specs.base import fingerprint
from stages import artifact as store
from stages.artifact import (
    Artifact,
    damage,
    find,
    newest_of_stage,
    publish,
    published_in,
    read,
    set_aside,
    strays,
    verified,
)
from stages.documents import write_json
from stages.errors import StageFailed

INPUTS = {"kind": "stage", "seed": 3}


def make_work(folder: Path) -> Path:
    (folder / "model").mkdir(parents=True)
    (folder / "model/model.safetensors").write_bytes(bytes(range(200)))
    (folder / "model/config.json").write_text("{}")
    (folder / "training.json").write_text('{"curve": []}')
    return folder


def publish_in(root: Path, name: str = "01-knowledge", *, inputs: dict | None = None, **record) -> Artifact:
    identity = inputs or INPUTS
    target = root / f"{name}-{fingerprint(identity)[:8]}"
    return publish(make_work(root / ".work" / name), target, identity=identity, record=record)


@pytest.fixture
def published(tmp_path):
    return publish_in(tmp_path)


def test_what_is_published_can_be_read_back(published, tmp_path):
    again = read(published.path)
    assert again == published
    assert again.identity == fingerprint(INPUTS)
    assert again.model == published.path / "model"
    assert set(again.manifest["files"]) == {"model/config.json", "model/model.safetensors", "training.json"}
    assert again.manifest["files"]["model/model.safetensors"]["size"] == 200
    assert damage(again) == []
    assert verified(again) is again
    assert not (tmp_path / ".work/01-knowledge").exists()


def test_a_base_refers_to_its_folder_elsewhere(tmp_path):
    assert publish_in(tmp_path, model_path="/models/base").model == Path("/models/base")


def test_publishing_over_an_artifact_is_refused_and_harms_neither(published, tmp_path):
    work = make_work(tmp_path / "again")
    with pytest.raises(OSError, match="not empty"):
        publish(work, published.path, identity=INPUTS, record={})
    assert damage(published) == []
    assert (work / "model/config.json").exists()


def test_a_link_in_the_work_is_refused_before_anything_appears(tmp_path):
    work = make_work(tmp_path / "work")
    (work / "model/tokenizer.json").symlink_to("/etc/hostname")
    with pytest.raises(StageFailed, match=r"model/tokenizer\.json: neither a regular file nor a folder; remove it"):
        publish(work, tmp_path / "target", identity=INPUTS, record={})
    assert not (tmp_path / "target").exists()


def test_a_record_that_is_no_json_leaves_nothing_published(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        publish(make_work(tmp_path / "work"), tmp_path / "target", identity=INPUTS, record={"loss": float("nan")})
    assert not (tmp_path / "target").exists()


def record_disk_order(monkeypatch) -> list[tuple[str, str]]:
    """What is flushed and renamed, in order, by path (the rename of a partial file by its final name)."""
    seen: list[tuple[str, str]] = []
    fsync, rename, replace = os.fsync, Path.rename, Path.replace

    def note_fsync(descriptor):
        seen.append(("fsync", str(Path(f"/proc/self/fd/{descriptor}").readlink())))
        fsync(descriptor)

    def note(kind, real):
        def noted(self, target):
            seen.append((kind, str(target)))
            return real(self, target)

        return noted

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(Path, "rename", note("rename", rename))
    monkeypatch.setattr(Path, "replace", note("replace", replace))
    return seen


def test_every_byte_is_on_the_disk_before_the_rename_and_the_rename_before_the_end(tmp_path, monkeypatch):
    work, target = make_work(tmp_path / "work"), tmp_path / "store/01-a-00000000"
    seen = record_disk_order(monkeypatch)
    publish(work, target, identity=INPUTS, record={})
    renamed = seen.index(("rename", str(target)))
    manifest = seen.index(("replace", str(work / "manifest.json")))
    contents = [seen.index(("fsync", str(path))) for path in (work / "model/model.safetensors", work / "model")]
    contents += [seen.index(("fsync", str(path))) for path in (work / "model/config.json", work / "training.json")]
    assert max(contents) < manifest
    [partial] = [path for kind, path in seen if kind == "fsync" and ".manifest.json." in path]
    assert seen.index(("fsync", partial)) < manifest
    assert manifest < seen.index(("fsync", str(work))) < renamed
    assert seen[renamed + 1 :] == [("fsync", str(target.parent))]


DAMAGES = {
    "truncated": (
        lambda path: (path / "model/model.safetensors").write_bytes(bytes(range(199))),
        "model/model.safetensors has 199 bytes instead of 200",
    ),
    "grown": (
        lambda path: (path / "training.json").write_text('{"curve": []} '),
        "training.json has 14 bytes instead of 13",
    ),
    "bit flipped": (
        lambda path: (path / "model/model.safetensors").write_bytes(b"\1" + bytes(range(1, 200))),
        "model/model.safetensors was changed",
    ),
    "missing": (lambda path: (path / "model/config.json").unlink(), "model/config.json is missing"),
    "extra": (lambda path: (path / "model/extra.bin").write_bytes(b""), "model/extra.bin does not belong there"),
    "extra above": (lambda path: (path / "notes.txt").write_text("hi"), "notes.txt does not belong there"),
    "a file made a folder": (
        lambda path: ((path / "training.json").unlink(), (path / "training.json").mkdir()),
        "training.json is missing",
    ),
}


@pytest.mark.parametrize(("harm", "complaint"), DAMAGES.values(), ids=DAMAGES)
def test_damage_is_named_and_never_used(published, harm, complaint):
    harm(published.path)
    assert damage(published) == [complaint]
    with pytest.raises(StageFailed) as caught:
        verified(published)
    assert str(caught.value) == (
        f"{published.path}: damaged since it was published: {complaint}. "
        "Run `trivium run` on the spec: the folder is set aside and its step is made anew; "
        "what is published after it and whole is kept"
    )


def test_every_flipped_byte_is_noticed(published):
    for name in published.manifest["files"]:
        file = published.path / name
        whole = file.read_bytes()
        for position in {0, len(whole) // 2, len(whole) - 1}:
            file.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
            assert damage(published) == [f"{name} was changed"]
        file.write_bytes(whole)
    assert damage(published) == []


LEFT_BEHIND = (".DS_Store", "model/Thumbs.db", "model/desktop.ini", "model/config.json~", "model/.config.json.swp")
READ_BY_LOADERS = ("model/model-2.safetensors", "model/modeling.py", "adapter/adapter_config.json", "model/x.JSON")


@pytest.mark.parametrize("name", [*LEFT_BEHIND, "model/._model.safetensors", "#config.json#"])
def test_what_file_browsers_and_editors_leave_behind_is_neither_damage_nor_stray(published, name):
    (published.path / name).write_bytes(b"x")
    assert (damage(published), strays(published)) == ([], [])


@pytest.mark.parametrize("name", READ_BY_LOADERS)
def test_what_a_loader_would_read_stays_damage(published, name):
    (published.path / name).parent.mkdir(exist_ok=True)
    (published.path / name).touch()
    assert (damage(published), strays(published)) == ([f"{name} does not belong there"], [])


def test_what_no_loader_reads_is_a_stray_and_no_damage(published):
    (published.path / "model/notes.md").touch()
    assert (damage(published), strays(published)) == ([], ["model/notes.md"])
    assert verified(published) is published


@pytest.mark.parametrize(("look", "ending"), [(damage, ".json"), (strays, "")])
def test_the_name_of_a_stray_file_forges_no_line_and_moves_no_cursor(published, look, ending):
    (published.path / f"x\x1b[2Jy\nall is whole{ending}").touch()
    [found] = look(published)
    assert "\x1b" not in found
    assert "\n" not in found


def test_all_damage_is_told_at_once(published):
    (published.path / "model/config.json").unlink()
    (published.path / "training.json").write_text("x")
    (published.path / "extra.safetensors").write_text("x")
    assert len(damage(published)) == 3


def test_a_file_replaced_by_a_link_to_the_same_bytes_is_refused(published, tmp_path):
    file = published.path / "model/config.json"
    shutil.copy(file, tmp_path / "same")
    file.unlink()
    file.symlink_to(tmp_path / "same")
    with pytest.raises(StageFailed, match=r"model/config\.json is a link or a device"):
        verified(published)


def test_measurements_and_a_verdict_may_be_added_later(published):
    write_json(published.path / "evaluation/domain-1234.json", {"value": 1})
    write_json(published.path / "verdict.json", {"passed": True})
    assert damage(published) == []
    assert read(published.path) == published


def test_a_verdict_half_written_when_the_process_died_does_not_cost_the_artifact(published):
    def die_before_replace(partial, target):
        os.kill(os.getpid(), signal.SIGKILL)

    killed_in_child(
        lambda patch: (
            patch.setattr(Path, "replace", die_before_replace),
            write_json(published.path / "verdict.json", {"passed": True}),
        )
    )
    assert damage(published) == []
    write_json(published.path / "verdict.json", {"passed": True})
    assert damage(published) == []


def test_only_the_names_themselves_may_be_added_later(published):
    (published.path / "model/verdict.json").write_text("{}")
    (published.path / "evaluations").mkdir()
    (published.path / "evaluations/a.json").write_text("{}")
    assert sorted(damage(published)) == [
        "evaluations/a.json does not belong there",
        "model/verdict.json does not belong there",
    ]


def reseal(path: Path, edit) -> None:
    """Change a manifest and seal it again, as somebody who knows how it is done would."""
    manifest = json.loads((path / "manifest.json").read_text())
    edit(manifest)
    del manifest["seal"]
    (path / "manifest.json").write_text(json.dumps(manifest | {"seal": fingerprint(manifest)}))


def edit_manifest(path: Path, **changes) -> None:
    document = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(document | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"identity": "0" * 64},
        {"inputs": INPUTS | {"seed": 4}},
        {"format": 2},
        {"files": ["model/config.json"]},
    ],
)
def test_a_manifest_that_contradicts_itself_is_none(published, changes):
    edit_manifest(published.path, **changes)
    assert read(published.path) is None


def test_a_manifest_whose_record_was_edited_is_not_believed(published):
    """The record says where a base's weights are and how far a merge was off: it is as much evidence as a hash."""
    edit_manifest(published.path, record={"model_path": "/somewhere/else"})
    again = read(published.path)
    assert again is None or damage(again)


def test_a_manifest_without_an_entry_does_not_hide_the_file(published):
    files = {name: entry for name, entry in published.manifest["files"].items() if name != "training.json"}
    edit_manifest(published.path, files=files)
    again = read(published.path)
    assert again is None or damage(again) == ["training.json does not belong there"]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '"text"', "{}", '{"format": 1}', '{"format": 1, "identity": 5}']
)
def test_a_manifest_that_is_none_is_no_artifact(published, text):
    (published.path / "manifest.json").write_text(text)
    assert read(published.path) is None
    assert find(published.path.parent, published.identity) is None


def test_a_manifest_of_bytes_or_a_missing_one_is_no_artifact(published, tmp_path):
    (published.path / "manifest.json").write_bytes(b"\xff\xfe")
    assert read(published.path) is None
    (published.path / "manifest.json").unlink()
    assert read(published.path) is None
    assert read(tmp_path / "nowhere") is None


def test_an_artifact_is_found_by_identity_whatever_it_is_called(published):
    renamed = published.path.with_name(f"07-other-{published.identity[:8]}")
    published.path.rename(renamed)
    assert find(renamed.parent, published.identity).path == renamed


def test_an_artifact_of_a_colliding_short_name_is_passed_over(published, tmp_path):
    other = publish_in(tmp_path, "00-other", inputs={"kind": "other"})
    other.path.rename(published.path.with_name(f"00-aaa-{published.identity[:8]}"))
    assert find(tmp_path, published.identity).path == published.path


def test_what_is_unfinished_or_set_aside_is_never_found(published, tmp_path):
    make_work(tmp_path / f"02-half-{published.identity[:8]}")
    moved = set_aside(published.path)
    assert find(tmp_path, published.identity) is None
    assert newest_of_stage(tmp_path, "knowledge") is None
    assert damage(read(moved)) == []
    assert find(tmp_path / "no-such-store", published.identity) is None


def test_the_newest_of_a_stage_is_the_one_published_last_whatever_the_clock_said(tmp_path):
    for number, when in enumerate(["2026-01-02T00:00:00", "2036-03-01T00:00:00", "2016-02-01T00:00:00"]):
        publish_in(tmp_path, "01-knowledge", inputs={"seed": number}, published=when)
    publish_in(tmp_path, "02-knowledge-two", inputs={"seed": 9}, published="2046-01-01T00:00:00")
    assert newest_of_stage(tmp_path, "knowledge").manifest["inputs"] == {"seed": 2}
    assert newest_of_stage(tmp_path, "two") is None
    assert [one.number for one in published_in(tmp_path)] == [1, 2, 3, 4]


def test_a_manifest_from_before_there_were_numbers_counts_as_the_oldest(tmp_path):
    old = publish_in(tmp_path, inputs={"seed": 0})
    reseal(old.path, lambda manifest: manifest["record"].pop("number"))
    publish_in(tmp_path, inputs={"seed": 1})
    assert read(old.path).number == 0
    assert newest_of_stage(tmp_path, "knowledge").manifest["inputs"] == {"seed": 1}


def test_setting_aside_twice_keeps_both(tmp_path):
    for content in "ab":
        (tmp_path / "thing").mkdir()
        (tmp_path / "thing/file").write_text(content)
        set_aside(tmp_path / "thing")
    kept = sorted(path.read_text() for path in (tmp_path / ".set-aside").glob("*/file"))
    assert kept == ["a", "b"]
    assert not (tmp_path / "thing").exists()


def test_a_reader_sees_the_old_document_until_the_new_one_is_whole(tmp_path, monkeypatch):
    file = tmp_path / "state.json"
    write_json(file, {"n": 1})
    during = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (during.append(json.loads(file.read_text())), fsync(fd)))
    write_json(file, {"n": 2})
    assert during[0] == {"n": 1}
    assert json.loads(file.read_text()) == {"n": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["state.json"]


def test_a_document_that_cannot_be_written_leaves_the_old_one(tmp_path):
    write_json(tmp_path / "state.json", {"n": 1})
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "state.json", {"n": float("inf")})
    assert json.loads((tmp_path / "state.json").read_text()) == {"n": 1}


def test_two_writers_of_one_document_do_not_meet(tmp_path, monkeypatch):
    """Two plans of one root keep their digests in the same file: the second starts while the first writes."""
    file = tmp_path / "state.json"
    fsync = os.fsync
    nested = []

    def interleave(descriptor):
        if not nested:
            nested.append(True)
            write_json(file, {"writer": "second"})
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", interleave)
    write_json(file, {"writer": "first"})
    assert json.loads(file.read_text())["writer"] in {"first", "second"}


def killed_in_child(action) -> None:
    """Run ``action`` in a forked child that is expected to end by SIGKILL."""
    child = os.fork()
    if child == 0:
        try:
            action(pytest.MonkeyPatch())
        finally:
            os._exit(9)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def before_manifest(patch):
    patch.setattr(store, "write_json", die)


def inside_manifest(patch):
    patch.setattr(Path, "replace", die)


def before_rename(patch):
    patch.setattr(Path, "rename", die)


def after_rename(patch):
    rename = Path.rename
    patch.setattr(Path, "rename", lambda self, target: (rename(self, target), die()))


@pytest.mark.parametrize("step", [before_manifest, inside_manifest, before_rename])
def test_a_publish_killed_before_the_rename_leaves_nothing_and_can_be_repeated(tmp_path, step):
    work, target = make_work(tmp_path / ".work/a"), tmp_path / f"01-a-{fingerprint(INPUTS)[:8]}"
    killed_in_child(lambda patch: (step(patch), publish(work, target, identity=INPUTS, record={})))
    assert not target.exists()
    assert find(tmp_path, fingerprint(INPUTS)) is None
    again = publish(work, target, identity=INPUTS, record={})
    assert damage(again) == []


def test_a_publish_killed_after_the_rename_leaves_everything(tmp_path):
    work, target = make_work(tmp_path / ".work/a"), tmp_path / f"01-a-{fingerprint(INPUTS)[:8]}"
    killed_in_child(lambda patch: (after_rename(patch), publish(work, target, identity=INPUTS, record={})))
    assert damage(find(tmp_path, fingerprint(INPUTS))) == []
    assert not work.exists()
