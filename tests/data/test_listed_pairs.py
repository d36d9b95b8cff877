"""Figures of a list of pairs: by hand, by those of all pairs, and what a list cannot say."""

import tracemalloc

import numpy as np
import pytest

from protomem_kernels.data import arrays
from protomem_kernels.data.evaluation import all_pairs, evaluate, evaluate_pairs, hardest_listed_pairs, hardest_pairs
from protomem_kernels.data.intervals import wilson
from protomem_kernels.data.pairs import Pairs, verification_pairs


def drawn(seed=0, identities=12, images=4):
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(identities), images)
    return rng.normal(size=(identities, 6))[labels] + rng.normal(size=(len(labels), 6)), labels


def test_the_list_of_all_pairs_has_the_figures_of_all_pairs():
    embeddings, labels = drawn()
    listed, every = evaluate_pairs(embeddings, all_pairs(labels), labels=labels + 70), evaluate(embeddings, labels)
    for name in ("auc", "tar_at_far_1e_2", "tar_at_far_1e_3", "genuine_pairs", "impostor_pairs", "identities"):
        assert getattr(listed, name) == getattr(every, name)
    assert listed.tar_at_far_1e_2_low == pytest.approx(every.tar_at_far_1e_2_low)
    np.testing.assert_array_equal(listed.roc.far, every.roc.far)
    assert (listed.rank1, listed.rank1_probes) == (None, 0)


def test_folds_are_stretches_of_the_list():
    """The list's second half is mirrored: every threshold that is right for one half is wrong for the other."""
    angles = np.deg2rad([0, 10, 80, 100, 170])
    embeddings = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    easy, wrong = [(0, 1, True), (0, 2, False)], [(0, 4, True), (0, 3, False)]
    first, second, same = (np.array(part) for part in zip(*(5 * easy + 5 * wrong), strict=True))
    result = evaluate_pairs(embeddings, Pairs(first, second, same), folds=2)
    assert result.verification_accuracy == 0.5
    assert result.folds == 2


def test_where_identities_are_unknown_the_intervals_are_of_pairs():
    embeddings, labels = drawn()
    pairs = verification_pairs(labels)
    result = evaluate_pairs(embeddings, pairs)
    low, high = wilson(result.verification_accuracy, len(pairs.same))
    assert (result.verification_accuracy_low, result.verification_accuracy_high) == (low, high)
    assert (result.tar_at_far_1e_2_low, result.tar_at_far_1e_2_high) == wilson(result.tar_at_far_1e_2, 72)
    known = evaluate_pairs(embeddings, pairs, labels=labels)
    assert known.verification_accuracy_low < low  # twelve people are fewer than 144 pairs
    assert result.identities is None


def test_few_pairs_say_so():
    embeddings = np.eye(8)[[0, 0, 1, 1]]
    result = evaluate_pairs(
        embeddings, Pairs(np.array([0, 2, 0, 1]), np.array([1, 3, 2, 3]), np.array([1, 1, 0, 0]) > 0)
    )
    assert result.cautions() == [
        "2 impostor pairs cannot show a FAR of 0.01: TAR there lets no impostor in",
        "2 impostor pairs cannot show a FAR of 0.001: TAR there lets no impostor in",
        "4 pairs say little: accuracy 1.000 may be 0.510 to 1.000 (95 %)",
    ]
    assert result.as_dict()["rank1"] is None


def test_the_hardest_of_a_list_are_the_hardest_of_all():
    embeddings, labels = drawn(1)
    every, listed = hardest_pairs(embeddings, labels, 5), hardest_listed_pairs(embeddings, all_pairs(labels), 5)
    for ours, theirs in zip(listed, every, strict=True):
        assert [pair[:2] for pair in ours] == [pair[:2] for pair in theirs]
        assert [pair[2] for pair in ours] == pytest.approx([pair[2] for pair in theirs])
    kept = Pairs(*(part[::3] for part in all_pairs(labels)))
    assert set(hardest_listed_pairs(embeddings, kept, 3).false_accepts) != set(listed.false_accepts)


@pytest.mark.parametrize(
    ("pairs", "options", "said"),
    [
        (([0], [1], [True]), {}, "same must hold genuine"),
        (([0, 0], [1, 2], [True, False]), {}, "folds must be at least 2 and at most 1"),
        (([0, 0], [1, 9], [True, False]), {}, r"pairs must be positions in \[0, 4\)"),
        (([0, 2, 0, 1], [1, 3, 2, 3], [True, True, False, False]), {"labels": [1]}, r"labels must have shape \(4,\)"),
        (([0, 2, 0, 1], [1, 3, 2, 3], [True, True, False, False]), {"resamples": 0}, "resamples must be at least 1"),
    ],
)
def test_what_is_refused(pairs, options, said):
    with pytest.raises(ValueError, match=said):
        evaluate_pairs(np.eye(4), Pairs(*map(np.array, pairs)), **options)


def test_no_copy_is_made_of_wide_rows(monkeypatch):
    """Raw pixels of insightface's lists are gigabytes."""
    monkeypatch.setattr(arrays, "CHUNK_BYTES", 2**18)
    rows = np.random.default_rng(0).normal(size=(400, 5000)).astype(np.float32)
    pairs = all_pairs(np.arange(400) // 2)
    some = Pairs(*(part[:400] for part in pairs))
    tracemalloc.start()
    evaluate_pairs(rows, some)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < rows.nbytes / 2
