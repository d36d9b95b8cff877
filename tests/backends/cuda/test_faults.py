"""Small faults in the CUDA kernels, one at a time (tests/faults/cuda): the checks of its operator must notice each."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.backends.cuda.operators import SOURCES
from tests.faults.cuda.runner import assert_noticed, assert_quiet, faults_of

OPERATORS = sorted(source.stem for source in SOURCES.glob("*.cu"))
FAULTS = {name: (operator, fault) for operator in OPERATORS for name, fault in faults_of(operator).FAULTS.items()}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_noticed(name: str, mode: str, tmp_path: Path) -> None:
    assert_noticed(*FAULTS[name], mode, tmp_path)


@pytest.mark.parametrize("operator", OPERATORS)
def test_the_checks_pass_without_a_fault(operator: str, mode: str, tmp_path: Path) -> None:
    assert_quiet(operator, mode, tmp_path)
