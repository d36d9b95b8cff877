"""Checkpoints: written whole, refused and left alone where they are not what they should be."""

import random
from pathlib import Path

import pytest
import torch

from protomem_kernels.training import checkpoints, loop
from protomem_kernels.training.config import config_from, tomllib
from protomem_kernels.training.errors import RunError
from protomem_kernels.training.loop import go_on
from protomem_kernels.training.published import Published
from protomem_kernels.training.steps import Training
from tests.training.running import TINY, assert_refused, train


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
    checkpoints.save_checkpoint(path, {"step": 2})


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    at = random.Random(0).randrange(len(content) // 4, len(content) // 2)
    content[at] ^= 1 << 6
    path.write_bytes(content)


def without_checksum(path):
    torch.save(checkpoints.load_checkpoint(path), path)


def folder_instead(path):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (truncate, "damaged or not a checkpoint"),
        (scramble, "damaged or not a checkpoint"),
        (flip_a_bit, "is damaged: its checksum is not that of its content"),
        (without_checksum, "is damaged: it has no checksum"),
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


@pytest.mark.filterwarnings("error")
def test_no_bit_of_a_checkpoint_can_flip_unseen(tmp_path):
    path = tmp_path / "c.pt"
    checkpoints.save_checkpoint(path, {"step": 3, "weights": torch.arange(8.0)})
    whole = path.read_bytes()
    assert torch.load(path, weights_only=True)["step"] == 3  # still a file of torch's
    rng = random.Random(1)
    places = [*range(len(whole) - 90, len(whole)), *(rng.randrange(len(whole)) for _ in range(100))]
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(RunError, match="damaged"):
            checkpoints.load_checkpoint(path)
    for length in [0, 1, 83, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(20))]:
        path.write_bytes(whole[:length])
        with pytest.raises(RunError, match="damaged"):
            checkpoints.load_checkpoint(path)


def other_moments(content):
    content["optimizer"]["state"][0]["exp_avg"] = torch.zeros(3)


def no_second_moments(content):
    del content["optimizer"]["state"][0]["exp_avg_sq"]


def other_rate(content):
    content["optimizer"]["param_groups"][0]["lr"] = "fast"


def other_weights(content):
    content["encoder"] = {name: value.double() for name, value in content["encoder"].items()}


def a_weight_less(content):
    content["average"].popitem()


def other_config(content):
    content["config"]["seed"] = [0]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"step": -5}, "step must be a whole number between 0 and 4, got -5"),
        ({"step": 5}, "step must be a whole number between 0 and 4, got 5"),
        ({"step": 2.0}, "step must be a whole number between 0 and 4, got 2.0"),
        ({"step": torch.tensor(2)}, "step must be a whole number between 0 and 4, got tensor(2)"),
        ({"seconds": -1.0}, "seconds must be a number, 0 or more, got -1.0"),
        ({"seconds": float("nan")}, "seconds must be a number, 0 or more, got nan"),
        ({"extended_after": 3}, "extended_after must be steps between 0 and 4, got 3"),
        ({"extended_after": [9]}, "extended_after must be steps between 0 and 4, got [9]"),
        ({"encoder": 3}, "encoder must hold"),
        ({"loss": []}, "loss must hold"),
        ({"optimizer": None}, "does not fit this run"),
        ({"optimizer": {"param_groups": [], "state": {}}}, "optimizer.param_groups must be a list of 2, got []"),
        ({"config": None}, "does not fit this run"),
        ({"config": {}}, "belongs to another run: data is '' there"),
        (other_moments, "optimizer.state.0.exp_avg must be"),
        (no_second_moments, "optimizer.state.0 must hold step, exp_avg, exp_avg_sq"),
        (other_rate, "optimizer.param_groups[0].lr must be of type float, got 'fast'"),
        (other_weights, "must be (4, 3, 3, 3) of torch.float32, got (4, 3, 3, 3) of torch.float64"),
        (a_weight_less, "average must hold"),
        (other_config, "belongs to another run: seed is [0] there and 0 here"),
    ],
)
def test_a_checkpoint_that_is_none_of_such_a_run(a_whole_run, tmp_path, change, expected):
    """As a program may write it that is not this one: the checksum is right, the content is not."""
    config, whole = a_whole_run
    path = tmp_path / "checkpoint.pt"
    content = checkpoints.load_checkpoint(whole)
    content.update(change) if isinstance(change, dict) else change(content)
    checkpoints.save_checkpoint(path, content)
    training = Training(config, channels=3, identities=torch.arange(6), device=torch.device("cpu"))
    with pytest.raises(RunError) as error:
        go_on(Published(path.parent, training), content["trained_on"])
    assert expected in str(error.value)


@pytest.fixture(scope="module")
def a_whole_run(people, tmp_path_factory):
    """The configuration and the checkpoint of a run of four steps."""
    runs = tmp_path_factory.mktemp("runs")
    config = config_from({**tomllib.loads(TINY), "data": str(people), "runs_dir": str(runs), "name": "whole"}, "")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "report", lambda *arguments: {})
        loop.run_training(config)
    return config, runs / "whole" / "checkpoint.pt"


def test_an_unchanged_checkpoint_is_taken(a_whole_run):
    config, whole = a_whole_run
    training = Training(config, channels=3, identities=torch.arange(6), device=torch.device("cpu"))
    assert go_on(Published(whole.parent, training), checkpoints.load_checkpoint(whole)["trained_on"]).seconds > 0
    assert training.step == 4


def test_a_checkpoint_of_another_run(tiny, tmp_path):
    assert train(tiny, "--name", "one").exit_code == 0
    assert train(tiny, "--name", "two", "--seed", 2).exit_code == 0
    one, two = (tmp_path / "runs" / name / "checkpoint.pt" for name in ("one", "two"))
    two.write_bytes(one.read_bytes())
    assert_refused(train(tiny, "--name", "two", "--resume"), "belongs to another run: seed is 0 there and 2 here")
