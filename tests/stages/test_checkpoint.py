import json
import os
import shutil
from pathlib import Path

import pytest

from stages.checkpoint import by_step, damage, newest_step, prune, resume_from, seal, step_of

FILES = {
    "model.safetensors": b"weights",
    "optimizer.pt": b"moments",
    "rng/state_0.pth": b"dice",
    "trainer_state.json": b"{}",
}


def make(folder: Path, step: int, *, sealed: bool = True) -> Path:
    checkpoint = folder / f"checkpoint-{step}"
    for name, content in FILES.items():
        (checkpoint / name).parent.mkdir(parents=True, exist_ok=True)
        (checkpoint / name).write_bytes(content + str(step).encode())
    if sealed:
        seal(checkpoint)
    return checkpoint


def names(paths) -> list[str]:
    return [path.name for path in paths]


def test_a_checkpoint_counts_only_when_it_is_sealed(tmp_path):
    checkpoint = make(tmp_path, 5, sealed=False)
    assert damage(checkpoint) is not None
    seal(checkpoint)
    assert damage(checkpoint) is None
    assert set(json.loads((checkpoint / "seal.json").read_text())) == set(FILES)


def test_sealing_again_after_a_change_makes_it_whole_again(tmp_path):
    checkpoint = make(tmp_path, 5)
    (checkpoint / "extra.json").write_text("{}")
    assert damage(checkpoint) is not None
    seal(checkpoint)
    assert damage(checkpoint) is None


@pytest.mark.parametrize("name", [*FILES, "seal.json"])
def test_a_checkpoint_without_one_of_its_files_is_torn(tmp_path, name):
    checkpoint = make(tmp_path, 5)
    (checkpoint / name).unlink()
    assert damage(checkpoint) is not None


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("position", [0, -1])
def test_a_flipped_byte_is_noticed(tmp_path, name, position):
    file = make(tmp_path, 5) / name
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)
    assert damage(tmp_path / "checkpoint-5") is not None


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file_is_noticed(tmp_path, name):
    file = make(tmp_path, 5) / name
    os.truncate(file, 1)
    assert damage(tmp_path / "checkpoint-5") is not None


@pytest.mark.parametrize("name", ["extra.bin", "rng/extra.bin", "new/extra.bin"])
def test_a_file_too_many_is_noticed(tmp_path, name):
    file = make(tmp_path, 5) / name
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(b"")
    assert damage(tmp_path / "checkpoint-5") is not None


def test_a_file_replaced_by_a_link_is_noticed(tmp_path):
    file = make(tmp_path, 5) / "optimizer.pt"
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    assert damage(tmp_path / "checkpoint-5") is not None


@pytest.mark.parametrize(
    "text", ["", "{", "null", "5", "[]", '["model.safetensors"]', '{"model.safetensors": 5}', "\udcff"]
)
def test_a_seal_that_is_none_is_no_seal(tmp_path, text):
    checkpoint = make(tmp_path, 5)
    (checkpoint / "seal.json").write_text(text, errors="surrogateescape")
    assert damage(checkpoint) is not None


def test_a_seal_that_lists_the_names_without_their_hashes_is_no_seal(tmp_path):
    checkpoint = make(tmp_path, 5)
    (checkpoint / "seal.json").write_text(json.dumps(sorted(FILES)))
    assert resume_from(tmp_path, 4).checkpoint is None


@pytest.fixture
def sealing(tmp_path, monkeypatch):
    """Seals a checkpoint; gives it, what was flushed before the seal appeared, and all that was flushed, in order."""
    checkpoint = make(tmp_path, 5, sealed=False)
    synced, at_seal = [], []
    fsync, replace = os.fsync, Path.replace

    def note(descriptor):
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink())
        fsync(descriptor)

    def note_replace(self, target):
        at_seal.extend(synced)
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(Path, "replace", note_replace)
    seal(checkpoint)
    return checkpoint, at_seal, synced


def test_the_seal_is_written_after_every_file_is_on_the_disk(sealing):
    checkpoint, at_seal, synced = sealing
    assert {checkpoint / name for name in FILES} <= set(at_seal)
    assert synced[-1] == checkpoint


def test_the_folders_inside_a_checkpoint_are_on_the_disk_before_the_seal(sealing):
    checkpoint, at_seal, _ = sealing
    assert checkpoint / "rng" in at_seal


@pytest.mark.parametrize(
    ("name", "step"), [("checkpoint-7", 7), ("checkpoint-120", 120), ("checkpoint-x", -1), ("other", -1)]
)
def test_the_step_is_in_the_name(name, step):
    assert step_of(Path("folder") / name) == step


def test_the_newest_is_the_highest_step_however_names_and_clocks_sort(tmp_path):
    for age, step in enumerate([1000, 90, 200]):
        os.utime(make(tmp_path, step), (age * 1000, age * 1000))
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "runs").mkdir()
    assert names(by_step(tmp_path)) == ["checkpoint-1000", "checkpoint-200", "checkpoint-90"]
    assert resume_from(tmp_path, 4).checkpoint == tmp_path / "checkpoint-1000"
    assert newest_step(tmp_path) == 1000


def test_where_there_is_none_a_run_starts_at_zero(tmp_path):
    assert resume_from(tmp_path, 4).checkpoint is None
    assert resume_from(tmp_path / "missing", 4).checkpoint is None
    assert newest_step(tmp_path / "missing") == 0
    make(tmp_path, 5, sealed=False)
    assert newest_step(tmp_path) == 0


