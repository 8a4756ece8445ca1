"""`trivium publish` to a folder: what goes, what is refused and with which exit code, and that nothing is lost."""

import errno
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path

import pytest
from unread import Project, flip, released_project

from flows.cli import _run
from flows.engine import Run
from flows.publish import folder as to_a_folder
from flows.publish.command import publish_release
from flows.publish.folder import to_folder
from flows.publish.publication import MANIFEST, VERDICTS, Publication, gather
from specs.base import fingerprint
from stages.approval import decide, questions
from stages.artifact import CARD, sha256
from stages.documents import read_sealed
from stages.errors import GateRefused, InvalidInput, StageFailed, TryAgain
from stages.lock import exclusive


def trivium(*arguments: str | Path) -> tuple[int, str, str]:
    """Exit code, output and errors of the command line, in this process."""
    said, complained = io.StringIO(), io.StringIO()
    with redirect_stdout(said), redirect_stderr(complained):
        code = _run([str(one) for one in arguments])
    return code, said.getvalue(), complained.getvalue()


@pytest.fixture
def released(tmp_path: Path) -> Project:
    """A project whose chain is published to its release, and whose gates pass."""
    return released_project(tmp_path / "project")


def spec(project: Project) -> Path:
    return project.folder / "spec.yaml"


def gathered(project: Project, *, with_warnings: bool = False) -> Publication:
    found, against = gather(Run(spec(project), project.root), with_warnings=with_warnings)
    assert against == []
    assert found is not None
    return found


def publish(project: Project, to: Path | str, *, dry_run: bool = False, with_warnings: bool = False) -> None:
    publish_release(spec(project), project.root, str(to), private=False, with_warnings=with_warnings, dry_run=dry_run)


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def beside(folder: Path) -> list[str]:
    """All that lies in a folder, but for the project."""
    return sorted(str(path) for path in folder.rglob("*") if not path.is_relative_to(folder / "project"))


def release_of(project: Project) -> Path:
    return project.plan().steps[-1].place


def test_a_release_goes_with_its_card_its_verdicts_and_a_sealed_list_of_all_that(released, tmp_path):
    target = tmp_path / "out/model"
    done = trivium("publish", spec(released), "--root", released.root, "--to", target)
    assert done == (0, f"published: {target}\n", "")
    found = everything(target)
    assert set(found) == {"model.safetensors", CARD, VERDICTS, MANIFEST}
    assert found["model.safetensors"] == (release_of(released) / "model/model.safetensors").read_bytes()
    listed = read_sealed(target / MANIFEST)
    assert (listed["pipeline"], listed["identity"]) == ("tiny", released.plan().steps[-1].key)
    assert listed["files"] == {name: sha256(target / name) for name in found if name != MANIFEST}
    verdicts = json.loads(found[VERDICTS])
    assert [stage["stage"] for stage in verdicts["stages"]] == ["knowledge", "answers", "manner"]
    assert [gate["outcome"] for stage in verdicts["stages"] for gate in stage["gates"]] == ["passed"] * 3
    assert [path.name for path in target.parent.iterdir()] == ["model"]
    again = trivium("publish", spec(released), "--root", released.root, "--to", target)
    assert again == (0, f"{target}: holds this release already, with this card\n", "")
    assert everything(target) == found
    assert trivium("gc", released.root) == (0, "nothing to remove\n", "")


def test_a_dry_run_lists_what_would_go_and_writes_nothing(released, tmp_path):
    before = everything(released.folder)
    code, said, _ = trivium("publish", spec(released), "--root", released.root, "--to", tmp_path / "out", "--dry-run")
    assert code == 0
    assert "64 bytes  model.safetensors" in said
    for name in (CARD, VERDICTS, MANIFEST):
        assert name in said
    assert said.splitlines()[-1].startswith(f"would go to {tmp_path / 'out'} as release-")
    assert not (tmp_path / "out").exists()
    assert {name: text for name, text in everything(released.folder).items() if not name.startswith("runs/.")} == {
        name: text for name, text in before.items() if not name.startswith("runs/.")
    }


@pytest.mark.parametrize("place", ["runs", "spec.yaml", "data"])
def test_a_dry_run_says_where_it_cannot_go(released, place):
    target = released.folder / place
    code, said, complained = trivium("publish", spec(released), "--root", released.root, "--to", target, "--dry-run")
    assert code == 2
    assert said.splitlines()[-1].startswith(f"may not go to {target} as release-")
    assert complained.startswith(f"trivium: not published: {target}")


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_gate_that_refuses_ends_with_3_and_its_reason(released, tmp_path, dry_run):
    released.edit(("at_most: 2", "at_most: 1"))
    flag = ["--dry-run"] if dry_run else []
    code, said, complained = trivium(
        "publish", spec(released), "--root", released.root, "--to", tmp_path / "out", *flag
    )
    assert code == 3
    assert complained.startswith("trivium: not published: stage knowledge: domain 1.5 is not at most 1")
    assert ("may not go to" in said) == dry_run
    assert not (tmp_path / "out").exists()


