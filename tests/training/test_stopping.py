"""Runs that are asked to stop, or can no longer write: a last checkpoint, one line, the right exit code."""

import os
import resource
import shlex
import signal
import subprocess
import sys
import threading

import pytest

from protomem_kernels.training import checkpoints, faces, loop, steps
from protomem_kernels.training.config import config_from, read_toml
from protomem_kernels.training.errors import RunError
from protomem_kernels.training.stopping import ASKING, RunStopped, StopSignals
from tests.training import killed
from tests.training.running import assert_refused, figures, protomem, train


@pytest.fixture(autouse=True)
def as_in_a_terminal():
    """Let signals ask, also where what started the tests has them ignored, as a shell has SIGINT in the background."""
    before = {number: signal.getsignal(number) for number in ASKING}
    for number in ASKING:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def advance_and(monkeypatch, step, do):
    """Have a run do something within the step that comes after ``step``."""
    advance = steps.Training.advance

    def advance_and_do(self, images, labels):
        if self.step == step:
            do()
        return advance(self, images, labels)

    monkeypatch.setattr(steps.Training, "advance", advance_and_do)


@pytest.mark.parametrize(
    ("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)] if hasattr(signal, "SIGHUP") else []
)
def test_a_run_that_is_asked_to_stop_saves_its_step_and_says_how_to_go_on(tiny, tmp_path, monkeypatch, name, code):
    assert train(tiny, "--name", "calm").exit_code == 0
    before = signal.getsignal(getattr(signal, name))
    with monkeypatch.context() as patch:
        advance_and(patch, 2, lambda: signal.raise_signal(getattr(signal, name)))
        result = train(tiny, "--name", "a name", "--checkpoint-every", 100)
    assert result.exit_code == code
    assert signal.getsignal(getattr(signal, name)) == before
    line, command = result.stderr.removesuffix("\n").split("; go on with: ")
    assert line == f"stopped by {name} after step 3 of 4"
    assert checkpoints.load_checkpoint(tmp_path / "runs" / "a name" / "checkpoint.pt")["step"] == 3
    program, *arguments = shlex.split(command)
    assert program == "protomem"
    assert protomem(*arguments).exit_code == 0
    assert killed.difference(tmp_path / "runs" / "a name", tmp_path / "runs" / "calm") is None


def test_one_ctrl_c_that_comes_twice_does_not_break_off_the_checkpoint(tiny, tmp_path, monkeypatch):
    def twice():
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)

    advance_and(monkeypatch, 1, twice)
    assert train(tiny, "--name", "twice").exit_code == 130
    assert checkpoints.load_checkpoint(tmp_path / "runs" / "twice" / "checkpoint.pt")["step"] == 2


