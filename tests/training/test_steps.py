"""What a step depends on."""

import pytest

from protomem_kernels.training import steps


def test_the_learning_rate_warms_up_and_falls_to_zero():
    rates = [steps.rate_factor(step, 200) for step in range(200)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1.0, abs=0.01)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] < 1e-3
    assert steps.rate_factor(0, 1) == 1


def test_seeds_of_their_own():
    seeds = {steps.stream(seed, what, step) for seed in range(5) for what in ("a", "b") for step in range(50)}
    assert len(seeds) == 500
    assert all(0 <= seed < 2**32 for seed in seeds)
