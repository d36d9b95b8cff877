"""Intervals of verification rates: known ones, and how often they hold what they should."""

import numpy as np
import pytest

from protomem_kernels.data.evaluation import evaluate
from protomem_kernels.data.intervals import wilson


def test_wilson_by_its_quadratic():
    for rate, trials in [(0.3, 17), (0.0, 5), (1.0, 40), (0.5, 1)]:
        for bound in wilson(rate, trials):
            if 0 < bound < 1:
                assert (rate - bound) ** 2 == pytest.approx(1.959964**2 * bound * (1 - bound) / trials)
    assert wilson(0.5, 0) == (0, 1)


def draw(rng, identities, images=4):
    """Embeddings of new people, who differ in how alike their images are."""
    labels = np.repeat(np.arange(identities), images)
    spread = rng.uniform(0.3, 2.0, size=(identities, 1))[labels]
    return rng.normal(size=(identities, 8))[labels] + spread * rng.normal(size=(len(labels), 8)), labels


def test_intervals_hold_the_rates_of_all_people_in_nine_of_ten_draws():
    rng = np.random.default_rng(0)
    truth = evaluate(*draw(rng, 1500), resamples=1)
    held = {"verification_accuracy": [], "tar_at_far_1e_2": []}
    widths = {12: [], 60: []}
    for identities, draws in ((12, 60), (60, 25)):
        for _ in range(draws):
            result = evaluate(*draw(rng, identities), resamples=60)
            for name, found in held.items():
                low, high = getattr(result, f"{name}_low"), getattr(result, f"{name}_high")
                assert low <= getattr(result, name) <= high
                found.append(low <= getattr(truth, name) <= high)
            widths[identities].append(result.verification_accuracy_high - result.verification_accuracy_low)
    for found in held.values():
        assert 0.85 <= np.mean(found) <= 1  # 95 % asked for; 85 draws
    assert np.mean(widths[12]) == pytest.approx(np.mean(widths[60]) * 5**0.5, rel=0.35)


def test_a_perfect_score_of_few_people_is_no_certainty():
    labels = np.repeat(np.arange(10), 5)
    embeddings = np.eye(10)[labels] + 0.01 * np.random.default_rng(0).normal(size=(50, 10))
    result = evaluate(embeddings, labels)
    assert result.verification_accuracy == result.tar_at_far_1e_3 == 1
    assert (result.verification_accuracy_low, result.verification_accuracy_high) == wilson(1, 10)
    assert result.tar_at_far_1e_3_low == wilson(1, 10).low