def test_a_second_ctrl_c_breaks_off_at_once(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("protomem_kernels.training.stopping.ONCE", -1.0)

    def insist():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    advance_and(monkeypatch, 3, insist)
    result = train(tiny, "--name", "hurry")
    assert result.exit_code == 130
    assert checkpoints.load_checkpoint(tmp_path / "runs" / "hurry" / "checkpoint.pt")["step"] == 2


def test_stopped_before_the_first_step_and_while_it_is_verified(tiny, tmp_path, monkeypatch):
    def interrupt(*arguments, **options):
        signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(faces.Faces, "__init__", interrupt)
        result = train(tiny, "--name", "early")
    assert (result.exit_code, result.stderr) == (143, "stopped by SIGTERM before the first step\n")
    assert not (tmp_path / "runs").exists()
    with monkeypatch.context() as patch:
        patch.setattr(loop, "report", interrupt)
        result = train(tiny, "--name", "late")
    assert result.exit_code == 143
    assert result.stderr.startswith("stopped by SIGTERM while it was verified; go on with: protomem train --resume")
    assert train(tiny, "--name", "late", "--resume").exit_code == 0


def test_from_python_it_is_a_keyboard_interrupt(tiny, monkeypatch):
    advance_and(monkeypatch, 1, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt, match="stopped by SIGINT after step 2 of 4; go on with: protomem train"):
        loop.run_training(config_from(read_toml(tiny), ""))


def test_what_is_ignored_stays_so():
    """``nohup`` has a run outlive its terminal."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            signal.raise_signal(signal.SIGINT)
        assert signals.heard is None
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_in_another_thread_signals_are_left_alone():
    seen = []

    def enter():
        with StopSignals() as signals:
            seen.append(signals._before)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [{}]


def test_a_scheduler_sends_it_to_the_processes_that_read_images_too(tmp_path):
    """A whole process group is asked; the run has its workers for the step that it is in, and they end with it."""
    runs = killed.prepare(tmp_path)
    code = f"""
from protomem_kernels.training import faces
faces.IN_MEMORY = 0
from protomem_kernels.cli import main
import sys
sys.argv = ["protomem", "train", "--config", {str(tmp_path / "tiny.toml")!r}, "--name", "group", "--workers", "2",
            "--steps", "100000", "--checkpoint-every", "1"]
main()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while process.poll() is None and not (runs / "group" / "checkpoint.pt").exists():
        threading.Event().wait(0.01)
    os.killpg(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143, errors
    assert errors.startswith("stopped by SIGTERM after step ")
    assert errors.count("\n") == 1
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


class Deaf(loop.Observer):
    """An observer whose output is closed in one of its methods."""

    def __init__(self, method):
        setattr(self, method, self.close)

    def close(self, *what):
        raise BrokenPipeError(32, "Broken pipe")


def test_an_output_that_is_closed(tiny, tmp_path):
    def config(name):
        return config_from({**read_toml(tiny), "name": name}, "")

    with pytest.raises(RunError, match="cannot show the run: Broken pipe"):
        loop.run_training(config("begin"), watch=Deaf("begin"))
    with pytest.raises(
        RunError, match=r"cannot show .* \(Broken pipe\), stopped after step 1 of 4; go on with: protomem"
    ):
        loop.run_training(config("show"), watch=Deaf("show"))
    assert checkpoints.load_checkpoint(tmp_path / "runs" / "show" / "checkpoint.pt")["step"] == 1
    for method in ("end", "result"):
        with pytest.raises(
            RunError, match=r"the run is done but cannot be shown .Broken pipe.; its figures are in .*json"
        ):
            loop.run_training(config(method), watch=Deaf(method))
        assert figures(tmp_path / "runs" / method)["steps"] == 4


def test_a_closed_standard_output_is_one_line(tmp_path):
    killed.prepare(tmp_path)
    command = [sys.executable, "-m", "protomem_kernels", "train", "--config", str(tmp_path / "tiny.toml")]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (2, "error: cannot show the run: Broken pipe\n")


@pytest.mark.parametrize("grows", ["checkpoint", "tensorboard"])
def test_a_full_disk_leaves_the_last_checkpoint_whole(tiny, tmp_path, monkeypatch, grows):
    """A limit on the size of files stands for the disk: what is written beyond it fails."""
    whole = [resource.RLIM_INFINITY, resource.RLIM_INFINITY]
    limit = {"checkpoint": 50_000, "tensorboard": 100}[grows]

    def fill():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, whole[1]))

    save = checkpoints.save_checkpoint

    def save_without_limit(path, content):  # on a disk of its own
        resource.setrlimit(resource.RLIMIT_FSIZE, tuple(whole))
        save(path, content)

    if grows == "tensorboard":
        monkeypatch.setattr(checkpoints, "save_checkpoint", save_without_limit)
    advance_and(monkeypatch, 2, fill)
    try:
        result = train(tiny, "--name", "full", "--steps", 300)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, tuple(whole))
    folder = tmp_path / "runs" / "full"
    if grows == "checkpoint":
        expected = (
            "checkpoint.pt: File too large; the checkpoint of step 2 is whole, go on with: protomem train --resume"
        )
        assert checkpoints.load_checkpoint(folder / "checkpoint.pt")["step"] == 2
    else:
        expected = "cannot show the run any more (File too large), stopped after step"
        assert checkpoints.load_checkpoint(folder / "checkpoint.pt")["step"] < 300
    assert_refused(result, expected)
    assert not list(folder.glob(".writing-*"))


def test_the_exit_code_is_a_shells():
    assert RunStopped(signal.SIGTERM, "").exit_code == 143
