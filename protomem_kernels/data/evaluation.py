"""Verification and identification metrics on embeddings of identities that were never trained on.

Two images are compared by the cosine of their embeddings; a pair is accepted if the cosine reaches a threshold.
A *genuine* pair shows one identity, an *impostor* pair two. TAR (true accept rate) is the accepted part of the genuine
pairs, FAR (false accept rate) that of the impostor pairs.

Everything is on NumPy and scikit-learn (the ``train`` extra); tensors are taken on any device. Cosines are float64, and
a zero embedding has cosine 0 with everything.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from protomem_kernels.data.arrays import (
    ArrayLike,
    Bools,
    Floats,
    Ints,
    as_array,
    checked_labels,
    checked_rows,
    chunks,
    unit_rows,
)
from protomem_kernels.data.hardest import HardestPairs, hardest_listed_pairs, hardest_pairs
from protomem_kernels.data.intervals import Interval, ScoredPairs, accuracy_interval, tar_intervals, wilson
from protomem_kernels.data.pairs import PairCounter, Pairs, all_pairs, draw, drawn_pairs, verification_pairs
from protomem_kernels.data.scores import (
    RocCurve,
    checked_folds,
    checked_scores,
    cosine_scores,
    cosines_of,
    mean_accuracy,
    roc,
    tar_at_far,
    tars_at,
    verdicts_of,
    verification_accuracy,
)

__all__ = [
    "HardestPairs",
    "Pairs",
    "RocCurve",
    "VerificationResult",
    "all_pairs",
    "cosine_scores",
    "evaluate",
    "evaluate_pairs",
    "hardest_listed_pairs",
    "hardest_pairs",
    "rank1",
    "roc",
    "tar_at_far",
    "verification_accuracy",
    "verification_pairs",
]

FARS = (1e-2, 1e-3)
WIDE = 0.1  # an interval beyond this width says little
_INTERVAL_PAIRS = 100_000  # of each kind, of which intervals are estimated


@dataclass(frozen=True)
class VerificationResult:
    """What :func:`evaluate` and :func:`evaluate_pairs` measure. All are parts of 1.

    ``roc`` is left out of ``as_dict()`` and of comparisons. What a list of pairs cannot tell is None.
    """

    verification_accuracy: float
    verification_accuracy_std: float
    auc: float
    tar_at_far_1e_2: float
    tar_at_far_1e_3: float
    rank1: float | None
    folds: int  # of the verification accuracy
    genuine_pairs: int  # behind the ROC figures
    impostor_pairs: int
    genuine_pairs_in_all: int  # of which those were drawn, where they are fewer
    impostor_pairs_in_all: int
    rank1_probes: int  # images that were looked up
    identities: int | None
    seed: int  # of all that was drawn
    verification_accuracy_low: float  # 95 % confidence (data.intervals): over identities, else over pairs
    verification_accuracy_high: float
    tar_at_far_1e_2_low: float
    tar_at_far_1e_2_high: float
    tar_at_far_1e_3_low: float
    tar_at_far_1e_3_high: float
    roc: RocCurve = field(repr=False, compare=False)

    def as_dict(self) -> dict[str, float | None]:
        """The numbers by name, without the curve: ready for JSON, CSV or TensorBoard."""
        return {item.name: getattr(self, item.name) for item in fields(self) if item.name != "roc"}

    def cautions(self) -> list[str]:
        """What these figures cannot say, because the set is too small: a line each, none where it is large enough.

        A false accept rate below 1 in the number of impostor pairs is measured as none at all; an interval wider than
        a tenth does not tell a good encoder from a poor one.
        """
        lines = [
            f"{self.impostor_pairs_in_all} impostor pairs cannot show a FAR of {far}: TAR there lets no impostor in"
            for far in FARS
            if self.impostor_pairs_in_all * far < 1
        ]
        low, high = self.verification_accuracy_low, self.verification_accuracy_high
        if high - low > WIDE:
            pairs = f"{self.genuine_pairs + self.impostor_pairs} pairs"
            whole = pairs if self.identities is None else f"{self.identities} identities"
            lines.append(
                f"{whole} say little: accuracy {self.verification_accuracy:.3f} may be {low:.3f} to {high:.3f} (95 %)"
            )
        return lines


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
    labels = checked_labels(labels)
    unit = unit_rows(embeddings, len(labels))
    for name, limit, least in [
        ("max_impostors", max_impostors, 1),
        ("max_genuine", max_genuine, 2),
        ("max_probes", max_probes, 1),
        ("resamples", resamples, 1),
    ]:
        if limit < least:
            raise ValueError(f"{name} must be at least {least}, got {limit}")
    counter = PairCounter(labels)
    balanced = drawn_pairs(counter, max_genuine, None, seed)
    genuine = int(balanced.same.sum())
    folds = min(folds, genuine, len(balanced.same) - genuine)
    scores, same = checked_scores(cosines_of(unit, balanced, unit=True), balanced.same)
    verdicts = verdicts_of(scores, same, checked_folds(folds, same), seed)
    accuracy, _ = mean_accuracy(verdicts)
    part = _part(same, seed)
    accuracy_range = accuracy_interval(
        accuracy, _right(verdicts)[part], _owners(balanced, part, labels), resamples=resamples, seed=seed
    )

    pairs = drawn_pairs(counter, max_genuine, max_impostors, seed)
    scores = cosines_of(unit, pairs, unit=True)
    tars = tars_at(scores, pairs.same, FARS)
    part = _part(pairs.same, seed)
    ranges = tar_intervals(tars, scores[part], _owners(pairs, part, labels), resamples=resamples, seed=seed)
    curve = roc(scores, pairs.same)
    probes = _probes(labels)
    probes = probes[draw(len(probes), min(len(probes), max_probes), [seed, 2])]
    return _result(
        verdicts,
        accuracy_range,
        curve,
        tars,
        ranges,
        rank1=_rank1(unit, labels, probes),
        folds=folds,
        genuine_pairs=genuine,
        impostor_pairs=len(scores) - genuine,
        genuine_pairs_in_all=counter.genuine,
        impostor_pairs_in_all=counter.impostors,
        rank1_probes=len(probes),
        identities=int(labels.max()) + 1,
        seed=seed,
    )


def evaluate_pairs(
    embeddings: ArrayLike,
    pairs: Pairs,
    seed: int = 0,
    *,
    labels: ArrayLike | None = None,
    folds: int = 10,
    resamples: int = 200,
) -> VerificationResult:
    """The figures of a list of pairs, as LFW has one: accuracy, AUC, TAR at FAR 1e-2 and 1e-3, and how sure they are.

    Each pair counts once, in each figure. A fold is a stretch of the list, the same part of its genuine pairs and
    of its impostors, so that the folds of LFW's list are LFW's own. Rank-1 is None: a list of pairs is no gallery.

    Args:
        embeddings: (N, D) floating, any length.
        pairs: P pairs of positions in ``embeddings``.
        seed: of the intervals, where ``labels`` are given; nothing else is drawn.
        labels: (N,) integers, whose each image is. Then intervals are over the identities in the pairs
            (:mod:`protomem_kernels.data.intervals`). None: nobody knows; they are Wilson's, of pairs that are taken
            for independent, and of the threshold as it is; so they are too narrow where images come again and again.
        folds: of the verification accuracy; fewer where there are fewer pairs of a kind.
        resamples: draws of identities behind the intervals.

    Raises:
        ValueError: wrong shape or dtype, a row that is not finite, positions out of range, fewer than two pairs of a
            kind, ``resamples`` below 1.

    Example:
        >>> embeddings = np.array([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])
        >>> pairs = Pairs(np.array([0, 2, 0, 1]), np.array([1, 3, 2, 3]), np.array([True, True, False, False]))
        >>> result = evaluate_pairs(embeddings, pairs)
        >>> result.verification_accuracy, round(result.verification_accuracy_low, 2), result.rank1
        (1.0, 0.51, None)

    """
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}")
    rows = checked_rows(embeddings)
    scores, same = checked_scores(cosines_of(rows, pairs), pairs.same)
    genuine, impostors = int(same.sum()), int((~same).sum())
    folds = min(folds, genuine, impostors)
    verdicts = verdicts_of(scores, same, checked_folds(folds, same), None)
    accuracy, _ = mean_accuracy(verdicts)
    curve, tars = roc(scores, same), tars_at(scores, same, FARS)
    if labels is None:
        identities = None
        accuracy_range = wilson(accuracy, len(same))
        ranges = {far: wilson(tar, genuine) for far, tar in tars.items()}
    else:
        known = as_array(labels)
        if known.shape != (len(rows),):
            raise ValueError(f"labels must have shape ({len(rows)},) to match embeddings, got {known.shape}")
        owners = np.unique(known[np.stack([pairs.first, pairs.second])], return_inverse=True)[1].reshape(2, -1)
        identities = int(owners.max()) + 1
        part = _part(same, seed)
        of_part = ScoredPairs(owners[0][part], owners[1][part], same[part], identities)
        right = _right(verdicts)[part]
        accuracy_range = accuracy_interval(accuracy, right, of_part, resamples=resamples, seed=seed)
        ranges = tar_intervals(tars, scores[part], of_part, resamples=resamples, seed=seed)
    return _result(
        verdicts,
        accuracy_range,
        curve,
        tars,
        ranges,
        rank1=None,
        folds=folds,
        genuine_pairs=genuine,
        impostor_pairs=impostors,
        genuine_pairs_in_all=genuine,
        impostor_pairs_in_all=impostors,
        rank1_probes=0,
        identities=identities,
        seed=seed,
    )


def _result(
    verdicts: list[tuple[Ints, Bools]],
    accuracy_range: Interval,
    curve: RocCurve,
    tars: dict[float, float],
    ranges: dict[float, Interval],
    **counts: Any,
) -> VerificationResult:
    """Bring together what was measured, and ``counts``, what it was measured on."""
    accuracy, deviation = mean_accuracy(verdicts)
    return VerificationResult(
        verification_accuracy=accuracy,
        verification_accuracy_std=deviation,
        auc=curve.auc,
        tar_at_far_1e_2=tars[1e-2],
        tar_at_far_1e_3=tars[1e-3],
        verification_accuracy_low=accuracy_range.low,
        verification_accuracy_high=accuracy_range.high,
        tar_at_far_1e_2_low=ranges[1e-2].low,
        tar_at_far_1e_2_high=ranges[1e-2].high,
        tar_at_far_1e_3_low=ranges[1e-3].low,
        tar_at_far_1e_3_high=ranges[1e-3].high,
        roc=curve,
        **counts,
    )


def _right(verdicts: list[tuple[Ints, Bools]]) -> Bools:
    """Bring the verdicts of all folds into the order of the pairs."""
    right = np.empty(sum(len(fold) for fold, _ in verdicts), bool)
    for fold, judged in verdicts:
        right[fold] = judged
    return right


def _part(same: Bools, seed: int) -> Ints:
    """Positions of pairs, at most ``_INTERVAL_PAIRS`` of each kind."""
    kinds = (np.flatnonzero(same), np.flatnonzero(~same))
    return np.concatenate([kind[draw(len(kind), min(len(kind), _INTERVAL_PAIRS), [seed, 3])] for kind in kinds])


def _owners(pairs: Pairs, part: Ints, labels: Ints) -> ScoredPairs:
    first, second = labels[pairs.first[part]], labels[pairs.second[part]]
    return ScoredPairs(first, second, pairs.same[part], int(labels.max()) + 1)


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
    labels = checked_labels(labels)
    return _rank1(unit_rows(embeddings, len(labels)), labels)


def _rank1(unit: Floats, labels: Ints, probes: Ints | None = None) -> float:
    """Look some images (default: all that are not alone in their identity) up among all others."""
    probes = _probes(labels) if probes is None else probes
    hits = np.zeros(len(probes), dtype=bool)
    for rows in chunks(len(probes), len(labels)):
        chosen = probes[rows]
        cosines = unit[chosen] @ unit.T
        cosines[np.arange(len(chosen)), chosen] = -np.inf
        hits[rows] = labels[cosines.argmax(axis=1)] == labels[chosen]
    return float(hits.mean())


def _probes(labels: Ints) -> Ints:
    """The images that are not alone in their identity."""
    return np.flatnonzero(np.bincount(labels)[labels] > 1)
