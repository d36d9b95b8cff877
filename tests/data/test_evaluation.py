"""The metrics against literal worked examples and against loops over all pairs, thresholds and images."""

import dataclasses
import json
import tracemalloc
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold

from protomem_kernels.data import arrays
from protomem_kernels.data.evaluation import (
    Pairs,
    all_pairs,
    cosine_scores,
    evaluate,
    hardest_pairs,
    rank1,
    roc,
    tar_at_far,
    verification_accuracy,
    verification_pairs,
)
from protomem_kernels.data.pairs import draw
from protomem_kernels.data.scores import _best_threshold

usable_labels = st.lists(st.integers(0, 5), min_size=3, max_size=25).filter(
    lambda labels: 1 < len(set(labels)) < len(labels)
)


def as_set(pairs: Pairs, same: bool) -> set[tuple[int, int]]:
    found = [(int(i), int(j)) for i, j, is_same in zip(*pairs, strict=True) if is_same == same]
    assert len(found) == len(set(found))
    return set(found)


def clustered(labels: np.ndarray, spread: float = 1.0, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(labels.max() + 1, 16))[labels] + spread * rng.normal(size=(len(labels), 16))


def slow_cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(sum(x * y for x, y in zip(a, b, strict=True)) / (sum(a * a) * sum(b * b)) ** 0.5)


@settings(deadline=None, max_examples=50)
@given(usable_labels)
def test_all_pairs_are_all_pairs(labels):
    pairs = all_pairs(labels)
    expected = set(combinations(range(len(labels)), 2))
    genuine = {(i, j) for i, j in expected if labels[i] == labels[j]}
    assert as_set(pairs, True) == genuine
    assert as_set(pairs, False) == expected - genuine


@settings(deadline=None, max_examples=50)
@given(usable_labels, st.integers(0, 2**32 - 1))
def test_verification_pairs_hold_all_genuine_pairs_and_as_many_impostors(labels, seed):
    every, pairs = all_pairs(labels), verification_pairs(labels, seed)
    genuine, impostors = as_set(pairs, True), as_set(pairs, False)
    assert genuine == as_set(every, True)
    assert impostors <= as_set(every, False)
    assert len(impostors) == min(len(genuine), len(as_set(every, False)))
    for one, again in zip(pairs, verification_pairs(torch.tensor(labels), seed), strict=True):
        np.testing.assert_array_equal(one, again)


def test_impostors_are_drawn_uniformly():
    labels = [0, 0, 1, 1, 2, 2, 3, 4]  # 3 genuine pairs, 25 impostor pairs
    counts = dict.fromkeys(as_set(all_pairs(labels), False), 0)
    draws = 2000
    for seed in range(draws):
        for pair in as_set(verification_pairs(labels, seed), False):
            counts[pair] += 1
    expected = draws * 3 / 25
    assert sum((count - expected) ** 2 / expected for count in counts.values()) < 52  # chi-square, 24 d.o.f., p = 0.001


@pytest.mark.parametrize(("total", "count"), [(5, 5), (7, 5), (1000, 30), (2**40, 1000)])
def test_draw(total, count):
    drawn = draw(total, count, seed=3)
    assert drawn.dtype == np.int64
    assert len(set(drawn.tolist())) == count
    assert drawn.min() >= 0
    assert drawn.max() < total
    assert drawn.tolist() == sorted(drawn.tolist())


@pytest.mark.parametrize("kind", [np.float64, np.float32, np.float16, torch.float32, torch.bfloat16])
def test_cosines(kind, monkeypatch):
    monkeypatch.setattr(arrays, "CHUNK_BYTES", 200)  # several chunks
    values = [[3.0, 4.0], [5.0, 12.0], [-3.0, -4.0], [0.0, 0.0]]
    embeddings = (
        torch.tensor(values, dtype=kind, requires_grad=True)
        if isinstance(kind, torch.dtype)
        else np.array(values, dtype=kind)
    )
    pairs = Pairs(np.array([0, 0, 1, 0]), np.array([1, 2, 2, 3]), np.array([True, True, False, False]))
    np.testing.assert_allclose(cosine_scores(embeddings, pairs), [63 / 65, -1, -63 / 65, 0], rtol=1e-15)


@pytest.mark.parametrize("size", [1e-300, 1e300])
def test_cosines_of_extreme_lengths(size):
    pairs = Pairs(np.array([0]), np.array([1]), np.array([True]))
    assert cosine_scores(np.array([[3.0, 4.0], [4.0, 3.0]]) * size, pairs) == pytest.approx(0.96)


