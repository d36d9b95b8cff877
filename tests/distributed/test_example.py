"""The example of the docs runs under torchrun, on two processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_example_runs() -> None:
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "examples/distributed.py", "4"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=150, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "identities on 2 ranks" in done.stdout
    accuracy = float(done.stdout.split("ten unseen people: ")[1])
    assert 0.5 < accuracy <= 1
