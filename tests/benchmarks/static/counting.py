"""Counts for the tests: the compiler needs a process without the interpreter, whatever the tests run in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.static.counting import Count

ROOT = Path(__file__).parents[3]


def counted(module: str, *jobs: tuple[int, str, int], matrix_bound_only: bool = False) -> list[Count]:
    """Return the counts of a module's kernels for each (architecture, dtype, embedding size)."""
    options = ["--matrix-bound-only"] if matrix_bound_only else []
    names = [":".join(map(str, (module, *job))) for job in jobs]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.static", "--processes", "1", *options, "--count", *names],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"exit code {done.returncode}: {done.stderr}"
    return [Count(**fields) for fields in json.loads(done.stdout)]