def test_accuracy_by_loops_over_folds_and_thresholds():
    rng = np.random.default_rng(1)
    same = np.arange(60) < 30
    scores = rng.normal(size=60) + same
    for seed in range(3):
        expected = []
        for others, fold in StratifiedKFold(5, shuffle=True, random_state=seed).split(scores, same):
            ranked = np.sort(scores[others])
            middles = [-np.inf, *((ranked[1:] + ranked[:-1]) / 2), np.inf]
            right = [int(((scores[others] >= middle) == same[others]).sum()) for middle in middles]
            best = max(middle for middle, count in zip(middles, right, strict=True) if count == max(right))
            expected.append(((scores[fold] >= best) == same[fold]).mean())
        found = verification_accuracy(scores, same, folds=5, seed=seed)
        assert found == pytest.approx((sum(expected) / 5, np.var(expected) ** 0.5))


def test_accuracy_of_a_known_split_and_threshold():
    # Thresholds 0.5 (accepts 4 of 6) and 2.5 (accepts 2 of 6) are both right on 5 of 6.
    scores = np.tile([3.0, 3.0, 1.0, 2.0, 0.0, 0.0], 100)
    same = np.tile([True, True, True, False, False, False], 100)
    mean, deviation = verification_accuracy(scores, same)
    assert mean == pytest.approx(5 / 6, abs=0.02)
    assert 0 < deviation < 0.1


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(-4, 4), st.booleans()), min_size=2, max_size=30))
def test_best_threshold_is_the_best_of_all(pairs):
    scores, same = np.array([p[0] for p in pairs], float), np.array([p[1] for p in pairs])
    if same.all() or not same.any():
        return

    def right(threshold: float) -> int:
        return sum((score >= threshold) == is_same for score, is_same in zip(scores, same, strict=True))

    found = _best_threshold(scores, same)
    candidates = np.arange(-4.5, 5)
    assert right(found) == max(right(threshold) for threshold in candidates)
    # The highest of the equally good ones.
    assert all(
        right(threshold) < right(found)
        for threshold in candidates
        if not (scores < threshold).all()
        if ((scores >= found) & (scores < threshold)).any()
    )


def test_the_threshold_lies_half_way():
    assert _best_threshold(np.array([0.8, 0.9, 0.2, 0.1]), np.array([1, 1, 0, 0], bool)) == 0.5


def test_chance_and_perfection():
    rng = np.random.default_rng(0)
    same = np.arange(4000) < 2000
    mean, deviation = verification_accuracy(rng.normal(size=4000), same)
    assert mean == pytest.approx(0.5, abs=0.03)
    assert 0 < deviation < 0.06
    assert verification_accuracy(same + 0.1 * rng.random(4000), same) == (1.0, 0.0)
    assert roc(same + 0.1 * rng.random(4000), same).auc == 1.0


def test_roc_worked_example():
    # Falling scores: genuine 0.9, impostor 0.8, genuine 0.7, impostor 0.6.
    far, tar, thresholds, area = roc([0.9, 0.7, 0.8, 0.6], [True, True, False, False])
    assert far.tolist() == [0, 0, 0.5, 0.5, 1]
    assert tar.tolist() == [0, 0.5, 0.5, 1, 1]
    assert thresholds.tolist() == [np.inf, 0.9, 0.8, 0.7, 0.6]
    assert area == 0.75


scored_pairs = st.lists(st.tuples(st.integers(0, 12), st.booleans()), min_size=2, max_size=40).filter(
    lambda pairs: len({same for _, same in pairs}) == 2
)


@settings(deadline=None)
@given(scored_pairs, st.sampled_from([0.0, 0.01, 0.1, 1 / 3, 0.5, 1.0]))
def test_auc_and_tar_by_definition(pairs, far):
    scores, same = np.array([p[0] for p in pairs], float), np.array([p[1] for p in pairs])
    genuine, impostors = scores[same], scores[~same]
    wins = sum((g > i) + 0.5 * (g == i) for g in genuine for i in impostors)
    assert roc(scores, same).auc == pytest.approx(wins / (len(genuine) * len(impostors)))
    best = max(
        float((genuine >= threshold).mean())
        for threshold in [*scores, np.inf]
        if (impostors >= threshold).mean() <= far
    )
    assert tar_at_far(scores, same, far) == pytest.approx(best)


def test_tar_counts_whole_impostors():
    scores = np.concatenate([np.linspace(0, 1, 1000), [0.9985, 0.9995, 2.0]])  # impostors 1/999 apart
    same = np.arange(1003) >= 1000
    assert tar_at_far(scores, same, 0) == pytest.approx(1 / 3)
    assert tar_at_far(scores, same, 0.000999) == pytest.approx(1 / 3)
    assert tar_at_far(scores, same, 0.001) == pytest.approx(2 / 3)  # one impostor, the one at 1.0
    assert tar_at_far(scores, same, 0.002) == 1.0


