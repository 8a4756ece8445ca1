import fcntl
import multiprocessing
import os
import re
import signal
import socket
from contextlib import contextmanager

import pytest

from stages.errors import TryAgain
from stages.lock import exclusive


@contextmanager
def holder(path):
    """A child process that holds the lock until it is killed; gives its pid once it holds it."""
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with exclusive(path):
                os.write(tell, b"held")
                signal.pause()
        finally:
            os._exit(1)
    os.close(tell)
    try:
        assert os.read(ready, 4) == b"held"
        yield child
    finally:
        os.close(ready)
        kill(child)


def kill(child: int) -> None:
    try:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    except (ProcessLookupError, ChildProcessError):
        return


def test_the_second_holder_is_told_who_holds_it(tmp_path):
    path = tmp_path / "locks/01-knowledge-12345678.lock"
    with holder(path) as child, pytest.raises(TryAgain) as caught, exclusive(path):
        pytest.fail("two processes hold one lock")
    assert str(caught.value) == (
        f"01-knowledge-12345678 is being worked on by process {child} on {socket.gethostname()}; "
        "wait for it, then run again"
    )
    assert caught.value.exit_code == 75


def test_a_killed_holder_frees_the_lock(tmp_path):
    path = tmp_path / "a.lock"
    with holder(path) as child:
        kill(child)
        with exclusive(path), pytest.raises(TryAgain) as caught, exclusive(path):
            pytest.fail("two holders of one lock")
    assert f"process {os.getpid()} on" in str(caught.value)


def test_the_loser_does_not_take_the_lock_from_the_holder(tmp_path):
    path = tmp_path / "a.lock"
    with holder(path) as child:
        for _ in range(3):
            with pytest.raises(TryAgain, match=f"process {child} on"), exclusive(path):
                pytest.fail("two holders of one lock")


def test_the_lock_is_free_after_the_work_and_after_a_failure(tmp_path):
    path = tmp_path / "a.lock"
    with exclusive(path):
        pass
    with pytest.raises(ZeroDivisionError), exclusive(path):
        _ = 1 / 0
    with exclusive(path):
        pass


def test_locks_of_two_steps_do_not_meet(tmp_path):
    with holder(tmp_path / "a.lock"), exclusive(tmp_path / "b.lock"):
        assert sorted(file.name for file in tmp_path.iterdir()) == ["a.lock", "b.lock"]


@pytest.mark.parametrize("text", ["", "{", "null", "{}"])
def test_a_lock_that_does_not_say_who_holds_it_is_still_held(tmp_path, text):
    path = tmp_path / "a.lock"
    with holder(path):
        path.write_text(text)
        with pytest.raises(TryAgain, match=re.escape("being worked on by another process")), exclusive(path):
            pytest.fail("two holders of one lock")


def test_a_process_that_the_holder_started_with_exec_does_not_keep_the_lock(tmp_path):
    path = tmp_path / "a.lock"
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    with exclusive(path):
        child = context.Process(target=theirs.recv, daemon=True)
        child.start()
    try:
        with exclusive(path):
            assert child.is_alive()
    finally:
        ours.send(None)
        child.join()
        ours.close()
        theirs.close()
        child.close()


def test_a_lock_that_is_cleared_away_between_opening_and_locking_is_taken_anew(tmp_path, monkeypatch):
    """Its old file would be locked by us, and a new one of the same name by whoever comes next."""
    path = tmp_path / "a.lock"
    lock, cleared = fcntl.flock, []

    def cleared_away_first(file, how):
        if not cleared:
            cleared.append(path)
            path.unlink()
        lock(file, how)

    monkeypatch.setattr(fcntl, "flock", cleared_away_first)
    with exclusive(path), pytest.raises(TryAgain), exclusive(path):
        pytest.fail("two holders of one lock")
    assert cleared == [path]
