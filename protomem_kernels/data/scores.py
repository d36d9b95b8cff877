"""Pairs by their scores: accuracy with a threshold of other pairs, the ROC, the true accept rate at a false one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from sklearn.metrics import auc, roc_curve
from sklearn.model_selection import StratifiedKFold

from protomem_kernels.data.arrays import ArrayLike, Bools, Floats, Ints, as_array, checked_rows, chunks, scaled
from protomem_kernels.data.pairs import Pairs


class RocCurve(NamedTuple):
    """TAR over FAR, from accepting nothing to accepting everything; T thresholds, falling."""

    far: Floats  # (T,)
    tar: Floats  # (T,)
    thresholds: Floats  # (T,) accepted is a score >= threshold; the first is infinite
    auc: float  # area under the curve; 0.5 is chance


def cosine_scores(embeddings: ArrayLike, pairs: Pairs) -> Floats:
    """Cosine of the two embeddings of each pair: (P,).

    Args:
        embeddings: (N, D) floating, any length.
        pairs: positions in ``embeddings``.

    Raises:
        ValueError: wrong shape or dtype, a row that is not finite, a position that is out of range.

    Example:
        >>> embeddings = np.array([[1.0, 0.0], [3.0, 4.0], [0.0, 2.0]])
        >>> pairs = Pairs(np.array([0, 1]), np.array([1, 2]), np.array([True, False]))
        >>> cosine_scores(embeddings, pairs).round(6).tolist()
        [0.6, 0.8]

    """
    return cosines_of(checked_rows(embeddings), pairs)


def cosines_of(rows: npt.NDArray[np.floating[Any]], pairs: Pairs, *, unit: bool = False) -> Floats:
    """:func:`cosine_scores` of rows that are checked, and maybe of length 1; no copy of all of them is made."""
    ends = np.concatenate([pairs.first, pairs.second])
    if ends.size and not (ends.min() >= 0 and ends.max() < len(rows)):
        raise ValueError(f"pairs must be positions in [0, {len(rows)}), got {ends.min()} to {ends.max()}")
    scores = np.empty(len(pairs.first))
    for some in chunks(len(scores), 2 * rows.shape[1]):
        first, second = rows[pairs.first[some]], rows[pairs.second[some]]
        if not unit:
            first, second = scaled(first), scaled(second)
        scores[some] = np.einsum("pd,pd->p", first, second)
    return scores


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
    scores, same = checked_scores(scores, same)
    return mean_accuracy(verdicts_of(scores, same, checked_folds(folds, same), seed))


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
    scores, same = checked_scores(scores, same)
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
    scores, same = checked_scores(scores, same)
    if not 0 <= far <= 1:
        raise ValueError(f"far must be in [0, 1], got {far}")
    return tars_at(scores, same, [far])[far]


def tars_at(scores: Floats, same: Bools, fars: Iterable[float]) -> dict[float, float]:
    """Return :func:`tar_at_far` of checked scores for several false accept rates, by these."""
    rates, tar, _ = roc_curve(same, scores, drop_intermediate=False)
    return {far: float(tar[rates <= far].max()) for far in fars}


def checked_scores(scores: ArrayLike, same: ArrayLike) -> tuple[Floats, Bools]:
    """Check scores and answers, both (P,), with pairs of both kinds."""
    score_array, same_array = as_array(scores), as_array(same)
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


def checked_folds(folds: int, same: Bools) -> int:
    """Check that each fold can have pairs of both kinds."""
    most = int(min(same.sum(), (~same).sum()))
    if not 2 <= folds <= most:
        raise ValueError(
            f"folds must be at least 2 and at most {most}, the number of pairs of the rarer kind, got {folds}"
        )
    return folds


def mean_accuracy(verdicts: list[tuple[Ints, Bools]]) -> tuple[float, float]:
    """Return mean and standard deviation of the accuracy over the folds."""
    accuracies = [np.mean(right) for _, right in verdicts]
    return float(np.mean(accuracies)), float(np.std(accuracies))


def verdicts_of(scores: Floats, same: Bools, folds: int, seed: int | None) -> list[tuple[Ints, Bools]]:
    """The pairs of each fold, and which of them the threshold of the other folds judges rightly.

    Pairs are dealt into folds by the seed; None: neighbours stay together, each kind in its order.
    """
    splitter = StratifiedKFold(folds, shuffle=seed is not None, random_state=seed)
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