def test_rank1_worked_example():
    angles = np.deg2rad([0, 10, 25, 90, 30])
    embeddings = np.stack([np.cos(angles), np.sin(angles)], axis=1) * [[1], [5], [2], [1], [7]]
    # Nearest: 0 -> 1 right, 1 -> 0 right, 2 (label 1) -> 4 wrong, 3 (label 1) -> 4 wrong, 4 is alone: not counted.
    assert rank1(embeddings, [0, 0, 1, 1, 2]) == 0.5


@pytest.mark.parametrize("chunk", [8, 1000, 2**26])
def test_rank1_and_hardest_pairs_by_loops(chunk, monkeypatch):
    monkeypatch.setattr(arrays, "CHUNK_BYTES", chunk)
    labels = np.array([0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 2, 0, 1, 0])
    embeddings = clustered(labels)
    cosines = {
        (i, j): slow_cosine(embeddings[i], embeddings[j]) for i in range(len(labels)) for j in range(len(labels))
    }
    hits = []
    for i in range(len(labels)):
        others = [j for j in range(len(labels)) if j != i]
        if any(labels[j] == labels[i] for j in others):
            hits.append(labels[max(others, key=lambda j: cosines[i, j])] == labels[i])
    assert rank1(torch.from_numpy(embeddings), labels) == pytest.approx(np.mean(hits))

    ranked = sorted((cosine, i, j) for (i, j), cosine in cosines.items() if i < j)
    rejects = [(i, j) for _, i, j in ranked if labels[i] == labels[j]][:4]
    accepts = [(i, j) for _, i, j in reversed(ranked) if labels[i] != labels[j]][:4]
    found = hardest_pairs(embeddings, labels, 4)
    assert [pair[:2] for pair in found.false_accepts] == accepts
    assert [pair[:2] for pair in found.false_rejects] == rejects
    for i, j, cosine in found.false_accepts + found.false_rejects:
        assert cosine == pytest.approx(cosines[i, j])


def test_hardest_pairs_are_fewer_than_asked_where_there_are_fewer():
    found = hardest_pairs(np.eye(3), [0, 0, 1], 10)
    assert found.false_accepts == [(0, 2, 0.0), (1, 2, 0.0)]  # equal cosines: by position
    assert found.false_rejects == [(0, 1, 0.0)]


