"""The loss of a configuration."""

from tests.training.running import assert_refused, train


def test_capacity_below_the_batch(tiny):
    assert_refused(train(tiny, "--capacity", 3), "capacity must be at least", "got 3")
