"""Thresholds: what they promise on the validation set, and when that set says too little."""

import json
import shutil

import numpy as np
import pytest

from protomem_kernels.data.evaluation import roc
from protomem_kernels.training.errors import RunError
from protomem_kernels.training.thresholds import FARS, OperatingPoint, Thresholds, operating_points, read_thresholds


@pytest.fixture
def scores():
    rng = np.random.default_rng(0)
    same = np.arange(1500) < 300
    return rng.normal(np.where(same, 0.6, 0.1), 0.15).clip(-1, 1), same


def test_each_keeps_to_its_rate_and_accepts_as_many_as_can_be(scores):
    scores, same = scores
    points = [OperatingPoint(**point) for point in operating_points(roc(scores, same))]
    assert [point.far for point in points] == sorted(FARS, reverse=True)
    for far, threshold, measured, tar in points:
        accepted = scores >= threshold
        assert accepted[~same].mean() == pytest.approx(measured)
        assert accepted[same].mean() == pytest.approx(tar)
        assert measured <= far
        better = [(scores >= other)[same].mean() for other in scores if (scores >= other)[~same].mean() <= far]
        assert tar == pytest.approx(max(better))


def test_where_the_most_alike_are_two_there_is_none():
    points = operating_points(roc(np.array([0.9, 0.8, 0.1, 0.2]), np.array([False, True, False, False])))
    thresholds = Thresholds([OperatingPoint(**point) for point in points], 3)
    assert thresholds.at(0.5).threshold == 0.8
    assert json.loads(json.dumps(points, allow_nan=False))[-1]["threshold"] is None
    with pytest.raises(RunError, match=r"far must be larger than 0\.1 .* 3 impostor pairs"):
        thresholds.at(0.1)


def test_the_rate_below_is_taken_and_no_other():
    thresholds = Thresholds([OperatingPoint(far, far, far, 1.0) for far in FARS], 100)
    assert thresholds.at(0.15).far == 0.1
    assert thresholds.at(1e-3).far == 1e-3
    for far in (0.7, 1e-7, -1.0, float("nan")):
        with pytest.raises(RunError, match=r"far must be between 1e-06 and 0\.5"):
            thresholds.at(far)


def test_too_small_a_set_is_said():
    thresholds = Thresholds([], 4500)
    assert thresholds.doubt(1e-2) == ""
    assert "4,500 impostor pairs that is 4, and 30 or more" in thresholds.doubt(1e-3)
    assert "that is none" in thresholds.doubt(1e-4)
    assert Thresholds([], 30_000).doubt(1e-3) == ""


def test_a_run_without_says_how_to_have_them(finished, tmp_path):
    assert read_thresholds(finished).impostor_pairs == 16
    run = shutil.copytree(finished, tmp_path / "done")
    metrics = json.loads((run / "metrics.json").read_text())
    del metrics["operating_points"]
    (run / "metrics.json").write_text(json.dumps(metrics))
    with pytest.raises(RunError, match=r"comes from before they were kept.*protomem train --resume --name done"):
        read_thresholds(run)
    (run / "metrics.json").unlink()
    with pytest.raises(RunError, match=r"has not come to its end.*--resume"):
        read_thresholds(run)
    (run / "metrics.json").write_text("{")
    with pytest.raises(RunError, match=r"cannot read .*metrics\.json"):
        read_thresholds(run)
