"""The loss of a configuration."""

import pytest

from protomem_kernels.training import heads
from protomem_kernels.training.config import schema
from tests.training.running import assert_refused, train


@pytest.mark.parametrize("table", ["MARGINS", "MINING", "QUALITY"])
def test_every_choice_has_its_builder(table):
    field = {"MARGINS": "margin", "MINING": "mining", "QUALITY": "quality"}[table]
    assert tuple(getattr(heads, table)) == tuple(schema()[field]["enum"])


def test_capacity_below_the_batch(tiny):
    assert_refused(train(tiny, "--capacity", 3), "capacity must be at least", "got 3")
