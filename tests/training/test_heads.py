"""The loss of a configuration."""

import pytest

from tests.training.running import assert_refused, train


def test_capacity_below_the_batch(tiny):
    assert_refused(train(tiny, "--capacity", 3), "capacity must be at least", "got 3")


@pytest.mark.parametrize("capacity", [10**14, 2**62, 2**63, 10**30])
def test_capacity_beyond_memory(tiny, capacity):
    assert_refused(train(tiny, "--capacity", capacity), "capacity must be one that memory holds", f"got {capacity}")
