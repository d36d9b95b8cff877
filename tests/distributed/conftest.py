"""One pool of processes for all tests of a session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.distributed.pool import Pool

POOLS: list[Pool] = []


@pytest.fixture(scope="session")
def _pools() -> Iterator[list[Pool]]:
    yield POOLS
    for pool in POOLS:
        pool.close()


@pytest.fixture
def pool(_pools: list[Pool]) -> Iterator[Pool]:
    """The pool; another one after a task that did not end."""
    if not _pools:
        _pools.append(Pool(3))
    try:
        yield _pools[-1]
    except TimeoutError:
        _pools.pop().close()
        raise
