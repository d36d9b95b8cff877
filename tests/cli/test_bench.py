"""``protomem bench``: hands everything over to the suite in the current folder, or says where there is one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SUITE = """
import json, pathlib, sys
pathlib.Path("seen.json").write_text(json.dumps(sys.argv[1:]))
print("help of the suite" if "--help" in sys.argv else "figures")
sys.exit(len(sys.argv))
"""


def bench(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from protomem_kernels.cli import main; main()", "bench", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Return a folder with a stand-in for the suite."""
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "__main__.py").write_text(SUITE)
    (tmp_path / "benchmarks" / "quick.py").touch()
    return tmp_path


@pytest.mark.parametrize("arguments", [(), ("--quick", "--select", "two words"), ("-x", "--no-such-option=3", "a")])
def test_arguments_and_exit_code_pass_through(checkout: Path, arguments: tuple[str, ...]) -> None:
    done = bench(checkout, *arguments)
    assert (done.stdout, done.returncode) == ("figures\n", 1 + len(arguments))
    assert json.loads((checkout / "seen.json").read_text()) == list(arguments)


def test_help_is_the_help_of_the_suite(checkout: Path) -> None:
    assert bench(checkout, "--help").stdout == "help of the suite\n"


@pytest.mark.parametrize("arguments", [(), ("--static",), ("--help",)])
def test_without_the_suite_says_where_it_is(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "__main__.py").write_text("raise SystemExit('of another project')")
    done = bench(tmp_path, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: no benchmark suite in {tmp_path}: it comes with the repository")
    assert "run protomem bench (it stands for python -m benchmarks) in a checkout" in done.stderr
    assert done.stderr.count("\n") == 1
