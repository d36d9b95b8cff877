"""The examples of a loop in Lightning and one with Accelerate, on one process and on two, where these are installed."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from protomem_kernels.compat.lightning import health_callback

ROOT = Path(__file__).parents[2]
LOOPS = {"lightning": "examples/lightning_loop.py", "accelerate": "examples/accelerate_loop.py"}


def told(framework: str, processes: int, folder: Path) -> dict[int, str]:
    """Return what each process says of its run, by rank."""
    if importlib.util.find_spec(framework) is None:
        pytest.skip(f"{framework} is not installed")
    command = [LOOPS[framework]]
    if framework == "lightning":
        command += [str(processes), str(folder)]
    elif processes > 1:
        command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *command]
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return {int(rank): rest for rank, rest in re.findall(r"^rank (\d): (.*)$", done.stdout, flags=re.MULTILINE)}


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("framework", LOOPS)
def test_it_trains(framework: str, processes: int, tmp_path: Path) -> None:
    said = told(framework, processes, tmp_path)
    assert sorted(said) == list(range(processes))
    for line in said.values():
        first, last = map(float, re.findall(r"^([\d.]+) to ([\d.]+),", line)[0])
        assert last < first / 2
    if framework == "lightning":
        assert "'health/identities': 12.0" in said[0]
        assert "'health/refresh_drift': " in said[0]
        assert len({line.partition("{")[2] for line in said.values()}) == 1  # the figures of the whole memory
    else:
        assert sum(int(line.split()[3]) for line in said.values()) == 12


def test_the_callback_wants_lightning_and_a_number() -> None:
    with pytest.raises(ValueError, match="every must be at least 1"):
        health_callback(0)
    if importlib.util.find_spec("lightning") is None and importlib.util.find_spec("pytorch_lightning") is None:
        with pytest.raises(ImportError, match="pip install lightning"):
            health_callback()
