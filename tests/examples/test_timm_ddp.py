"""timm under DistributedDataParallel: one process and two print the same losses and gradients, to rounding.

A stand-in has timm's ``create_model`` alone: timm imports torchvision, and PyPI's does not import beside a CPU build of
torch (docs/notes/decisions.md). It has no BatchNorm, so that nothing depends on which images share a process.
"""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

from tests.examples.running import EXAMPLES, run

STAND_IN = """
from torch import nn

def create_model(name, pretrained, in_chans, num_classes, global_pool):
    assert (name, pretrained, num_classes, global_pool) == ("a_model", False, 0, "")
    return nn.Sequential(nn.Conv2d(in_chans, 16, 5, 3), nn.ReLU(), nn.Conv2d(16, 16, 5, 3), nn.ReLU())
"""


def told(printed: str, processes: int) -> dict[int, tuple[float, float]]:
    """Return loss and length of the gradient of the steps that the example tells of."""
    assert 0.5 < float(re.findall(r"ten unseen people: ([\d.]+), of raw pixels 0.836", printed)[0]) <= 1
    assert ("encoders of 2 processes differ by 0.0e+00" in printed) == (processes == 2)
    steps = re.findall(r"step (\d+): loss ([\d.]+), gradient ([\d.]+)", printed)
    return {int(step): (float(loss), float(gradient)) for step, loss, gradient in steps}


def test_two_processes_train_as_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "timm.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "timm", None)  # so that what is there now, or nothing, is there again at the end
    del sys.modules["timm"]
    runpy.run_path(str(EXAMPLES / "timm_ddp.py"))["main"]("a_model", pretrained=False, steps=8)
    one = told(capsys.readouterr().out, 1)
    two = told(run("timm_ddp.py", "--model", "a_model", "--steps", "8", processes=2, path=tmp_path), 2)
    assert sorted(one) == sorted(two) == [1, 8]
    assert two[1] == pytest.approx(one[1], rel=1e-3)
    assert two[8] == pytest.approx(one[8], rel=1e-2)
    assert one[8] != pytest.approx(one[1], rel=0.05)
