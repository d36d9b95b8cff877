"""What the steps of a release share: programs that are run, and what is wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
TOOLS = ROOT / "build" / "release-venv" / "bin"  # of requirements-release.lock: what checks, and builds nothing


class FindingError(Exception):
    """What a check found wrong."""


def say(line: str) -> None:
    """Print a line at once."""
    print(line, flush=True)


def run(*command: str | Path, cwd: Path = ROOT, **environment: str) -> str:
    """Run a program, with the checks' tools on its PATH; return what it printed.

    Raises:
        FindingError: it failed; the message is what it printed.
    """
    path = f"{TOOLS}{os.pathsep}{os.environ.get('PATH', '')}"
    process = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=os.environ | {"PATH": path} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if process.returncode != 0:
        raise FindingError(f"{command[0]} failed ({process.returncode}):\n{process.stdout.strip()[-4000:]}")
    return process.stdout


def tool(name: str, *arguments: str | Path, cwd: Path = ROOT) -> str:
    """Run one of the checks' tools; return what it printed."""
    return run(TOOLS / name, *arguments, cwd=cwd)


def python(*arguments: str | Path, cwd: Path = ROOT, **environment: str) -> str:
    """Run the Python that runs this; return what it printed."""
    return run(sys.executable, *arguments, cwd=cwd, **environment)
