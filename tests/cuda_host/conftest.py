"""The modes and the orders of blocks and threads in which this folder's tests run their kernels."""

from __future__ import annotations

import os

import pytest

from tests.cuda_host import build, operators

# Set by test_sanitized.py in the process it starts.
IN_PROCESS = ["sanitized"] if os.environ.get("PROTOMEM_CUDA_HOST") == "sanitized" else ["plain", "race"]


@pytest.fixture(scope="session", params=IN_PROCESS)
def mode(request: pytest.FixtureRequest) -> str:
    reason = build.unavailable()
    if reason is not None:
        pytest.skip(reason)
    return str(request.param)


@pytest.fixture(params=range(3))
def ops(mode: str, request: pytest.FixtureRequest) -> operators.Operators:
    """The operators of csrc/cuda, three times: with the natural order and with two others."""
    if mode == "sanitized" and request.param > 0:
        pytest.skip("what the sanitizers see does not depend on the order")
    library = operators.load(mode)
    library.seed(request.param)
    return library
