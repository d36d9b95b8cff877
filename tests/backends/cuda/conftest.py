"""The operators in the orders of blocks and threads in which this folder's tests run them."""

from __future__ import annotations

import pytest

from tests.backends.cuda import operators
from tests.cuda_host.modes import mode as mode


@pytest.fixture(params=range(3))
def ops(mode: str, request: pytest.FixtureRequest) -> operators.Operators:
    """The operators of csrc/cuda, three times: with the natural order and with two others."""
    if mode == "sanitized" and request.param > 0:
        pytest.skip("what the sanitizers see does not depend on the order")
    library = operators.load(mode)
    library.seed(request.param)
    return library
