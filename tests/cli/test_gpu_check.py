"""``protomem gpu-check``, with a CPU standing in for the GPU and small suites for the real ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import benchmarks
from protomem_kernels.cli import gpu_check
from protomem_kernels.cli.app import app

TESTS = """
import os, pytest
pytestmark = pytest.mark.gpu

def test_good(): assert "TRITON_INTERPRET" not in os.environ

@pytest.mark.skip(reason="only on Tuesdays")
def test_left_out(): pass
"""
FAILING = """
def test_bad():
    assert __file__ == 'elsewhere'
"""
BENCHMARK = """
import pytest

def pytest_addoption(parser):
    for name in ("--device", "--threads", "--dtype"):
        parser.addoption(name)
"""
FIGURE = """
def bench_it(benchmark, request):
    assert request.config.getoption("--device") == "cpu"
    benchmark.pedantic(lambda: None)
    benchmark.extra_info.update(figure="speed", value=9.0, unit="G", must=1.0, aim=0.5)
"""
COMMAND = ["__init__.py", "__main__.py", "command.py", "plots.py", "results.py"]  # of the suite itself
SETTINGS = "[pytest]\nmarkers = gpu\npython_files = test_*.py bench_*.py quick.py\npython_functions = test_* bench_*\n"


def invoke(*args: str) -> Any:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, ["gpu-check", *args])


@pytest.fixture
def checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Return a small checkout on a machine whose GPU is called "cpu"."""
    root = tmp_path / "checkout"
    for folder in ("tests/gpu", "tests/ops", "benchmarks"):
        (root / folder).mkdir(parents=True)
    (root / "pytest.ini").write_text(SETTINGS)
    (root / "tests/gpu/test_it.py").write_text(TESTS)
    (root / "benchmarks/conftest.py").write_text(BENCHMARK)
    (root / "benchmarks/quick.py").write_text(FIGURE)
    for file in COMMAND:
        shutil.copy(Path(benchmarks.__file__).with_name(file), root / "benchmarks")
    monkeypatch.chdir(root)
    monkeypatch.setattr(gpu_check, "DEVICE", "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    return root


def test_without_a_gpu_says_so(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    file = tmp_path / "out.json"
    result = invoke("--output", str(file))
    assert result.exit_code == 2
    assert f"needs a GPU; torch {torch.__version__}, built with" in result.output
    assert not file.exists()


def test_says_what_is_missing(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (checkout / "tests/ops").rmdir()
    result = invoke()
    assert result.exit_code == 2
    assert "not here: the contract suites (tests/ops); they come with the repository" in result.output
    (checkout / "tests/ops").mkdir()
    monkeypatch.setattr(gpu_check, "find_spec", lambda name: None if name == "hypothesis" else name)
    result = invoke()
    assert result.exit_code == 2
    assert "needs hypothesis: pip install" in result.output
    assert invoke("--output", str(checkout)).exit_code == 2


def test_one_file_holds_every_outcome_and_figure(checkout: Path, tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    result = invoke("--output", str(file), "--no-peers")
    assert result.exit_code == 0, result.output  # a figure that is missed is a result, no failure
    assert "tests: 1 passed, 1 skipped" in result.output
    assert "please send it back" in result.output
    content = json.loads(file.read_text())
    assert (content["format"], content["version"]) == ("protomem-gpu-check", 1)
    assert content["environment"]["torch"] == torch.__version__
    assert content["environment"].keys() >= {"gpus", "driver", "cuda", "packages", "commit", "backends", "date"}
    assert content["tests"]["counts"] == {"passed": 1, "skipped": 1}
    outcomes = {entry["name"].split("::")[-1]: entry for entry in content["tests"]["results"]}
    assert outcomes["test_good"]["outcome"] == "passed"
    assert outcomes["test_left_out"]["message"] == "only on Tuesdays"
    assert list(content["benchmarks"]) == ["quick"]
    assert [row["value"] for row in content["benchmarks"]["quick"]["results"]] == [9.0]
    assert str(tmp_path) not in file.read_text()


def test_what_fails_is_named_and_written(checkout: Path, tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    (checkout / "tests/gpu/test_it.py").write_text(TESTS + FAILING)
    result = invoke("--output", str(file), "--no-peers")
    assert result.exit_code == 1
    assert "failed: tests.gpu.test_it::test_bad" in result.output
    (bad,) = [entry for entry in json.loads(file.read_text())["tests"]["results"] if entry["outcome"] == "failed"]
    assert "elsewhere" in bad["message"]
    assert "def test_bad" in bad["details"]
    assert str(tmp_path) not in file.read_text()


def test_a_suite_that_cannot_run_is_written_with_what_it_said(checkout: Path, tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    (checkout / "tests/gpu/test_it.py").write_text("import no_such_module")
    (checkout / "benchmarks/conftest.py").write_text("import no_such_benchmark")
    result = invoke("--output", str(file))
    assert result.exit_code == 1
    content = json.loads(file.read_text())
    assert "no_such_module" in content["tests"]["log"]
    assert "no_such_benchmark" in content["benchmarks"]["quick"]["log"]
    assert list(content["benchmarks"]) == ["quick", "peers"]
    assert "benchmarks, peers: FAILED" in result.output


def test_the_checkout_may_be_elsewhere(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = invoke("--output", "out.json", "--no-peers")
    assert result.exit_code == 2
    assert "in a checkout" in result.output
    assert "--checkout" in result.output
    result = invoke("--output", "out.json", "--no-peers", "--checkout", "checkout")
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "out.json").read_text())["tests"]["counts"] == {"passed": 1, "skipped": 1}


def test_nothing_collected_is_a_failure(checkout: Path, tmp_path: Path) -> None:
    (checkout / "tests/gpu/test_it.py").unlink()
    result = invoke("--output", str(tmp_path / "out.json"), "--no-peers")
    assert result.exit_code == 1
    assert "tests: none ran" in result.output