def test_a_gate_that_was_warned_of_refuses_unless_it_is_asked_for_and_the_card_says_so(released, tmp_path):
    released.edit(("at_most: 2, confidence: null}]", "at_most: 1, confidence: null}]\n    on_gate_failure: warn"))
    with pytest.raises(GateRefused, match=r"domain 1\.5 is not at most 1.*; --with-warnings publishes it all the same"):
        publish(released, tmp_path / "out")
    publish(released, tmp_path / "out", with_warnings=True)
    assert "**failed**: domain 1.5 is not at most 1" in (tmp_path / "out" / CARD).read_text()
    assert json.loads((tmp_path / "out" / VERDICTS).read_text())["stages"][0]["gates"][0]["outcome"] == "failed"


def test_with_warnings_does_not_let_pass_what_should_have_stopped_the_run(released, tmp_path):
    released.edit(("at_most: 2", "at_most: 1"))
    with pytest.raises(GateRefused, match=r"domain 1\.5 is not at most 1"):
        publish(released, tmp_path / "out", with_warnings=True)


UNFINISHED: dict[str, tuple[Callable[[Project], object], str]] = {
    "no release": (lambda project: shutil.rmtree(release_of(project)), "not all is made and measured: release; "),
    "an edited stage": (
        lambda project: project.edit(("learning_rate: 5e-3", "learning_rate: 1e-3")),
        "not all is made and measured: knowledge, answers, manner, release; ",
    ),
    "an evaluation that is gone": (
        lambda project: next(project.plan().steps[2].place.glob("evaluation/answers-*")).unlink(),
        "not all is made and measured: answers; ",
    ),
}


@pytest.mark.parametrize(("harm", "said"), UNFINISHED.values(), ids=UNFINISHED)
def test_what_is_not_finished_is_not_published_and_ends_with_2(released, tmp_path, harm, said):
    harm(released)
    with pytest.raises(InvalidInput, match=f"not published: {said}`trivium run` first"):
        publish(released, tmp_path / "out")
    with pytest.raises(InvalidInput, match="not published"):
        publish(released, tmp_path / "out", dry_run=True)
    assert not (tmp_path / "out").exists()


def test_damage_that_the_plan_can_see_ends_with_4(released, tmp_path):
    flip(release_of(released) / "model/model.safetensors")
    with pytest.raises(StageFailed, match=r"model/model\.safetensors was changed; `trivium run` makes it anew"):
        publish(released, tmp_path / "out")


def test_every_byte_is_hashed_again_whatever_the_plan_remembers(released, tmp_path, monkeypatch):
    file = release_of(released) / "model/model.safetensors"
    released.plan()
    known = json.loads(next(released.root.glob("**/.digests.json"), released.root / "none").read_text())
    content = bytearray(file.read_bytes())
    content[0] ^= 1
    file.write_bytes(content)
    status = file.stat()
    stamp = [status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns]
    store = next(released.root.glob("**/.digests.json"))
    store.write_text(json.dumps(known | {str(file.resolve()): [*stamp, known[str(file.resolve())][-1]]}))
    assert released.plan().pending == ()
    with pytest.raises(StageFailed, match=r"model/model\.safetensors was changed"):
        publish(released, tmp_path / "out")


def test_a_file_that_changes_while_it_is_copied_is_not_published(released, tmp_path, monkeypatch):
    publication = gathered(released)
    copy = shutil.copyfile

    def copy_and_change(source, target):
        copy(source, target)
        flip(Path(target))

    monkeypatch.setattr(to_a_folder.shutil, "copyfile", copy_and_change)
    with pytest.raises(StageFailed, match="changed while it was copied; nothing is published"):
        to_folder(publication, tmp_path / "out")
    assert list(tmp_path.glob("*out*")) == []


OTHERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a stranger's folder": (lambda out: (out.mkdir(), (out / "thesis.tex").touch()), "holds no earlier publication"),
    "a file": (lambda out: out.touch(), "a file, and a publication needs a folder"),
    "a model": (lambda out: (out.mkdir(), (out / "config.json").write_text("{}")), "holds no earlier publication"),
    "a link in a folder": (lambda out: (out.mkdir(), (out / "x").symlink_to("/etc")), "neither a regular file"),
}


