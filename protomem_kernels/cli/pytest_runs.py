"""Run a test or benchmark suite in a pytest of its own, and read from its report what became of every test."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from rich.console import Console
from rich.markup import escape

USAGE_ERROR, NOTHING_COLLECTED = 4, 5  # of pytest's exit codes; 0 is all well and 1 something failed


class Outcome(NamedTuple):
    """What became of one test; ``message`` says why it was skipped or failed, ``details`` is the failure's report."""

    name: str
    outcome: str  # "passed", "skipped" or "failed"
    seconds: float
    message: str
    details: str


def run_pytest(
    arguments: list[str], root: Path, log: Path, console: Console, waiting: str, without: tuple[str, ...] = ()
) -> int:
    """Run pytest in ``root``, show the test at hand, and return the exit code; all it prints goes to ``log``.

    Variables of the environment that steer pytest stay out of it, and so do those named in ``without``.
    """
    command = [sys.executable, "-m", "pytest", "-v", "--no-header", "-p", "no:cacheprovider", *arguments]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_") and name not in without}
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


def read_outcomes(junit: Path) -> list[Outcome]:
    """Read pytest's JUnit report."""
    outcomes = []
    for case in ElementTree.parse(junit).iter("testcase"):
        name = f"{case.get('classname', '')}::{case.get('name', '')}"
        trouble = [found for kind in ("failure", "error") if (found := case.find(kind)) is not None]
        skipped = case.find("skipped")
        outcome, why = "passed", None
        if trouble:
            outcome, why = "failed", trouble[0]
        elif skipped is not None:
            outcome, why = "skipped", skipped
        message = "" if why is None else why.get("message", "")
        details = (why.text or "") if trouble and why is not None else ""
        outcomes.append(Outcome(name, outcome, float(case.get("time", 0)), message, details))
    return outcomes