def test_damaged_ones_are_set_aside_and_named_and_an_older_one_is_chosen(tmp_path, capsys):
    for step in (4, 8, 12, 16):
        make(tmp_path, step, sealed=step != 16)
    (tmp_path / "checkpoint-12/optimizer.pt").write_bytes(b"moments!?")
    assert resume_from(tmp_path, 4).checkpoint == tmp_path / "checkpoint-8"
    assert names(by_step(tmp_path)) == ["checkpoint-8", "checkpoint-4"]
    assert sorted(names((tmp_path / ".set-aside").iterdir())) == ["checkpoint-12.1", "checkpoint-16.1"]
    told = capsys.readouterr().err
    for step, why in ((16, "torn: the process ended before it was sealed"), (12, "damaged: optimizer.pt was changed")):
        place = tmp_path / f".set-aside/checkpoint-{step}.1"
        [line] = [line for line in told.splitlines() if line.startswith(f"checkpoint checkpoint-{step} is {why}")]
        assert line.endswith(f"; set aside as {place}")


@pytest.mark.parametrize(
    ("harm", "why"),
    [
        (lambda place: (place / "seal.json").unlink(), "torn: the process ended before it was sealed"),
        (lambda place: (place / "optimizer.pt").unlink(), "damaged: optimizer.pt is missing"),
        (lambda place: (place / "more.bin").touch(), "damaged: more.bin does not belong there"),
        (lambda place: (place / "rng/state_0.pth").write_bytes(b"?"), "damaged: rng/state_0.pth was changed since"),
        (lambda place: (place / "seal.json").write_text("[]"), "damaged: seal.json is no seal"),
        (lambda place: (place / "seal.json").write_text("{"), "damaged: seal.json is no seal"),
    ],
)
def test_what_is_wrong_with_a_checkpoint_is_said(harm, why, tmp_path):
    checkpoint = make(tmp_path, 5)
    assert damage(checkpoint) is None
    harm(checkpoint)
    assert str(damage(checkpoint)).startswith(why)


@pytest.mark.parametrize(
    ("steps", "line"),
    [
        ((), ""),
        (("4",), "resuming at step 4 of 20: at most 4 steps are trained again"),
        (("4", "8"), "resuming at step 8 of 20: at most 4 steps are trained again"),
        (("4", "8", "9 torn"), "resuming at step 8 of 20: at most 1 step is trained again"),
        (("4", "8 torn"), "resuming at step 4 of 20: at most 4 steps are trained again"),
        (("4", "8 damaged"), "resuming at step 4 of 20: at most 8 steps are trained again"),
        (("4", "8 damaged", "12 torn"), "resuming at step 4 of 20: at most 8 steps are trained again"),
        (("4 damaged", "8 damaged"), "starting over at step 1 of 20: no whole checkpoint is left"),
        (("4 torn",), "starting over at step 1 of 20: no whole checkpoint is left"),
        (("18",), "resuming at step 18 of 20: at most 2 steps are trained again"),
        (("16", "20"), "resuming at step 20 of 20: no step is trained again"),
    ],
)
def test_a_resume_says_how_much_is_trained_again(steps, line, tmp_path):
    for step, _, state in (step.partition(" ") for step in steps):
        checkpoint = make(tmp_path, int(step), sealed=state != "torn")
        if state == "damaged":
            (checkpoint / "optimizer.pt").write_bytes(b"?")
    assert resume_from(tmp_path, every=4).line(20) == line


def test_a_resume_that_finds_only_damage_starts_anew_and_keeps_the_evidence(tmp_path):
    for _ in range(2):
        checkpoint = make(tmp_path, 4)
        (checkpoint / "model.safetensors").unlink()
        assert resume_from(tmp_path, 4).checkpoint is None
    assert sorted(names((tmp_path / ".set-aside").iterdir())) == ["checkpoint-4.1", "checkpoint-4.2"]


def test_a_stray_file_of_a_checkpoints_name_is_set_aside(tmp_path):
    make(tmp_path, 4)
    (tmp_path / "checkpoint-9").write_text("")
    assert resume_from(tmp_path, 4).checkpoint == tmp_path / "checkpoint-4"


def test_pruning_keeps_the_highest_steps_though_the_clock_went_backwards(tmp_path):
    for step in (2, 4, 10, 100):
        when = 1_000_000 - step
        checkpoint = make(tmp_path, step)
        for path in [checkpoint, *checkpoint.rglob("*")]:
            os.utime(path, (when, when))
    prune(tmp_path, keep=2)
    assert names(by_step(tmp_path)) == ["checkpoint-100", "checkpoint-10"]
    assert all(damage(path) is None for path in by_step(tmp_path))


def test_pruning_does_not_count_a_torn_checkpoint_as_one_that_is_kept(tmp_path):
    for step in (2, 4, 6):
        make(tmp_path, step)
    make(tmp_path, 8, sealed=False)
    prune(tmp_path, keep=2)
    assert resume_from(tmp_path, 4).checkpoint == tmp_path / "checkpoint-6"
    assert damage(tmp_path / "checkpoint-4") is None
    assert not (tmp_path / "checkpoint-2").exists()


def test_pruning_fewer_than_it_keeps_deletes_nothing(tmp_path):
    make(tmp_path, 2)
    prune(tmp_path, keep=2)
    assert damage(tmp_path / "checkpoint-2") is None


def test_a_pruning_that_breaks_off_leaves_no_checkpoint_that_looks_whole(tmp_path, monkeypatch):
    for step in (2, 4):
        make(tmp_path, step)

    def break_off(path):
        raise OSError(f"{path}: input/output error")

    monkeypatch.setattr(shutil, "rmtree", break_off)
    with pytest.raises(OSError, match="checkpoint-2"):
        prune(tmp_path, keep=1)
    assert damage(tmp_path / "checkpoint-2") is not None
    assert damage(tmp_path / "checkpoint-4") is None
