"""A table small enough for a test: faces of ORL at 16 x 16, a few steps."""

from __future__ import annotations

import pytest

from protomem_kernels.experiments.images import read_sets
from protomem_kernels.experiments.trial import trial_from

SMALL = {
    "data": "orl",
    "image_size": [16, 16],
    "identities": 24,
    "validation_identities": 6,
    "test_identities": 10,
    "images_tested": 6,
    "steps": 8,
    "identities_per_batch": 6,
    "images_per_identity": 2,
    "embedding_dim": 16,
    "width": 4,
    "augmentation": 0.0,
}


@pytest.fixture
def trial():
    """Make a small trial, with some keys otherwise."""
    return lambda **own: trial_from(SMALL | own, "a test")


@pytest.fixture(scope="session")
def sets():
    return read_sets(trial_from(SMALL, "a test"))
