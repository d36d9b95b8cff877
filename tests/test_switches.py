"""The environment switches: a wrong value is an error that lists the right ones, when the package is imported."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from protomem_kernels import _switches

PACKAGE = Path(_switches.__file__).parent


def importing(**environment: str) -> str:
    """Return the last line that a process says which imports the package."""
    command = [sys.executable, "-c", "import protomem_kernels.backends.choice; print('imported')"]
    process = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    return (process.stdout or process.stderr).strip().splitlines()[-1]


def test_a_wrong_value_stops_the_import_and_the_right_ones_are_listed() -> None:
    assert importing(PROTOMEM_CPU_CAPABILITY="baseline") == (
        "ValueError: the environment's PROTOMEM_CPU_CAPABILITY must be one of default, avx2, avx512, got 'baseline'"
    )


@pytest.mark.parametrize("name", _switches.SWITCHES)
@pytest.mark.parametrize("value", ["yes", "2", " 1", "AVX2", "true"])
def test_wrong_values(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    allowed = ", ".join(_switches.SWITCHES[name])
    with pytest.raises(ValueError, match=f"{name} must be one of {allowed}, got {value!r}"):
        _switches.value_of(name)
    with pytest.raises(ValueError, match="must be one of"):
        _switches.is_on(name)


@pytest.mark.parametrize("name", _switches.SWITCHES)
def test_right_values(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for value in _switches.SWITCHES[name]:
        monkeypatch.setenv(name, value)
        assert _switches.value_of(name) == value
        assert _switches.is_on(name) == (value == "1")
    monkeypatch.setenv(name, "")  # how a shell's scripts unset one
    assert _switches.value_of(name) is None
    monkeypatch.delenv(name)
    assert _switches.value_of(name) is None
    assert not _switches.is_on(name)


def test_every_switch_of_the_package_is_listed() -> None:
    """But for the one that is a path, those of the build, which setup.py holds, and those of the tests."""
    named = {
        name
        for path in PACKAGE.rglob("*.py")
        for name in re.findall(r"PROTOMEM_[A-Z_]+[A-Z]", path.read_text(encoding="utf-8"))
    }
    elsewhere = {"PROTOMEM_BUILD_CUDA", "PROTOMEM_CUDA_ARCH_LIST", "PROTOMEM_GPU_STAND_IN"}
    assert named - elsewhere - {"PROTOMEM_CACHE_DIR"} == set(_switches.SWITCHES)
