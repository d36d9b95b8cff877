"""A run that was broken off, by whatever, goes on to the undisturbed run's figures."""

import json
import random
import shlex
import shutil

import pytest
import torch

from protomem_kernels.training import checkpoints
from protomem_kernels.training.config import config_from, read_toml
from tests.training import killed
from tests.training.running import assert_refused, figures, protomem, stop_after, train


@pytest.mark.parametrize(
    "flags",
    [
        ("--prototype-gradient", "fresh", "--margin", "cosface", "--policy", "lru"),
        ("--prototype-gradient", "memory", "--mining", "curricularface"),
        ("--quality", "norm", "--margin", "adaface", "--mining", "hard-samples"),
        ("--quality", "softmax:base=center", "--mining", "mv-softmax", "--capacity", "4"),
        ("--mining", "hardest-negatives", "--augmentation", "0"),
        ("--quality", "softmax:base=recognizability", "--margin", "elasticface:std=0.1"),
        ("--mining", "noisy-negative-filter", "--refresh-ratio", "1"),
    ],
)
def test_every_loss_option_trains_and_resumes(tiny, tmp_path, flags):
    assert train(tiny, "--name", "whole", *flags).exit_code == 0
    whole = figures(tmp_path / "runs" / "whole")
    stop_after(tmp_path, tiny, 2, "--name", "halves", *flags)
    assert train(tiny, "--name", "halves", "--resume", *flags).exit_code == 0
    assert figures(tmp_path / "runs" / "halves") == whole


def test_runs_killed_at_random_moments_resume_bit_equal(tmp_path):
    """A short form of ``make faults``: the seeds are new each time, and stand in what fails."""
    runs = killed.prepare(tmp_path)
    options = killed.OPTIONS[0]
    killed.train_to_the_end(runs / "calm", *options)
    first = random.randrange(10**6)
    for seed in range(first, first + 2):
        folder = runs / f"killed-with-seed-{seed}"
        verdict = killed.kill_and_resume(folder, runs / "calm", seed, *options)
        assert verdict.differs is None, verdict


def test_what_a_kill_left_half_written_is_swept(tiny, tmp_path):
    stop_after(tmp_path, tiny, 3, "--name", "killed")
    (tmp_path / "runs" / "killed" / ".writing-1-checkpoint.pt").write_text(
        "as a kill in the middle of a write leaves it"
    )
    assert train(tiny, "--name", "killed", "--resume").exit_code == 0
    assert not list((tmp_path / "runs" / "killed").glob(".writing-*"))


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


@pytest.mark.parametrize("done", [False, True])
def test_resume_with_more_steps_extends_the_run(tiny, tmp_path, done):
    if done:
        assert train(tiny, "--name", "run").exit_code == 0
    else:
        stop_after(tmp_path, tiny, 3, "--name", "run")
    result = train(tiny, "--name", "run", "--resume", "--steps", 7)
    assert result.exit_code == 0, result.output
    folder = tmp_path / "runs" / "run"
    reached = 4 if done else 2
    assert f"continuing after step {reached}" in result.stdout
    assert (figures(folder)["steps"], figures(folder)["extended_after"]) == (7, [reached])
    assert config_from(read_toml(folder / "config.toml"), "").steps == 7
    assert checkpoints.load_checkpoint(folder / "checkpoint.pt")["step"] == 7
    # From here on it is a run of so many steps: without --steps it goes on to them, and fewer are another experiment.
    before = figures(folder)
    assert train(tiny, "--name", "run", "--resume", "--steps", 7).exit_code == 0
    assert figures(folder) == before
    assert_refused(train(tiny, "--name", "run", "--resume", "--steps", 6), "steps = 7", "with 6")


def test_a_run_that_cannot_go_on_is_not_extended(tiny, tmp_path):
    assert train(tiny, "--name", "run").exit_code == 0
    folder = tmp_path / "runs" / "run"
    before = (folder / "config.toml").read_bytes()
    (folder / "checkpoint.pt").write_bytes(b"no checkpoint")
    assert_refused(train(tiny, "--name", "run", "--resume", "--steps", 7), "checkpoint.pt")
    assert (folder / "config.toml").read_bytes() == before


def test_an_extended_run_that_is_broken_off_goes_on_as_one_that_was_not(tiny, tmp_path):
    for name in ("calm", "broken"):
        assert train(tiny, "--name", name).exit_code == 0
    assert train(tiny, "--name", "calm", "--resume", "--steps", 8).exit_code == 0
    stop_after(tmp_path, tiny, 5, "--name", "broken", "--resume", "--steps", 8)  # its checkpoint is the one of step 4
    assert protomem("train", "--resume", "--name", "broken", "--runs-dir", tmp_path / "runs").exit_code == 0
    calm, broken = (tmp_path / "runs" / name for name in ("calm", "broken"))
    assert killed.difference(broken, calm) is None


def test_a_run_from_before_has_what_it_lacked_once_it_is_resumed(tiny, tmp_path, people):
    """Thresholds and the encoder's own file came later, and options with them."""
    assert train(tiny, "--name", "old").exit_code == 0
    folder = tmp_path / "runs" / "old"
    newer = ("image_column", "label_column")
    lines = (folder / "config.toml").read_text().splitlines(keepends=True)
    (folder / "config.toml").write_text("".join(line for line in lines if not line.startswith(newer)))
    content = checkpoints.load_checkpoint(folder / "checkpoint.pt")
    content["config"] = {key: value for key, value in content["config"].items() if key not in newer}
    checkpoints.save_checkpoint(folder / "checkpoint.pt", content)
    metrics = json.loads((folder / "metrics.json").read_text())
    del metrics["operating_points"]
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "encoder.pt").unlink()

    images = people / "person0" / "0.png", people / "person0" / "1.png"
    result = protomem("verify", *images, "--run", folder)
    assert_refused(result, "has no thresholds", "measured by: protomem train --resume --name old")
    command = shlex.split(result.stderr.partition("measured by: protomem ")[2])
    assert protomem(*command).exit_code == 0
    assert protomem("verify", *images, "--run", folder).exit_code == 0
    assert (folder / "encoder.pt").exists()


def test_nothing_to_resume(tiny, tmp_path):
    assert_refused(train(tiny, "--name", "never", "--resume"), "nothing to resume", "never")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("change", ["added", "renamed"])
def test_a_run_does_not_go_on_with_other_images(tiny, tmp_path, people, change):
    """The labels of identities follow their names: with another one among them all would be others."""
    data = shutil.copytree(people, tmp_path / "data")
    assert train(tiny, "--data", data, "--name", "own").exit_code == 0
    if change == "added":
        shutil.copytree(people / "person0", data / "another")
    else:
        for number, name in enumerate(["z", "y", "x", "w", "v", "u", "t", "s"]):
            (data / f"person{number}").rename(data / name)
    checkpoint = (tmp_path / "runs" / "own" / "checkpoint.pt").read_bytes()
    refused = train(tiny, "--data", data, "--name", "own", "--resume", "--steps", 6)
    assert_refused(refused, "was trained on other images: 24 of 6 identities there, ", "without --resume")
    assert (tmp_path / "runs" / "own" / "checkpoint.pt").read_bytes() == checkpoint
