from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from protomem_kernels.gpu_check.records import Lines, Record
from tests.gpu_check.bare import bare_python


@pytest.fixture(scope="session")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bare_python(tmp_path_factory.mktemp("bare"))


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a CPU stand in for the GPU, where there is one too."""
    monkeypatch.setenv("PROTOMEM_GPU_STAND_IN", "cpu")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


@pytest.fixture
def outside() -> dict[str, str]:
    """Return an environment for processes: no GPU, nothing that steers pytest, coverage or the check."""
    steering = ("PYTEST_", "COV_", "COVERAGE_", "TRITON_", "PROTOMEM_", "PYTHONPATH")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(steering)}
    return {**kept, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


@pytest.fixture
def recorded(tmp_path: Path) -> Callable[[str], tuple[Record, Callable[[], list[dict[str, Any]]]]]:
    """Return a function that makes a record for a part, and one that reads what it wrote: results alone."""

    def make(part: str) -> tuple[Record, Callable[[], list[dict[str, Any]]]]:
        file = tmp_path / f"{part}.jsonl"
        return Record(file, 0.0, part), lambda: [line for line in Lines(file).new() if "what" in line]

    return make
