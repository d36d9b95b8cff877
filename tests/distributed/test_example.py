"""The example of the docs runs under torchrun, on two processes, and goes on on three."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def losses(ranks: int, steps: int, folder: Path) -> dict[int, float]:
    """Run the example under torchrun; return the losses that it prints, by step."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "examples/distributed.py"]
    command = [*launch, "--steps", str(steps), "--folder", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=150, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert 0.5 < float(done.stdout.split("ten unseen people: ")[1]) <= 1
    told = re.findall(rf"step (\d+): loss ([\d.]+) on {ranks} ranks", done.stdout)
    return {int(step): float(loss) for step, loss in told}


def test_the_example_goes_on_with_more_processes_to_a_lower_loss(tmp_path: Path) -> None:
    two = losses(2, 16, tmp_path)
    three = losses(3, 32, tmp_path)
    assert (min(two), max(two), min(three), max(three)) == (1, 16, 17, 32)
    assert three[32] < two[16] - 0.5
