"""One run at a time in a folder, whatever ends the one before."""

import errno
import os

import pytest

from protomem_kernels.training import locks
from protomem_kernels.training.errors import RunError
from protomem_kernels.training.locks import locked
from tests.training import killed
from tests.training.running import assert_refused, protomem, stop_after, train


def test_a_second_run_in_a_folder_is_refused_and_takes_nothing_away(tiny, tmp_path):
    stop_after(tmp_path, tiny, 2, "--name", "shared")
    folder = tmp_path / "runs" / "shared"
    writing = folder / ".writing-1-checkpoint.pt"
    writing.write_text("the first run is at it")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with locked(folder):
        message = f"shared is in use by process {os.getpid()} on ", "wait until it is done or stop it"
        assert_refused(train(tiny, "--name", "shared", "--resume"), *message)
        assert_refused(train(tiny, "--name", "shared", "--resume", "--steps", 9), *message)
    after = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != locks.LOCK}
    assert after == {name: content for name, content in before.items() if name != locks.LOCK}
    assert train(tiny, "--name", "shared", "--resume").exit_code == 0


def test_a_lock_ends_with_the_process_that_holds_it(tmp_path):
    runs = killed.prepare(tmp_path)
    folder = runs / "held"
    holder = killed.start(folder, "--workers", 0)
    try:
        killed.wait_for_step(folder, 1, holder)
        resume = ["train", "--resume", "--name", "held", "--runs-dir", runs]
        assert_refused(protomem(*resume), f"in use by process {holder.pid} on ")
    finally:
        holder.kill()
        holder.join()
    with locked(folder):
        pass


def test_a_process_that_outlives_the_holder_holds_nothing(tmp_path):
    """As one that reads images may, after a kill."""
    ready, go = os.pipe(), os.pipe()
    with locked(tmp_path):
        child = os.fork()
        if child == 0:
            os.write(ready[1], b".")
            os.read(go[0], 1)
            os._exit(0)
        os.read(ready[0], 1)
    try:
        with locked(tmp_path):
            pass
    finally:
        os.write(go[1], b".")
        os.waitpid(child, 0)


def test_a_fresh_run_holds_its_folder_too(tiny, tmp_path, monkeypatch):
    from protomem_kernels.training import loop

    def try_it(run):
        with pytest.raises(RunError, match="in use"), locked(run.folder):
            pass
        return {}

    monkeypatch.setattr(loop.Run, "to_its_end", try_it)
    assert train(tiny).exit_code == 0


def test_where_there_are_no_locks_a_warning_says_so(tmp_path, monkeypatch):
    def none(number):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks, "_take", none)
    with (
        pytest.warns(UserWarning, match="cannot be locked .No locks available.: see that no second run"),
        locked(tmp_path),
    ):
        pass


def test_a_folder_that_cannot_be_written(tmp_path):
    with pytest.raises(RunError, match=r"cannot write to .*gone"), locked(tmp_path / "gone"):
        pass
