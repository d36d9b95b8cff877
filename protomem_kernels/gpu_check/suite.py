"""Part 6: the GPU suite of the checkout, a pytest per file; each test's outcome is a line."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from protomem_kernels.gpu_check.processes import Task
from protomem_kernels.gpu_check.records import Record

FOLDERS = ("tests/gpu", "tests/ops")
WARNINGS_ARE_NO_ERRORS = ["-o", "filterwarnings=default"]
WITHOUT_PLUGINS = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": ""}
NOTHING_COLLECTED = 5  # of pytest's exit codes


def absent(checkout: Path) -> str | None:
    """Return why this part is left out, or None."""
    if find_spec("pytest") is None:
        return "pytest is not installed: the GPU suite was left out"
    return None if tasks(checkout) else f"no {' and no '.join(FOLDERS)} here: the GPU suite is run in a checkout"


def tasks(checkout: Path) -> list[Task]:
    """Return a task per file."""
    files = [file for folder in FOLDERS for file in sorted((checkout / folder).glob("test_*.py"))]
    return [Task("suite", file.relative_to(checkout).as_posix(), silence=150) for file in files]


def run(record: Record, name: str, first: int, checkout: Path) -> None:
    """Run the tests of a file that need a GPU."""
    import pytest

    outcomes = _Outcomes(record)
    arguments = [name, "-m", "gpu", "-q", "--no-header", "-p", "no:cacheprovider", *WARNINGS_ARE_NO_ERRORS]
    code = pytest.main(arguments, plugins=[outcomes])
    counts = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.counts.items() if count) or "none there"
    broken = outcomes.counts["failed"] or code not in (0, 1, NOTHING_COLLECTED)
    record.write(name, not broken, counts, exit_code=int(code), **outcomes.counts)


class _Outcomes:
    """A plugin of pytest's that writes what becomes of each test."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self.counts: dict[str, Any] = {"passed": 0, "failed": 0, "skipped": 0}

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.record.begin(nodeid)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            self._write(report, round(report.duration, 3))

    def pytest_collectreport(self, report: Any) -> None:
        if report.outcome != "passed":
            self._write(report, 0.0)

    def _write(self, report: Any, seconds: float) -> None:
        self.counts[report.outcome] += 1
        ok = {"passed": True, "failed": False, "skipped": None}[report.outcome]
        told = report.longrepr
        said = str(told[2] if isinstance(told, tuple) else told) if told else ""
        self.record.write(report.nodeid, ok, said, quiet=ok is not False, test_seconds=seconds)
