"""Identities stay whole, apart and where a seed put them."""

import pytest
import torch

from protomem_kernels.data.splits import split_by_identity

LABELS = torch.arange(100).repeat(3) * 7 + 5


def test_parts_are_disjoint_and_of_the_size_asked_for():
    parts = split_by_identity(LABELS, (0.5, 0.3, 0.2), seed=3)
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(300))
    identities = [set(LABELS[part].tolist()) for part in parts]
    assert [len(part) for part in identities] == [50, 30, 20]
    assert len(set.union(*identities)) == 100
    assert all(torch.equal(part, part.sort().values) for part in parts)


def test_a_seed_decides_whatever_the_order_and_number_of_images():
    one = [set(LABELS[part].tolist()) for part in split_by_identity(LABELS, seed=1)]
    fewer = LABELS.flip(0)[:230]
    assert set(fewer.tolist()) == set(LABELS.tolist())
    assert [set(fewer[part].tolist()) for part in split_by_identity(fewer, seed=1)] == one
    assert [set(LABELS[part].tolist()) for part in split_by_identity(LABELS, seed=2)] != one


def test_the_chance_is_even():
    """Not the first labels to the first part: of 60 seeds, each identity is in training in some 36."""
    times = torch.zeros(100)
    for seed in range(60):
        times[(LABELS[split_by_identity(LABELS, seed=seed)[0]].unique() - 5) // 7] += 1
    assert times.mean() == 36
    assert times.min() > 20
    assert times.max() < 52


@pytest.mark.parametrize(
    ("labels", "parts", "error", "message"),
    [
        (LABELS, (0.5, 0.4), ValueError, "parts must sum to 1, got 0.9"),
        (LABELS, (1.2, -0.2), ValueError, r"parts\[0\] must be in \(0, 1\], got 1.2"),
        (LABELS, (1.0, 0.0), ValueError, r"parts\[1\] must be in \(0, 1\], got 0.0"),
        (LABELS, ("all",), TypeError, r"parts\[0\] must be a number, got str"),
        (LABELS[:2], (0.6, 0.2, 0.2), ValueError, "parts must each hold an identity, got 2 identities for"),
        (LABELS.float(), (0.5, 0.5), TypeError, "labels must be int64 or int32, got torch.float32"),
        (LABELS[None], (0.5, 0.5), ValueError, r"labels must have shape \(N,\), got \(1, 300\)"),
    ],
)
def test_bad_input(labels, parts, error, message):
    with pytest.raises(error, match=message):
        split_by_identity(labels, parts)
