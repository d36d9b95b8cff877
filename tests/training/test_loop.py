"""A run from its data to its figures, as a command and from Python."""

import json
import subprocess
import sys

import pytest
import torch
from PIL import Image

from protomem_kernels.data.sampling import IdentityBatchSampler
from protomem_kernels.training import checkpoints, loop, report, steps
from protomem_kernels.training.config import config_from, read_toml
from protomem_kernels.training.loop import pick_device
from tests.training.running import assert_refused, figures, protomem, train


def test_a_run_writes_its_folder(tiny, tmp_path, pictures):
    result = train(tiny, "--name", "first")
    assert result.exit_code == 0, result.output
    folder = tmp_path / "runs" / "first"
    names = {path.name for path in folder.iterdir()}
    assert {"config.toml", "metrics.json", "roc.png", "hardest_pairs.png", "checkpoint.pt"} <= names
    assert any("tfevents" in name for name in names)
    assert not [name for name in names if name.startswith(".writing")]
    metrics = json.loads((folder / "metrics.json").read_text())
    for key in ("verification_accuracy", "baseline_raw_pixels", "tar_at_far_1e-2", "rank1", "auc"):
        assert 0 <= metrics[key] <= 1
    assert metrics["train_identities"] == 6
    assert metrics["unseen_identities"] == 2
    assert metrics["steps"] == 4
    assert "raw pixels" in result.stdout
    for picture in ("roc.png", "hardest_pairs.png"):
        with Image.open(folder / picture) as image:
            image.load()
            assert image.format == "PNG"
            assert min(image.size) > 400


def test_the_figures_are_there_before_anything_is_drawn(tiny, tmp_path, monkeypatch):
    def fails(*arguments, **options):
        raise RuntimeError("no font")

    monkeypatch.setattr(report, "draw_roc", fails)
    assert str(train(tiny, "--name", "undrawn").exception) == "no font"
    assert json.loads((tmp_path / "runs" / "undrawn" / "metrics.json").read_text())["steps"] == 4


def test_the_default_is_orl_and_ten_unseen_people(tmp_path):
    result = protomem("train", "--runs-dir", tmp_path, "--steps", 1, "--width", 4, "--threads", 1, "--device", "cpu")
    assert result.exit_code == 0, result.output
    metrics = figures(tmp_path / "orl")
    assert metrics["data"] == "ORL faces"
    assert (metrics["train_identities"], metrics["unseen_identities"]) == (30, 10)
    assert (metrics["genuine_pairs"], metrics["impostor_pairs"]) == (450, 4500)
    assert metrics["baseline_raw_pixels"] == pytest.approx(0.843, abs=0.005)


def test_batches_are_a_function_of_the_step():
    sampler = IdentityBatchSampler([0, 0, 0, 1, 1, 2, 2], 2, 2, seed=3)
    whole = list(loop.batches(sampler, 0, 9))
    assert len(whole) == 9
    for step in range(10):
        assert list(loop.batches(sampler, step, 9)) == whole[step:]


def test_a_loss_that_is_not_finite_ends_the_run(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "rate_factor", lambda step, steps: float("nan") if step == 2 else 1e-3)
    assert_refused(train(tiny, "--name", "nan"), "the loss is nan in step 4", "--learning-rate")
    assert checkpoints.load_checkpoint(tmp_path / "runs" / "nan" / "checkpoint.pt")["step"] == 2


def test_unknown_device(tiny):
    assert_refused(train(tiny, "--device", "abacus"), "device 'abacus' cannot be used")
    if not torch.cuda.is_available():
        assert pick_device("auto") == torch.device("cpu")
        assert_refused(train(tiny, "--device", "cuda"), "device 'cuda' cannot be used")


def test_from_python_nothing_is_shown_and_no_command_line_is_needed(tiny):
    code = f"""
import pathlib, sys
for name in ("typer", "rich", "tensorboard"):
    sys.modules[name] = None  # importing it fails
from protomem_kernels.training.config import config_from, read_toml
from protomem_kernels.training.loop import run_training
metrics = run_training(config_from(read_toml(pathlib.Path({str(tiny)!r})), ""))
assert metrics["steps"] == 4
assert not [name for name in sys.modules if name.startswith("protomem_kernels.cli")]
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


class Noting(loop.Observer):
    def __init__(self, fails=False):
        self.notes, self.fails = [], fails

    def begin(self, folder, config, people, device, first_step):
        self.notes.append(("begin", folder.name, first_step))

    def show(self, step):
        self.notes.append(("show", step.number))
        if self.fails:
            raise ArithmeticError

    def end(self):
        self.notes.append(("end",))

    def result(self, folder, metrics):
        self.notes.append(("result", metrics["steps"]))


def test_an_observer_is_told_of_every_step(tiny):
    config = config_from({**read_toml(tiny), "name": "seen"}, "")
    watch = Noting()
    assert loop.run_training(config, watch=watch)["steps"] == 4
    shown = [("show", number) for number in range(1, 5)]
    assert watch.notes == [("begin", "seen", 0), *shown, ("end",), ("result", 4)]


def test_an_observer_is_told_of_the_end_when_a_run_breaks_off(tiny):
    watch = Noting(fails=True)
    with pytest.raises(ArithmeticError):
        loop.run_training(config_from(read_toml(tiny), ""), watch=watch)
    assert [note[0] for note in watch.notes] == ["begin", "show", "end"]
