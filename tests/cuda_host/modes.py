"""The modes in which tests run kernels on the CPU: a fixture for this folder and for tests/backends/cuda."""

from __future__ import annotations

import os

import pytest

from tests.cuda_host import build

# Set by test_sanitized.py in the process it starts.
IN_PROCESS = ["sanitized"] if os.environ.get("PROTOMEM_CUDA_HOST") == "sanitized" else ["plain", "race"]


@pytest.fixture(scope="session", params=IN_PROCESS)
def mode(request: pytest.FixtureRequest) -> str:
    reason = build.unavailable()
    if reason is not None:
        pytest.skip(reason)
    return str(request.param)
