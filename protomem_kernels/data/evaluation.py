"""Verification and identification metrics on embeddings of identities that were never trained on.

Two images are compared by the cosine of their embeddings; a pair is accepted if the cosine reaches a threshold.
A *genuine* pair shows one identity, an *impostor* pair two. TAR (true accept rate) is the accepted part of the genuine
pairs, FAR (false accept rate) that of the impostor pairs.

Everything is on NumPy and scikit-learn (the ``train`` extra); tensors are taken on any device. Cosines are float64, and
a zero embedding has cosine 0 with everything.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from sklearn.metrics import auc, roc_curve
from sklearn.model_selection import StratifiedKFold
from torch import Tensor

from protomem_kernels._checks import way_to_integers, way_to_one_dimension
from protomem_kernels.data.intervals import ScoredPairs, accuracy_interval, tar_intervals

__all__ = [
    "HardestPairs",
    "Pairs",
    "RocCurve",
    "VerificationResult",
    "all_pairs",
    "cosine_scores",
    "evaluate",
    "hardest_pairs",
    "rank1",
    "roc",
    "tar_at_far",
    "verification_accuracy",
    "verification_pairs",
]

Floats: TypeAlias = npt.NDArray[np.float64]
Ints: TypeAlias = npt.NDArray[np.int64]
Bools: TypeAlias = npt.NDArray[np.bool_]
ArrayLike: TypeAlias = Tensor | npt.ArrayLike

WIDE = 0.1  # an interval beyond this width says little
_INTERVAL_PAIRS = 100_000  # of each kind, of which intervals are estimated

_CHUNK_BYTES = 2**26  # of temporary float64 cosines or gathered embeddings


class Pairs(NamedTuple):
    """P pairs of images, ``first < second``, no pair twice: the genuine ones, then the impostors."""

    first: Ints  # (P,) position of one image
    second: Ints  # (P,) position of the other
    same: Bools  # (P,) whether both show the same identity


class RocCurve(NamedTuple):
    """TAR over FAR, from accepting nothing to accepting everything; T thresholds, falling."""

    far: Floats  # (T,)
    tar: Floats  # (T,)
    thresholds: Floats  # (T,) accepted is a score >= threshold; the first is infinite
    auc: float  # area under the curve; 0.5 is chance


class HardestPairs(NamedTuple):
    """The pairs most likely to be judged wrongly, the worst first, each as (i, j, cosine)."""

    false_accepts: list[tuple[int, int, float]]  # impostors with the highest cosines
    false_rejects: list[tuple[int, int, float]]  # genuine pairs with the lowest cosines


@dataclass(frozen=True)
class VerificationResult:
    """What :func:`evaluate` measures. All are parts of 1; ``roc`` is left out of ``as_dict()`` and of comparisons."""

    verification_accuracy: float
    verification_accuracy_std: float
    auc: float
    tar_at_far_1e_2: float
    tar_at_far_1e_3: float
    rank1: float
    folds: int  # of the verification accuracy
    genuine_pairs: int  # behind the ROC figures
    impostor_pairs: int
    genuine_pairs_in_all: int  # of which those were drawn, where they are fewer
    impostor_pairs_in_all: int
    rank1_probes: int  # images that were looked up
    identities: int
    seed: int  # of all that was drawn
    verification_accuracy_low: float  # 95 % confidence, over identities (data.intervals)
    verification_accuracy_high: float
    tar_at_far_1e_2_low: float
    tar_at_far_1e_2_high: float
    tar_at_far_1e_3_low: float
    tar_at_far_1e_3_high: float
    roc: RocCurve = field(repr=False, compare=False)

    def as_dict(self) -> dict[str, float]:
        """The numbers by name, without the curve: ready for JSON, CSV or TensorBoard."""
        return {item.name: getattr(self, item.name) for item in fields(self) if item.name != "roc"}

    def cautions(self) -> list[str]:
        """What these figures cannot say, because the set is too small: a line each, none where it is large enough.

        A false accept rate below 1 in the number of impostor pairs is measured as none at all; an interval wider than
        a tenth does not tell a good encoder from a poor one.
        """
        lines = [
            f"{self.impostor_pairs_in_all} impostor pairs cannot show a FAR of {far}: TAR there lets no impostor in"
            for far in (1e-2, 1e-3)
            if self.impostor_pairs_in_all * far < 1
        ]
        low, high = self.verification_accuracy_low, self.verification_accuracy_high
        if high - low > WIDE:
            lines.append(
                f"{self.identities} identities say little: accuracy {self.verification_accuracy:.3f} may be "
                f"{low:.3f} to {high:.3f} (95 %)"
            )
        return lines


def _array(values: ArrayLike) -> npt.NDArray[Any]:
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        values = values.double().numpy() if values.is_floating_point() else values.numpy()
    elif hasattr(values, "to_numpy"):  # of pandas: by position, whatever the index
        values = values.to_numpy()
    return np.asarray(values)


def _checked_labels(labels: ArrayLike) -> Ints:
    """Check labels, and return their ranks among the distinct ones: that is all that counts, and holds uint64 too."""
    array = _array(labels)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        way = way_to_one_dimension("labels", array.shape) or way_to_integers("labels", array.dtype.kind)
        raise ValueError(f"labels must be integers of shape (N,), got {array.dtype} of shape {array.shape}{way}")
    if array.size and array.min() < 0:
        raise ValueError(f"labels must be identities, that is >= 0, got {array.min()}")
    identities, ranks, counts = np.unique(array, return_inverse=True, return_counts=True)
    if len(identities) < 2:
        raise ValueError(f"labels must hold at least two identities, got {len(identities)}")
    if counts.max() < 2:
        raise ValueError(f"labels must hold at least one identity twice (a genuine pair), got {len(array)} different")
    return ranks.astype(np.int64)


def _unit(embeddings: ArrayLike, count: int | None = None) -> Floats:
    """Check embeddings and scale their rows to length 1: (N, D). A zero row stays zero."""
    array = _array(embeddings)
    if array.ndim != 2 or array.dtype.kind != "f":
        raise ValueError(f"embeddings must be floating of shape (N, D), got {array.dtype} of shape {array.shape}")
    if count is not None and len(array) != count:
        raise ValueError(f"embeddings must have shape ({count}, D) to match labels ({count},), got {array.shape}")
    bad = np.flatnonzero(~np.isfinite(array).all(axis=1))
    if len(bad):
        raise ValueError(
            f"embeddings must be finite, got {len(bad)} of {len(array)} rows that are not, row {bad[0]} first"
        )
    unit: Floats = array.astype(np.float64)
    largest = np.abs(unit).max(axis=1, keepdims=True, initial=0)
    np.divide(unit, largest, out=unit, where=largest > 0)  # so that no square overflows or vanishes
    length = np.linalg.norm(unit, axis=1, keepdims=True)
    np.divide(unit, length, out=unit, where=length > 0)
    return unit


def _checked_scores(scores: ArrayLike, same: ArrayLike) -> tuple[Floats, Bools]:
    score_array, same_array = _array(scores), _array(same)
    if score_array.ndim != 1 or score_array.dtype.kind != "f":
        raise ValueError(f"scores must be floating of shape (P,), got {score_array.dtype} of shape {score_array.shape}")
    if same_array.shape != score_array.shape or same_array.dtype != np.bool_:
        raise ValueError(
            f"same must be bool of shape {score_array.shape} to match scores, "
            f"got {same_array.dtype} of shape {same_array.shape}"
        )
    if not np.isfinite(score_array).all():
        raise ValueError(f"scores must be finite, got {int((~np.isfinite(score_array)).sum())} that are not")
    if same_array.all() or not same_array.any():
        raise ValueError(
            f"same must hold genuine (True) and impostor (False) pairs, got {len(same_array)} of one kind only"
        )
    return score_array.astype(np.float64), same_array


class _PairCounter:
    """All pairs of images as numbers: genuine 0 ... genuine - 1 and impostors 0 ... impostors - 1, nothing stored.

    With the images sorted by label, the genuine partners of position p are the positions up to the end of p's identity,
    its impostor partners all positions behind that; so a cumulative sum tells where a number belongs.
    """

    def __init__(self, labels: Ints) -> None:
        self.order = np.argsort(labels, kind="stable")
        position = np.arange(len(labels))
        end = np.searchsorted(labels[self.order], labels[self.order], side="right")
        self._genuine = position + 1, np.cumsum(end - position - 1)
        self._impostor = end, np.cumsum(len(labels) - end)
        self.genuine = int(self._genuine[1][-1])
        self.impostors = int(self._impostor[1][-1])

    def pairs(self, genuine: Ints, impostors: Ints) -> Pairs:
        ends = []
        for numbers, (start, total) in ((genuine, self._genuine), (impostors, self._impostor)):
            one = np.searchsorted(total, numbers, side="right")
            before = np.concatenate([[0], total])[one]
            ends.append(np.sort(self.order[np.stack([one, start[one] + numbers - before])], axis=0))
        first, second = np.concatenate(ends, axis=1)
        return Pairs(first, second, np.arange(len(first)) < len(genuine))


def _drawn_pairs(counter: _PairCounter, genuine: int | None, impostors: int | None, seed: int) -> Pairs:
    """So many of the genuine pairs (None: all) and of the impostors (None: as many as those), uniformly drawn."""
    kept = counter.genuine if genuine is None else min(counter.genuine, genuine)
    wanted = min(counter.impostors, kept if impostors is None else impostors)
    return counter.pairs(_draw(counter.genuine, kept, [seed, 1]), _draw(counter.impostors, wanted, seed))


def _draw(total: int, count: int, seed: int | list[int]) -> Ints:
    """Draw ``count`` of the numbers below ``total``, ascending, all sets equally likely; memory O(count)."""
    rng = np.random.default_rng(seed)
    if total == count:
        return np.arange(count)
    if total <= 2 * count:
        return np.sort(rng.permutation(total)[:count])
    drawn = np.empty(0, np.int64)
    while len(drawn) < count:
        drawn = np.sort(np.concatenate([drawn, rng.integers(total, size=count)]))
        drawn = drawn[np.diff(drawn, prepend=-1) > 0]
    return np.sort(rng.permutation(drawn)[:count])


def all_pairs(labels: ArrayLike) -> Pairs:
    """Every pair of images: N (N - 1) / 2 of them, 17 bytes each.

    Args:
        labels: (N,) integers >= 0, the identity of each image.

    Raises:
        ValueError: wrong shape or dtype, a negative label, fewer than two identities, no genuine pair.

    Example:
        >>> first, second, same = all_pairs([4, 4, 9])
        >>> first.tolist(), second.tolist(), same.tolist()
        ([0, 0, 1], [1, 2, 2], [True, False, False])

    """
    counter = _PairCounter(_checked_labels(labels))
    return counter.pairs(np.arange(counter.genuine), np.arange(counter.impostors))


def verification_pairs(labels: ArrayLike, seed: int = 0, *, max_genuine: int | None = None) -> Pairs:
    """All genuine pairs and an equal number of impostor pairs, drawn uniformly and without replacement.

    Where there are fewer impostor pairs than genuine ones, all of them are taken.

    Args:
        labels: (N,) integers >= 0, the identity of each image.
        seed: what the draw depends on.
        max_genuine: beyond so many genuine pairs, that many of them are drawn.

    Raises:
        ValueError: as :func:`all_pairs`.

    Example:
        >>> pairs = verification_pairs([0, 0, 0, 1, 1, 1])
        >>> pairs.same.tolist()
        [True, True, True, True, True, True, False, False, False, False, False, False]

    """
    return _drawn_pairs(_PairCounter(_checked_labels(labels)), max_genuine, None, seed)


def cosine_scores(embeddings: ArrayLike, pairs: Pairs) -> Floats:
    """Cosine of the two embeddings of each pair: (P,).

    Args:
        embeddings: (N, D) floating, any length.
        pairs: positions in ``embeddings``.

    Raises:
        ValueError: wrong shape or dtype, a row that is not finite, a position that is out of range.

    Example:
        >>> embeddings = np.array([[1.0, 0.0], [3.0, 4.0], [0.0, 2.0]])
        >>> cosine_scores(embeddings, all_pairs([4, 4, 9])).round(6).tolist()
        [0.6, 0.0, 0.8]

    """
    return _cosines(_unit(embeddings), pairs)


def _cosines(unit: Floats, pairs: Pairs) -> Floats:
    ends = np.concatenate([pairs.first, pairs.second])
    if ends.size and not (ends.min() >= 0 and ends.max() < len(unit)):
        raise ValueError(f"pairs must be positions in [0, {len(unit)}), got {ends.min()} to {ends.max()}")
    scores = np.empty(len(pairs.first))
    for rows in _chunks(len(scores), 2 * unit.shape[1]):
        scores[rows] = np.einsum("pd,pd->p", unit[pairs.first[rows]], unit[pairs.second[rows]])
    return scores


def _chunks(rows: int, columns: int) -> Iterator[slice]:
    step = max(1, _CHUNK_BYTES // (8 * max(1, columns)))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def verification_accuracy(scores: ArrayLike, same: ArrayLike, folds: int = 10, seed: int = 0) -> tuple[float, float]:
    """Accuracy of "same or not" with a threshold that was chosen on other pairs, as on LFW.

    The pairs are cut into disjoint folds with equal shares of genuine pairs. For each fold, the threshold is the one
    with the best accuracy on all the other folds (half-way between two neighbouring scores; of several equally good
    ones the highest), and the accuracy is counted on the fold itself.

    Source: Huang et al., "Labeled Faces in the Wild" (2007). There the folds also have different people; here only the
    pairs are disjoint.

    Args:
        scores: (P,) floating.
        same: (P,) bool, True for genuine pairs.
        folds: at least 2, at most the number of genuine and of impostor pairs.
        seed: how the pairs are dealt into folds.

    Returns:
        Mean and standard deviation (population, ``ddof=0``) of the accuracy over the folds.

    Raises:
        ValueError: wrong shape or dtype, scores that are not finite, pairs of one kind only, too many folds.

    Example:
        >>> verification_accuracy([0.9, 0.8, 0.7, 0.3, 0.2, 0.1], [True] * 3 + [False] * 3, folds=3)
        (1.0, 0.0)

    """
    scores, same = _checked_scores(scores, same)
    return _accuracy(_verdicts(scores, same, _checked_folds(folds, same), seed))


def _checked_folds(folds: int, same: Bools) -> int:
    most = int(min(same.sum(), (~same).sum()))
    if not 2 <= folds <= most:
        raise ValueError(
            f"folds must be at least 2 and at most {most}, the number of pairs of the rarer kind, got {folds}"
        )
    return folds


def _accuracy(verdicts: list[tuple[Ints, Bools]]) -> tuple[float, float]:
    accuracies = [np.mean(right) for _, right in verdicts]
    return float(np.mean(accuracies)), float(np.std(accuracies))


def _verdicts(scores: Floats, same: Bools, folds: int, seed: int) -> list[tuple[Ints, Bools]]:
    """The pairs of each fold, and which of them the threshold of the other folds judges rightly."""
    splitter = StratifiedKFold(folds, shuffle=True, random_state=seed)
    order = np.argsort(-scores, kind="stable")  # once for all folds
    ranked_scores, ranked_same, verdicts = scores[order], same[order], []
    for _, fold in splitter.split(scores, same):
        others = np.ones(len(scores), bool)
        others[fold] = False
        others = others[order]
        threshold = _best_ranked_threshold(ranked_scores[others], ranked_same[others])
        verdicts.append((fold, (scores[fold] >= threshold) == same[fold]))
    return verdicts


def _best_threshold(scores: Floats, same: Bools) -> float:
    order = np.argsort(-scores, kind="stable")
    return _best_ranked_threshold(scores[order], same[order])


def _best_ranked_threshold(scores: Floats, same: Bools) -> float:
    """The best threshold for pairs whose scores fall."""
    ends = np.flatnonzero(np.diff(scores, append=-np.inf))  # the last of equal scores
    accepted = np.concatenate([[0], np.cumsum(same)[ends]])  # genuine ones, by threshold
    let_in = np.concatenate([[0], ends + 1]) - accepted
    best = int(np.argmax(accepted - let_in))
    thresholds = np.concatenate([[np.inf], scores[ends]])
    return float((thresholds[best] + thresholds[min(best + 1, len(ends))]) / 2)


def roc(scores: ArrayLike, same: ArrayLike) -> RocCurve:
    """The receiver operating characteristic, by :func:`sklearn.metrics.roc_curve`; points on a line are left out.

    Args:
        scores: (P,) floating.
        same: (P,) bool, True for genuine pairs.

    Raises:
        ValueError: wrong shape or dtype, scores that are not finite, pairs of one kind only.

    Example:
        >>> roc([0.9, 0.6, 0.7, 0.1], [True, True, False, False]).auc
        0.75

    """
    scores, same = _checked_scores(scores, same)
    far, tar, thresholds = roc_curve(same, scores)
    return RocCurve(far, tar, thresholds, float(auc(far, tar)))


def tar_at_far(scores: ArrayLike, same: ArrayLike, far: float) -> float:
    """The largest TAR at a threshold whose FAR is at most ``far``; nothing is interpolated.

    A score is accepted if it is >= the threshold; impostors and genuine pairs with equal scores are accepted together.
    With I impostor pairs, ``far`` below 1 / I lets no impostor through. Use all pairs (:func:`all_pairs`).

    Args:
        scores: (P,) floating.
        same: (P,) bool, True for genuine pairs.
        far: in [0, 1].

    Raises:
        ValueError: ``far`` out of range, or as :func:`roc`.

    Example:
        >>> tar_at_far([0.9, 0.6, 0.7, 0.1], [True, True, False, False], far=0.1)
        0.5

    """
    scores, same = _checked_scores(scores, same)
    if not 0 <= far <= 1:
        raise ValueError(f"far must be in [0, 1], got {far}")
    rates, tar, _ = roc_curve(same, scores, drop_intermediate=False)
    return float(tar[rates <= far].max())


def rank1(embeddings: ArrayLike, labels: ArrayLike) -> float:
    """Closed-set identification: how often the nearest other image (by cosine) shows the same identity.

    Each image is looked up among all others (leave one out). Images that are alone in their identity are looked up
    against, but not counted. Of several equally near images the first decides.

    Args:
        embeddings: (N, D) floating, any length.
        labels: (N,) integers >= 0.

    Raises:
        ValueError: wrong shape or dtype, a row that is not finite, a negative label, fewer than two identities, no
            genuine pair.

    Example:
        >>> rank1(np.array([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.8, 0.2]]), [0, 0, 1, 1])
        0.75

    """
    labels = _checked_labels(labels)
    return _rank1(_unit(embeddings, len(labels)), labels)


def _rank1(unit: Floats, labels: Ints, probes: Ints | None = None) -> float:
    """Look some images (default: all that are not alone in their identity) up among all others."""
    probes = _probes(labels) if probes is None else probes
    hits = np.zeros(len(probes), dtype=bool)
    for rows in _chunks(len(probes), len(labels)):
        chosen = probes[rows]
        cosines = unit[chosen] @ unit.T
        cosines[np.arange(len(chosen)), chosen] = -np.inf
        hits[rows] = labels[cosines.argmax(axis=1)] == labels[chosen]
    return float(hits.mean())


def _probes(labels: Ints) -> Ints:
    """The images that are not alone in their identity."""
    return np.flatnonzero(np.bincount(labels)[labels] > 1)


def evaluate(
    embeddings: ArrayLike,
    labels: ArrayLike,
    seed: int = 0,
    *,
    folds: int = 10,
    max_impostors: int = 1_000_000,
    max_genuine: int = 1_000_000,
    max_probes: int = 20_000,
    resamples: int = 200,
) -> VerificationResult:
    """All figures at once: verification accuracy, AUC, TAR at FAR 1e-2 and 1e-3, rank-1, and how sure they are.

    The accuracy is over :func:`verification_pairs`, AUC and TAR over all pairs. Beyond the limits below, so many pairs
    or images are drawn instead, each as likely as any other, and the result tells how many of how many; so time and
    memory grow with the images, not with their pairs.

    Args:
        embeddings: (N, D) floating, any length, of identities that were not trained on.
        labels: (N,) integers >= 0.
        seed: for the pairs, the folds and the intervals.
        folds: of the verification accuracy; fewer where there are fewer pairs of a kind than folds (``result.folds``
            tells), and one genuine or impostor pair alone is not enough.
        max_impostors: beyond this many impostor pairs (about 1400 images), AUC and TAR are over that many of them.
        max_genuine: beyond this many genuine pairs, all figures are over that many of them.
        max_probes: beyond this many images, rank-1 looks up that many of them, among all.
        resamples: draws of identities behind the intervals (:mod:`protomem_kernels.data.intervals`), which are of at
            most 100,000 pairs of each kind.

    Raises:
        ValueError: wrong shape or dtype, a row that is not finite, a negative label, fewer than two identities, fewer
            than two genuine pairs, a limit below 1, ``max_genuine`` below 2.

    Example:
        >>> embeddings = np.array([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])
        >>> result = evaluate(embeddings, [0, 0, 1, 1])
        >>> result.verification_accuracy, round(result.verification_accuracy_low, 2)
        (1.0, 0.34)
        >>> result.cautions()[-1]
        '2 identities say little: accuracy 1.000 may be 0.342 to 1.000 (95 %)'

    """
    labels = _checked_labels(labels)
    unit = _unit(embeddings, len(labels))
    for name, limit, least in [
        ("max_impostors", max_impostors, 1),
        ("max_genuine", max_genuine, 2),
        ("max_probes", max_probes, 1),
        ("resamples", resamples, 1),
    ]:
        if limit < least:
            raise ValueError(f"{name} must be at least {least}, got {limit}")
    counter = _PairCounter(labels)
    balanced = _drawn_pairs(counter, max_genuine, None, seed)
    genuine = int(balanced.same.sum())
    folds = min(folds, genuine, len(balanced.same) - genuine)
    scores, same = _checked_scores(_cosines(unit, balanced), balanced.same)
    verdicts = _verdicts(scores, same, _checked_folds(folds, same), seed)
    accuracy, deviation = _accuracy(verdicts)
    right = np.empty(len(same), bool)
    for fold, judged in verdicts:
        right[fold] = judged
    part = _part(same, seed)
    accuracy_range = accuracy_interval(
        accuracy, right[part], _owners(balanced, part, labels), resamples=resamples, seed=seed
    )

    pairs = _drawn_pairs(counter, max_genuine, max_impostors, seed)
    scores = _cosines(unit, pairs)
    curve = roc(scores, pairs.same)
    far, tar, _ = roc_curve(pairs.same, scores, drop_intermediate=False)
    tars = {limit: float(tar[far <= limit].max()) for limit in (1e-2, 1e-3)}
    part = _part(pairs.same, seed)
    ranges = tar_intervals(tars, scores[part], _owners(pairs, part, labels), resamples=resamples, seed=seed)
    probes = _probes(labels)
    probes = probes[_draw(len(probes), min(len(probes), max_probes), [seed, 2])]
    return VerificationResult(
        verification_accuracy=accuracy,
        verification_accuracy_std=deviation,
        auc=curve.auc,
        tar_at_far_1e_2=tars[1e-2],
        tar_at_far_1e_3=tars[1e-3],
        rank1=_rank1(unit, labels, probes),
        folds=folds,
        genuine_pairs=genuine,
        impostor_pairs=len(scores) - genuine,
        genuine_pairs_in_all=counter.genuine,
        impostor_pairs_in_all=counter.impostors,
        rank1_probes=len(probes),
        identities=int(labels.max()) + 1,
        seed=seed,
        verification_accuracy_low=accuracy_range.low,
        verification_accuracy_high=accuracy_range.high,
        tar_at_far_1e_2_low=ranges[1e-2].low,
        tar_at_far_1e_2_high=ranges[1e-2].high,
        tar_at_far_1e_3_low=ranges[1e-3].low,
        tar_at_far_1e_3_high=ranges[1e-3].high,
        roc=curve,
    )


def _part(same: Bools, seed: int) -> Ints:
    """Positions of pairs, at most ``_INTERVAL_PAIRS`` of each kind."""
    kinds = (np.flatnonzero(same), np.flatnonzero(~same))
    return np.concatenate([kind[_draw(len(kind), min(len(kind), _INTERVAL_PAIRS), [seed, 3])] for kind in kinds])


def _owners(pairs: Pairs, part: Ints, labels: Ints) -> ScoredPairs:
    first, second = labels[pairs.first[part]], labels[pairs.second[part]]
    return ScoredPairs(first, second, pairs.same[part], int(labels.max()) + 1)


def hardest_pairs(embeddings: ArrayLike, labels: ArrayLike, count: int) -> HardestPairs:
    """The ``count`` impostor pairs with the highest cosines and the ``count`` genuine pairs with the lowest.

    Exact, over all pairs, in N x N work and without N x N memory. Equal cosines go by position; there may be fewer
    pairs than ``count``.

    Args:
        embeddings: (N, D) floating, any length.
        labels: (N,) integers >= 0.
        count: at least 1.

    Raises:
        ValueError: ``count`` below 1, or as :func:`rank1`.

    Example:
        >>> embeddings = np.array([[1.0, 0.0], [3.0, 4.0], [0.0, 2.0]])
        >>> hardest_pairs(embeddings, [4, 4, 9], count=1)
        HardestPairs(false_accepts=[(1, 2, 0.8)], false_rejects=[(0, 1, 0.6)])

    """
    labels = _checked_labels(labels)
    unit = _unit(embeddings, len(labels))
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    accepts = rejects = _NOTHING
    for rows in _chunks(len(labels), len(labels)):
        cosines = unit[rows] @ unit[rows.start :].T
        usable = np.triu(np.ones(cosines.shape, bool), 1) & (labels[rows, None] != labels[rows.start :])
        cosines[~usable] = -np.inf
        accepts = _lowest_of(-cosines, rows.start, rows.start, accepts, count)
    by_identity = np.argsort(labels, kind="stable")
    for images in np.split(by_identity, np.cumsum(np.bincount(labels))[:-1]):
        for rows in _chunks(len(images), len(images)):
            cosines = unit[images[rows]] @ unit[images[rows.start :]].T
            cosines[~np.triu(np.ones(cosines.shape, bool), 1)] = np.inf
            rejects = _lowest_of(cosines, images[rows], images[rows.start :], rejects, count)
    return HardestPairs(_as_tuples(-accepts[0], *accepts[1:]), _as_tuples(*rejects))


_NOTHING = np.empty(0), np.empty(0, np.int64), np.empty(0, np.int64)  # scores, first, second


def _lowest_of(
    scores: Floats, first: Ints | int, second: Ints | int, so_far: tuple[Floats, Ints, Ints], count: int
) -> tuple[Floats, Ints, Ints]:
    """The ``count`` lowest of those so far and of a matrix, whose infinite entries are none.

    Rows and columns are positions that begin at ``first`` and ``second``, or are listed there.
    """
    if len(so_far[0]) == count:
        bar = so_far[0][-1]
    else:
        bar = np.partition(scores, count - 1, axis=None)[count - 1] if scores.size > count else np.inf
    rows, columns = np.nonzero((scores <= bar) & (scores < np.inf))
    new = scores[rows, columns]
    rows = rows + first if isinstance(first, int) else first[rows]
    columns = columns + second if isinstance(second, int) else second[columns]
    return _lowest(
        np.concatenate([so_far[0], new]),
        np.concatenate([so_far[1], rows]),
        np.concatenate([so_far[2], columns]),
        count,
    )


def _lowest(scores: Floats, first: Ints, second: Ints, count: int) -> tuple[Floats, Ints, Ints]:
    """The ``count`` lowest scores in order, equal ones by position."""
    if len(scores) > count:
        keep = np.flatnonzero(scores <= np.partition(scores, count - 1)[count - 1])
        scores, first, second = scores[keep], first[keep], second[keep]
    order = np.lexsort((second, first, scores))[:count]
    return scores[order], first[order], second[order]


def _as_tuples(scores: Floats, first: Ints, second: Ints) -> list[tuple[int, int, float]]:
    return list(zip(first.tolist(), second.tolist(), scores.tolist(), strict=True))
