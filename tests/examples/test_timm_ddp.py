"""timm under DistributedDataParallel: one process and two print the same losses, to rounding.

A stand-in has timm's ``create_model`` alone: timm imports torchvision, and PyPI's does not import beside a CPU build of
torch (docs/notes/decisions.md). It has no BatchNorm, so that nothing depends on which images share a process.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.examples.running import run

STAND_IN = """
from torch import nn

def create_model(name, pretrained, in_chans, num_classes, global_pool):
    assert (name, pretrained, num_classes, global_pool) == ("a_model", False, 0, "")
    return nn.Sequential(nn.Conv2d(in_chans, 16, 5, 3), nn.ReLU(), nn.Conv2d(16, 16, 5, 3), nn.ReLU())
"""


def losses(processes: int, path: Path) -> dict[int, float]:
    printed = run("timm_ddp.py", "--model", "a_model", "--steps", "20", processes=processes, path=path)
    assert 0.5 < float(re.findall(r"ten unseen people: ([\d.]+), of raw pixels 0.836", printed)[0]) <= 1
    assert ("encoders of 2 processes differ by 0.0e+00" in printed) == (processes == 2)
    return {int(step): float(loss) for step, loss in re.findall(r"step (\d+): loss ([\d.]+)", printed)}


def test_two_processes_train_as_one_does(tmp_path: Path) -> None:
    (tmp_path / "timm.py").write_text(STAND_IN)
    one, two = losses(1, tmp_path), losses(2, tmp_path)
    assert sorted(one) == sorted(two) == [1, 20]
    assert two == pytest.approx(one, rel=1e-3)
    assert one[20] != pytest.approx(one[1], rel=0.05)
