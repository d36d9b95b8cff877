"""A run that was broken off, by whatever, goes on to the undisturbed run's figures."""

import random
import signal
import subprocess
import sys
import time

import pytest
import torch

from protomem_kernels.training import checkpoints
from tests.training.running import assert_refused, figures, stop_after, train


@pytest.mark.parametrize(
    "flags",
    [
        ("--prototype-gradient", "fresh", "--margin", "cosface", "--policy", "lru"),
        ("--prototype-gradient", "memory", "--mining", "curricular"),
        ("--quality", "norm", "--margin", "adaface", "--mining", "hard-samples"),
        ("--quality", "center", "--mining", "mv-softmax", "--capacity", "4"),
        ("--mining", "hardest-negatives", "--augmentation", "0"),
        ("--mining", "noisy-negatives", "--refresh-ratio", "1"),
    ],
)
def test_every_loss_option_trains_and_resumes(tiny, tmp_path, flags):
    assert train(tiny, "--name", "whole", *flags).exit_code == 0
    whole = figures(tmp_path / "runs" / "whole")
    stop_after(tmp_path, tiny, 2, "--name", "halves", *flags)
    assert train(tiny, "--name", "halves", "--resume", *flags).exit_code == 0
    assert figures(tmp_path / "runs" / "halves") == whole


def test_sigkill_and_resume_give_the_undisturbed_figures(tiny, tmp_path):
    options = ("--steps", 120, "--checkpoint-every", 10)
    assert train(tiny, "--name", "calm", *options).exit_code == 0
    folder = tmp_path / "runs" / "killed"
    command = ["train", "--config", tiny, "--name", "killed", *options]
    process = subprocess.Popen(
        [sys.executable, "-c", "from protomem_kernels.cli import main; main()", *map(str, command)],
        stdout=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while not (folder / "checkpoint.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(random.uniform(0, 0.5))
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    killed_after = checkpoints.load_checkpoint(folder / "checkpoint.pt")["step"]
    assert 10 <= killed_after < 120
    (folder / ".writing-1-checkpoint.pt").write_text("as a kill in the middle of a write leaves it")
    result = train(tiny, "--name", "killed", "--resume", *options)
    assert result.exit_code == 0, result.output
    assert f"continuing after step {killed_after}" in result.stdout
    assert figures(folder) == figures(tmp_path / "runs" / "calm")
    assert not list(folder.glob(".writing-*"))


@pytest.mark.parametrize("step", [0, 1, 3])
def test_resume_from_any_step(tiny, tmp_path, step):
    assert train(tiny, "--name", "calm").exit_code == 0
    stop_after(tmp_path, tiny, step, "--name", "stopped")
    assert (tmp_path / "runs" / "stopped" / "checkpoint.pt").exists() == (step >= 2)
    assert train(tiny, "--name", "stopped", "--resume").exit_code == 0
    calm, stopped = (tmp_path / "runs" / name for name in ("calm", "stopped"))
    assert figures(stopped) == figures(calm)
    states = [checkpoints.load_checkpoint(folder / "checkpoint.pt") for folder in (calm, stopped)]
    for state in states:
        state["moments"] = state["optimizer"]["state"]
    for part in ("encoder", "average", "loss", "moments"):
        torch.testing.assert_close(states[0][part], states[1][part], rtol=0, atol=0)


def test_resume_takes_the_newest_run_and_its_configuration(tiny, tmp_path):
    assert train(tiny, "--name", "many").exit_code == 0
    stop_after(tmp_path, tiny, 3, "--name", "many", "--seed", 5)
    assert train(tiny, "--name", "many", "--resume").exit_code == 0
    assert figures(tmp_path / "runs" / "many-2")["seed"] == 5
    assert not (tmp_path / "runs" / "many-3").exists()


def test_resuming_a_finished_run_gives_its_figures_again(tiny, tmp_path):
    assert train(tiny, "--name", "done").exit_code == 0
    before = figures(tmp_path / "runs" / "done")
    assert train(tiny, "--name", "done", "--resume").exit_code == 0
    assert figures(tmp_path / "runs" / "done") == before


def test_resume_refuses_another_experiment(tiny, tmp_path):
    assert train(tiny, "--name", "run").exit_code == 0
    assert_refused(train(tiny, "--name", "run", "--resume", "--seed", 3), "seed = 0", "with 3")


def test_nothing_to_resume(tiny, tmp_path):
    assert_refused(train(tiny, "--name", "never", "--resume"), "nothing to resume", "never")
    assert not (tmp_path / "runs").exists()
