"""Run a benchmark suite in a pytest of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.markup import escape

USAGE_ERROR, NOTHING_COLLECTED = 4, 5  # of pytest's exit codes; 0 is all well and 1 something failed


def run_pytest(arguments: list[str], root: Path, log: Path, console: Console, waiting: str) -> int:
    """Run pytest in ``root``, show the test at hand, and return the exit code; all it prints goes to ``log``.

    Variables of the environment that steer pytest stay out of it.
    """
    command = [sys.executable, "-m", "pytest", "-v", "--no-header", "-p", "no:cacheprovider", *arguments]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    with (
        log.open("w", encoding="utf-8") as file,
        console.status(waiting) as status,
        subprocess.Popen(
            command,
            cwd=root,
            env=kept | {"PYTHONUNBUFFERED": "1"},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            file.write(line)
            if "::" in line:
                status.update(escape(" ".join(line.split())))
    return process.returncode