@pytest.mark.parametrize(("make", "said"), OTHERS.values(), ids=OTHERS)
def test_what_is_no_publication_is_not_replaced(released, tmp_path, make, said):
    make(tmp_path / "out")
    before = beside(tmp_path)
    with pytest.raises(InvalidInput, match=said):
        publish(released, tmp_path / "out")
    assert beside(tmp_path) == before


@pytest.mark.parametrize("place", ["runs", "runs/tiny/x", "."])
def test_a_place_among_the_artifacts_is_refused(released, place):
    with pytest.raises(InvalidInput, match="among the artifacts"):
        publish(released, released.folder / place)


CHANGED: dict[str, Callable[[Path], object]] = {
    CARD: lambda out: (out / CARD).write_text("mine"),
    "notes.md": lambda out: (out / "notes.md").write_text("mine"),
    "x\\n.md": lambda out: (out / "x\n.md").write_text("mine"),
}


@pytest.mark.parametrize(("name", "change"), CHANGED.items(), ids=CHANGED)
def test_what_somebody_changed_or_added_in_a_publication_is_not_lost(released, tmp_path, name, change):
    publish(released, tmp_path / "out")
    change(tmp_path / "out")
    before = everything(tmp_path / "out")
    released.edit(("at_most: 2", "at_most: 3"))
    with pytest.raises(InvalidInput) as caught:
        publish(released, tmp_path / "out")
    assert f"{name}: added or changed since it was published" in str(caught.value)
    assert everything(tmp_path / "out") == before


def test_another_pipelines_publication_is_not_replaced(released, tmp_path):
    publish(released, tmp_path / "out")
    other = released_project(tmp_path / "other", name="another")
    with pytest.raises(InvalidInput, match="holds a publication of pipeline 'tiny'"):
        publish(other, tmp_path / "out")


def test_a_gate_that_is_judged_anew_replaces_the_publication(released, tmp_path):
    publish(released, tmp_path / "out")
    released.edit(("at_most: 2", "at_most: 3"))
    publish(released, tmp_path / "out")
    assert "domain at most 3" in (tmp_path / "out" / CARD).read_text()
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == ["out"]


class Killed(BaseException):
    """What a SIGKILL is to a test that goes on."""


@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("replaced", [False, True])
def test_a_process_that_dies_at_a_rename_leaves_all_or_nothing_and_the_next_one_succeeds(
    released, tmp_path, monkeypatch, at, replaced
):
    out = tmp_path / "out"
    if replaced:
        publish(released, out)
        old = everything(out)
        released.edit(("at_most: 2", "at_most: 3"))
    publication = gathered(released)
    rename, count = Path.rename, iter(range(9))

    def die(self, target):
        if next(count) == at:
            raise Killed
        return rename(self, target)

    with monkeypatch.context() as patch, suppress(Killed):
        patch.setattr(Path, "rename", die)
        patch.setattr(to_a_folder.shutil, "rmtree", lambda *_, **__: None)  # the dead tidy nothing up
        to_folder(publication, out)
    assert next(count) == 1 + min(at, replaced)  # where nothing is replaced, there is one rename only
    if replaced:
        left = out if out.exists() else out.with_name(".out.previous")
        assert everything(left) == old
    publish(released, out)
    assert "domain at most " + ("3" if replaced else "2") in (out / CARD).read_text()
    assert not out.with_name(".out.previous").exists()


def test_what_lies_where_the_earlier_one_would_be_put_is_not_removed_unless_it_is_ours(released, tmp_path):
    publish(released, tmp_path / "out")
    (tmp_path / ".out.previous").mkdir()
    (tmp_path / ".out.previous/thesis.tex").touch()
    released.edit(("at_most: 2", "at_most: 3"))
    with pytest.raises(InvalidInput, match=r"\.out\.previous: is there and holds no earlier publication"):
        publish(released, tmp_path / "out")
    assert (tmp_path / ".out.previous/thesis.tex").exists()


