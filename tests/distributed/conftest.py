"""One pool of processes for all tests of a session."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.distributed.pool import Pool

POOLS: list[Pool] = []
RANKS = 4 if os.environ.get("PROTOMEM_DISTRIBUTED") == "grid" else 3


@pytest.fixture(scope="session")
def _pools() -> Iterator[list[Pool]]:
    yield POOLS
    for pool in POOLS:
        pool.close()


@pytest.fixture
def pool(_pools: list[Pool]) -> Iterator[Pool]:
    """The pool; another one after a task that did not end."""
    if not _pools:
        _pools.append(Pool(RANKS))
    try:
        yield _pools[-1]
    except TimeoutError:
        _pools.pop().close()
        raise
