"""Examples as a user starts them, in a process of their own or under torchrun."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


def run(name: str, *arguments: str, processes: int = 1, path: Path | None = None) -> str:
    """Run an example and return what it prints; ``path`` is searched for modules first."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    places = [str(path)] * (path is not None) + [str(ROOT)]
    done = subprocess.run(
        [sys.executable, *launch, f"examples/{name}", *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(places)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def of_each_rank(printed: str) -> dict[int, str]:
    """Return what each process says of its run, by rank."""
    return {int(rank): rest for rank, rest in re.findall(r"^rank (\d): (.*)$", printed, flags=re.MULTILINE)}


def falling(line: str) -> bool:
    """Say whether the loss has halved, by "2.0000 to 0.5000, ..."."""
    first, last = map(float, re.findall(r"^([\d.]+) to ([\d.]+),", line)[0])
    return last < first / 2
