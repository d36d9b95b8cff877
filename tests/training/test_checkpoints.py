"""Checkpoints: written whole, refused and left alone where they are not what they should be."""

import random
from pathlib import Path

import pytest
import torch

from protomem_kernels.training import checkpoints
from protomem_kernels.training.errors import RunError
from tests.training.running import assert_refused, train


def test_a_checkpoint_round_trips(tmp_path):
    content = {"step": 3, "weights": {"w": torch.arange(3.0)}, "seconds": 0.5}
    checkpoints.save_checkpoint(tmp_path / "c.pt", content)
    loaded = checkpoints.load_checkpoint(tmp_path / "c.pt")
    torch.testing.assert_close(loaded["weights"]["w"], content["weights"]["w"])
    assert (loaded["step"], loaded["seconds"]) == (3, 0.5)


def test_a_folder_that_is_gone(tmp_path):
    with pytest.raises(RunError, match="cannot write"):
        checkpoints.save_checkpoint(tmp_path / "gone" / "c.pt", {})


def test_a_checkpoint_that_cannot_be_written(tiny, tmp_path, monkeypatch):
    def full(content, path):
        raise RuntimeError("file write failed")

    monkeypatch.setattr(torch, "save", full)
    assert_refused(train(tiny, "--name", "full"), "cannot write", "checkpoint.pt", "file write failed")
    assert not list((tmp_path / "runs" / "full").glob("*writing*"))


def truncate(path):
    path.write_bytes(path.read_bytes()[:1000])


def scramble(path):
    path.write_bytes(random.Random(0).randbytes(5000))


def foreign(path):
    torch.save({"weights": torch.zeros(3)}, path)


def dangerous(path):
    torch.save({"format": checkpoints.FORMAT, "version": 1, "payload": Path("x")}, path)


def future(path):
    torch.save({"format": checkpoints.FORMAT, "version": 99}, path)


def hollow(path):
    torch.save({"format": checkpoints.FORMAT, "version": checkpoints.VERSION, "step": 2}, path)


def folder_instead(path):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (truncate, "damaged or not a checkpoint"),
        (scramble, "damaged or not a checkpoint"),
        (dangerous, "damaged or not a checkpoint"),
        (foreign, "was not written by protomem train"),
        (future, "version 99"),
        (hollow, "does not fit"),
        (folder_instead, "cannot read the checkpoint"),
    ],
)
def test_a_bad_checkpoint_is_refused_and_left_alone(tiny, tmp_path, spoil, expected):
    assert train(tiny, "--name", "bad").exit_code == 0
    checkpoint = tmp_path / "runs" / "bad" / "checkpoint.pt"
    spoil(checkpoint)
    before = checkpoint.read_bytes() if checkpoint.is_file() else None
    assert_refused(train(tiny, "--name", "bad", "--resume"), expected, "checkpoint.pt")
    assert (checkpoint.read_bytes() if checkpoint.is_file() else None) == before


def test_a_checkpoint_of_another_run(tiny, tmp_path):
    assert train(tiny, "--name", "one").exit_code == 0
    assert train(tiny, "--name", "two", "--seed", 2).exit_code == 0
    one, two = (tmp_path / "runs" / name / "checkpoint.pt" for name in ("one", "two"))
    two.write_bytes(one.read_bytes())
    assert_refused(train(tiny, "--name", "two", "--resume"), "belongs to another run: seed is 0 there and 2 here")