def test_an_earlier_one_that_is_half_removed_is_removed_and_the_rest_of_a_dead_process_too(released, tmp_path):
    publish(released, tmp_path / "out")
    shutil.copytree(tmp_path / "out", tmp_path / ".out.previous")
    (tmp_path / ".out.previous/model.safetensors").unlink()
    shutil.copytree(tmp_path / "out", tmp_path / ".out.trivium-new")
    released.edit(("at_most: 2", "at_most: 3"))
    publish(released, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == ["out"]


def test_a_full_disk_is_told_with_the_place_and_leaves_nothing(released, tmp_path, monkeypatch):
    def full(source, target):
        raise OSError(errno.ENOSPC, "No space left on device", str(source))

    publication = gathered(released)
    monkeypatch.setattr(to_a_folder.shutil, "copyfile", full)
    with pytest.raises(StageFailed, match=r"/out: cannot be written \(No space left on device\); nothing was publ"):
        to_folder(publication, tmp_path / "out")
    assert list(tmp_path.glob("*out*")) == []


def test_two_at_once_do_not_meet(released, tmp_path):
    publication = gathered(released)
    lock = publication.plan.store / ".locks" / f"{fingerprint(str(tmp_path / 'out'))[:16]}.run"
    with exclusive(lock), pytest.raises(TryAgain, match="is being worked on by process"):
        to_folder(publication, tmp_path / "out")


TOKEN = "hf_" + "aB3dE6gH9jK2" * 3


@pytest.mark.parametrize("text", [TOKEN, "correct horse battery"])
def test_a_file_with_a_secret_in_it_is_not_published(tmp_path, monkeypatch, text):
    monkeypatch.setenv("MY_PASSWORD", "correct horse battery")
    project = released_project(tmp_path / "project", files={"model/tokenizer_config.json": json.dumps({"x": text})})
    code, said, complained = trivium("publish", spec(project), "--root", project.root, "--to", tmp_path / "out")
    assert code == 2
    assert "tokenizer_config.json: holds what looks like a" in complained
    assert text not in said + complained
    assert not (tmp_path / "out").exists()


def test_an_adapter_goes_with_the_base_that_it_belongs_on(tmp_path):
    files = {"adapter/adapter_config.json": "{}", "adapter/adapter_model.safetensors": "x", "model/config.json": "{}"}
    project = released_project(tmp_path / "project", files=files, beneath=True)
    publish(project, tmp_path / "out")
    assert set(everything(tmp_path / "out")) == {
        "adapter_config.json", "adapter_model.safetensors", "base/config.json", "base/model.safetensors",
        CARD, VERDICTS, MANIFEST,
    }  # fmt: skip
    text = (tmp_path / "out" / CARD).read_text()
    assert "library_name: peft" in text
    assert 'load(".")' in text


def test_what_lies_beside_the_release_and_is_none_of_it_stays_here(released, tmp_path):
    (release_of(released) / "model/.DS_Store").touch()
    (release_of(released) / "model/notes.md").write_text("private")
    publish(released, tmp_path / "out")
    assert set(everything(tmp_path / "out")) == {"model.safetensors", CARD, VERDICTS, MANIFEST}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--to", "hub:x"], "a place on the hub is hub:OWNER/NAME"),
        (["--to", "hub:"], "a place on the hub is hub:OWNER/NAME"),
        (["--to", "out", "--private"], "--private goes with a place on the hub"),
        (["--to", "hub:a/b"], r"the environment forbids the network (HF_HUB_OFFLINE)"),
        ([], "--to"),
    ],
)
def test_wrong_usage_ends_with_2(released, arguments, said):
    code, told, complained = trivium("publish", spec(released), "--root", released.root, *arguments)
    assert code == 2
    assert said in told + complained
    assert "Traceback" not in complained


def test_it_imports_neither_torch_nor_prefect(released, tmp_path):
    script = (
        "import sys, flows.cli; "
        f"code = flows.cli._run(['publish', {str(spec(released))!r}, '--root', {str(released.root)!r}, '--to', "
        f"{str(tmp_path / 'out')!r}]); assert code == 0, code; "
        "assert not {'torch', 'prefect', 'transformers', 'peft'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_a_person_may_let_it_pass_and_is_named_in_card_and_verdicts(released, tmp_path):
    released.edit(("at_most: 2, confidence: null}]", "at_most: 1, confidence: null}]\n    on_gate_failure: approve"))
    with pytest.raises(GateRefused, match="waits for a person: `trivium approve` or `trivium reject`"):
        publish(released, tmp_path / "out", with_warnings=True)
    plan = released.plan()
    [question] = questions(plan)
    decide(plan, question, "approve", who="Ada <b>", why="the set was *wrong*")
    publish(released, tmp_path / "out")
    said = (tmp_path / "out" / CARD).read_text()
    assert r"**A person decided**: approved by Ada &lt;b&gt; on" in said
    assert r"the set was \*wrong\*" in said
    decision = json.loads((tmp_path / "out" / VERDICTS).read_text())["stages"][0]["decision"]
    assert (decision["answer"], decision["who"]) == ("approve", "Ada <b>")


def test_what_a_person_rejected_is_not_published(released, tmp_path):
    released.edit(("at_most: 2, confidence: null}]", "at_most: 1, confidence: null}]\n    on_gate_failure: approve"))
    plan = released.plan()
    decide(plan, questions(plan)[0], "reject", who="Ada", why="no")
    with pytest.raises(GateRefused, match="rejected by Ada on"):
        publish(released, tmp_path / "out", with_warnings=True)