def test_evaluate_puts_the_pieces_together():
    labels = np.repeat(np.arange(12), 6)
    embeddings = clustered(labels, spread=1.2)
    result = evaluate(embeddings, torch.from_numpy(labels), seed=5)
    balanced, every = verification_pairs(labels, 5), all_pairs(labels)
    accuracy = verification_accuracy(cosine_scores(embeddings, balanced), balanced.same, seed=5)
    scores = cosine_scores(embeddings, every)
    assert (result.verification_accuracy, result.verification_accuracy_std) == accuracy
    assert result.auc == pytest.approx(roc_auc_score(every.same, scores))
    assert result.tar_at_far_1e_2 == tar_at_far(scores, every.same, 0.01)
    assert result.tar_at_far_1e_3 == tar_at_far(scores, every.same, 0.001)
    assert result.rank1 == rank1(embeddings, labels)
    assert (result.folds, result.genuine_pairs, result.impostor_pairs) == (10, 12 * 15, 72 * 71 // 2 - 12 * 15)
    assert 0 < result.tar_at_far_1e_3 < result.tar_at_far_1e_2 < result.auc < 1

    plain = json.loads(json.dumps(result.as_dict()))
    assert plain == {
        name: getattr(result, name) for name in (item.name for item in dataclasses.fields(result)) if name != "roc"
    }
    assert result == evaluate(embeddings, labels, seed=5)
    assert "roc" not in repr(result)
    np.testing.assert_array_equal(result.roc.far, roc(scores, every.same).far)
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.auc = 1.0


def test_evaluate_on_few_pairs_takes_fewer_folds():
    result = evaluate(np.array([[1.0, 0], [0.9, 0.1], [0, 1.0], [0.1, 0.9]]), [0, 0, 1, 1])
    assert result.folds == 2
    assert result.as_dict()["rank1"] == 1.0


def test_evaluate_draws_impostors_beyond_the_limit():
    labels = np.repeat(np.arange(40), 5)
    embeddings = clustered(labels, spread=1.5)
    full, drawn = evaluate(embeddings, labels), evaluate(embeddings, labels, max_impostors=3000)
    assert (drawn.genuine_pairs, drawn.impostor_pairs) == (400, 3000)
    assert drawn.auc == pytest.approx(full.auc, abs=0.01)
    assert drawn.auc != full.auc
    assert drawn.rank1 == full.rank1


def test_evaluate_draws_genuine_pairs_and_probes_beyond_the_limit():
    labels = np.concatenate([np.zeros(200, int), 1 + np.repeat(np.arange(40), 5)])
    embeddings = clustered(labels, spread=1.5)
    full = evaluate(embeddings, labels)
    drawn = evaluate(embeddings, labels, 7, max_genuine=3000, max_probes=150, max_impostors=30_000)
    assert (full.genuine_pairs, full.genuine_pairs_in_all) == (20_300, 20_300)
    assert (drawn.genuine_pairs, drawn.genuine_pairs_in_all) == (3000, 20_300)
    assert (drawn.impostor_pairs, drawn.impostor_pairs_in_all) == (30_000, full.impostor_pairs)
    assert (full.rank1_probes, drawn.rank1_probes, drawn.seed, drawn.identities) == (400, 150, 7, 41)
    for name in ("verification_accuracy", "auc", "tar_at_far_1e_2", "rank1"):
        assert getattr(drawn, name) == pytest.approx(getattr(full, name), abs=0.1 if name == "rank1" else 0.03)
    assert drawn != full
    assert drawn == evaluate(embeddings, labels, 7, max_genuine=3000, max_probes=150, max_impostors=30_000)


def test_drawn_genuine_pairs_are_uniform():
    labels = [0, 0, 0, 0, 1, 1, 2, 2, 2]  # 10 genuine pairs
    counts = dict.fromkeys(as_set(all_pairs(labels), True), 0)
    draws = 2000
    for seed in range(draws):
        pairs = verification_pairs(labels, seed, max_genuine=3)
        assert pairs.same.tolist() == [True] * 3 + [False] * 3
        for pair in as_set(pairs, True):
            counts[pair] += 1
    expected = draws * 3 / 10
    assert sum((count - expected) ** 2 / expected for count in counts.values()) < 28  # chi-square, 9 d.o.f., p = 0.001


def test_memory_grows_with_the_images_not_with_their_pairs(monkeypatch):
    monkeypatch.setattr(arrays, "CHUNK_BYTES", 2**20)
    labels = np.concatenate([np.zeros(3000, int), np.repeat(np.arange(1, 101), 2)])  # 4.5 million genuine pairs
    embeddings = np.random.default_rng(0).normal(size=(len(labels), 4))
    tracemalloc.start()
    evaluate(embeddings, labels, max_genuine=5000, max_impostors=5000, max_probes=100, resamples=5)
    hardest_pairs(embeddings, labels, 8)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40e6  # the pairs alone would be 77 MB


def test_cautions_name_what_a_small_set_cannot_say():
    few = evaluate(clustered(np.repeat(np.arange(4), 3)), np.repeat(np.arange(4), 3))
    assert few.cautions()[:2] == [
        f"54 impostor pairs cannot show a FAR of {far}: TAR there lets no impostor in" for far in ("0.01", "0.001")
    ]
    assert few.cautions()[2].startswith("4 identities say little: accuracy ")
    labels = np.repeat(np.arange(150), 4)
    assert evaluate(clustered(labels), labels).cautions() == []


GOOD = np.eye(4)


@pytest.mark.parametrize(
    ("embeddings", "labels", "message"),
    [
        (GOOD, [[0, 0, 1, 1]], r"labels must be integers of shape \(N,\), got int64 of shape \(1, 4\)"),
        (GOOD, [0.0, 0.0, 1.0, 1.0], r"labels must be integers of shape \(N,\), got float64 of shape \(4,\)"),
        (GOOD, [0, 0, -1, 1], "labels must be identities, that is >= 0, got -1"),
        (GOOD, [5, 5, 5, 5], "labels must hold at least two identities, got 1"),
        (GOOD, np.zeros(0, int), "labels must hold at least two identities, got 0"),
        (GOOD, [0, 1, 2, 3], r"labels must hold at least one identity twice \(a genuine pair\), got 4 different"),
        (np.ones(4), [0, 0, 1, 1], r"embeddings must be floating of shape \(N, D\), got float64 of shape \(4,\)"),
        (np.eye(4, dtype=int), [0, 0, 1, 1], r"embeddings must be floating .* got int64 of shape \(4, 4\)"),
        (GOOD, [0, 0, 1], r"embeddings must have shape \(3, D\) to match labels \(3,\), got \(4, 4\)"),
        (torch.eye(4) * torch.tensor([1, 1, np.inf, 1]), [0, 0, 1, 1], "embeddings must be finite, got 4 of 4 rows"),
        (np.vstack([GOOD[:3], [[0, np.nan, 0, 0]]]), [0, 0, 1, 1], "finite, got 1 of 4 rows that are not, row 3 first"),
    ],
)
@pytest.mark.parametrize("function", [rank1, evaluate, lambda *given: hardest_pairs(*given, 2)])
def test_bad_embeddings_and_labels(function, embeddings, labels, message):
    with pytest.raises(ValueError, match=message):
        function(embeddings, labels)


def test_labels_in_whatever_form():
    embeddings = np.random.default_rng(0).normal(size=(6, 4))
    names = np.array([5, 5, 2, 2, 9, 9])

    class Series:  # as of pandas, shuffled: what it gives by index is not what stands at a position
        def __array__(self, *arguments, **options):
            return names[::-1]

        def to_numpy(self):
            return names

    hashes = (names.astype(np.uint64) << np.uint64(61)) + np.uint64(3)  # beyond int64
    assert len(np.unique(hashes)) == 3
    expected = evaluate(embeddings, names)
    for labels in (
        names.tolist(),
        names.astype(np.uint8),
        torch.from_numpy(names),
        Series(),
        hashes * 0 + names.astype("u8"),
    ):
        assert evaluate(embeddings, labels) == expected
    assert rank1(embeddings, hashes) == rank1(embeddings, names)


@pytest.mark.parametrize(
    ("labels", "way"),
    [
        (["ann", "ann", "bob", "bob"], "number them: numpy.unique"),
        (np.zeros((4, 1), int), r"labels.squeeze\(1\) makes it so"),
        ([0.0, 0.0, 1.0, 1.0], r"labels.astype\('int64'\) makes it so"),
    ],
)
def test_labels_that_a_call_mends(labels, way):
    with pytest.raises(ValueError, match=rf"labels must be integers of shape \(N,\), got .*; {way}"):
        rank1(GOOD, labels)


@pytest.mark.parametrize(
    ("scores", "same", "message"),
    [
        ([[0.5, 0.1]], [True, False], r"scores must be floating of shape \(P,\), got float64 of shape \(1, 2\)"),
        ([1, 0], [True, False], r"scores must be floating of shape \(P,\), got int64"),
        ([0.5, 0.1], [True], r"same must be bool of shape \(2,\) to match scores, got bool of shape \(1,\)"),
        ([0.5, 0.1], [1, 0], r"same must be bool of shape \(2,\) to match scores, got int64"),
        ([0.5, np.nan], [True, False], "scores must be finite, got 1 that are not"),
        ([0.5, 0.1], [True, True], r"same must hold genuine \(True\) and impostor \(False\) pairs, got 2 of one kind"),
        ([0.5, 0.1], [False, False], "got 2 of one kind only"),
    ],
)
@pytest.mark.parametrize("function", [roc, verification_accuracy, lambda *given: tar_at_far(*given, 0.1)])
def test_bad_scores(function, scores, same, message):
    with pytest.raises(ValueError, match=message):
        function(scores, same)


@pytest.mark.parametrize("function", [all_pairs, verification_pairs])
def test_pairs_check_their_labels(function):
    with pytest.raises(ValueError, match="at least two identities, got 1"):
        function([3, 3])


def test_other_bad_arguments():
    with pytest.raises(ValueError, match="folds must be at least 2 and at most 1, the number of pairs"):
        verification_accuracy([0.1, 0.2, 0.3], [True, False, False], folds=2)
    with pytest.raises(ValueError, match=r"folds must be at least 2 and at most 2, .* got 1"):
        verification_accuracy([0.1, 0.2, 0.3, 0.4], [True, False] * 2, folds=1)
    with pytest.raises(ValueError, match=r"far must be in \[0, 1\], got 1.5"):
        tar_at_far([0.1, 0.2], [True, False], 1.5)
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        hardest_pairs(GOOD, [0, 0, 1, 1], 0)
    with pytest.raises(ValueError, match="max_impostors must be at least 1, got 0"):
        evaluate(GOOD, [0, 0, 1, 1], max_impostors=0)
    outside = Pairs(np.array([0]), np.array([4]), np.array([True]))
    with pytest.raises(ValueError, match=r"pairs must be positions in \[0, 4\), got 0 to 4"):
        cosine_scores(GOOD, outside)
