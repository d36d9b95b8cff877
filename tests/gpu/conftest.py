"""Tests in this folder say themselves what lies on the GPU: nothing of theirs gets there unasked."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def tensors_on_the_gpu() -> None:
    """Take the place of the fixture that the contract suites run under."""
