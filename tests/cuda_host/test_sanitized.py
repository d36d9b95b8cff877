"""Every test that runs kernels, of this folder and of the operators, once more under the sanitizers of GCC."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cuda_host import build, suites

pytestmark = pytest.mark.skipif("PROTOMEM_CUDA_HOST" in os.environ, reason="this is the process it starts")


def execute(folder: Path, *arguments: str) -> tuple[subprocess.CompletedProcess[str], str]:
    """Run a command with the sanitizers' runtimes; return the process and their reports."""
    reason = build.unavailable()
    if reason is not None:
        pytest.skip(reason)
    runtimes = [
        subprocess.run([build.COMPILER, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    environment = {
        **os.environ,
        "PROTOMEM_CUDA_HOST": "sanitized",
        "LD_PRELOAD": ":".join(runtimes),
        "ASAN_OPTIONS": f"detect_leaks=0:log_path={folder}/report",
        "UBSAN_OPTIONS": f"print_stacktrace=1:log_path={folder}/report",
        "OMP_NUM_THREADS": "1",
    }
    process = subprocess.run(arguments, cwd=build.ROOT, env=environment, capture_output=True, text=True)
    return process, "\n".join(path.read_text() for path in folder.glob("report*"))


# All but those that have no kernel to run under the sanitizers, or start their own processes.
OTHERS = {"test_contract.py", "test_objects.py", "test_race_oracle.py", "test_readme.py", "test_sanitized.py"}
OTHERS |= {"test_specimens.py"}
FILES = {
    folder: [
        f"{folder}/{path.name}" for path in sorted((build.ROOT / folder).glob("test_*.py")) if path.name not in OTHERS
    ]
    for folder in ("tests/cuda_host", "tests/backends/cuda")
}


@pytest.mark.slow
@pytest.mark.parametrize("folder", FILES)
def test_the_kernels_under_the_sanitizers(folder: str, tmp_path: Path) -> None:
    """In one process for a folder: it takes four seconds to have PyTorch under the sanitizers."""
    process, reports = execute(tmp_path, *suites.command(FILES[folder], "sanitized"))
    assert process.returncode == 0, process.stdout + process.stderr + reports
    assert reports == ""
    assert suites.with_a_pass(process.stdout) == {*FILES[folder]}


@pytest.mark.parametrize(
    ("x", "y"), [("torch.empty(124)", "torch.empty(128)"), ("torch.empty(128)", "torch.empty(124)")]
)
def test_a_step_past_a_tensor_is_seen(tmp_path: Path, x: str, y: str) -> None:
    call = f"build.load('wrappers.cpp', 'sanitized').call('twice_float32', {x}, {y}, 128)"
    code = f"import torch\nfrom tests.cuda_host import build\n{call}"
    process, reports = execute(tmp_path, sys.executable, "-c", code)
    assert process.returncode != 0
    assert "heap-buffer-overflow" in reports
    assert "kernel twice<float>, block (0, 0, 0), thread (31, 0, 0)" in process.stderr
