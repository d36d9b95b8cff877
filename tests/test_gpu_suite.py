"""The GPU suite without a GPU: a CPU stands in, so that what never runs here at least runs through."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.ops.cases import MakingTensorsOn

ROOT = Path(__file__).parents[1]


def test_tensors_are_made_on_the_device_with_the_values_of_the_cpu() -> None:
    with MakingTensorsOn("meta"):
        made = [torch.tensor([1.0]), torch.zeros(2), torch.arange(3), torch.empty(2, 2), torch.eye(2)]
        leaf = torch.randn(3, generator=torch.Generator().manual_seed(0), requires_grad=True)
        placed = torch.ones(2, device="cpu")
        assert placed.new_zeros(2).device.type == "cpu"
    assert {tensor.device.type for tensor in [*made, leaf]} == {"meta"}
    assert leaf.is_leaf
    assert leaf.requires_grad
    assert placed.device.type == "cpu"
    with MakingTensorsOn("cpu"):
        drawn = torch.randn(3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(drawn, torch.randn(3, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize(
    "selection",
    [
        ["tests/gpu", "-k", "reference and not 20011 and not dtype1 and not dtype2"],
        ["tests/ops/test_aggregate_prototypes.py", "-m", "gpu and not slow"],
    ],
    ids=["the suite", "contracts"],
)
def test_it_runs_where_a_cpu_stands_in(selection: list[str]) -> None:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "TRITON_", "COV_"))}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", *selection],
        cwd=ROOT,
        env=kept | {"PROTOMEM_GPU_STAND_IN": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    summary = done.stdout.strip().splitlines()[-1]
    assert "passed" in summary
    assert "skipped" not in summary
