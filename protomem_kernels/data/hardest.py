"""The pairs that an encoder judges worst, found among all without a matrix of all."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from protomem_kernels.data.arrays import ArrayLike, Floats, Ints, checked_labels, chunks, unit_rows
from protomem_kernels.data.pairs import Pairs
from protomem_kernels.data.scores import cosine_scores


class HardestPairs(NamedTuple):
    """The pairs most likely to be judged wrongly, the worst first, each as (i, j, cosine)."""

    false_accepts: list[tuple[int, int, float]]  # impostors with the highest cosines
    false_rejects: list[tuple[int, int, float]]  # genuine pairs with the lowest cosines


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
    labels = checked_labels(labels)
    unit = unit_rows(embeddings, len(labels))
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    accepts = rejects = _NOTHING
    for rows in chunks(len(labels), len(labels)):
        cosines = unit[rows] @ unit[rows.start :].T
        usable = np.triu(np.ones(cosines.shape, bool), 1) & (labels[rows, None] != labels[rows.start :])
        cosines[~usable] = -np.inf
        accepts = _lowest_of(-cosines, rows.start, rows.start, accepts, count)
    by_identity = np.argsort(labels, kind="stable")
    for images in np.split(by_identity, np.cumsum(np.bincount(labels))[:-1]):
        for rows in chunks(len(images), len(images)):
            cosines = unit[images[rows]] @ unit[images[rows.start :]].T
            cosines[~np.triu(np.ones(cosines.shape, bool), 1)] = np.inf
            rejects = _lowest_of(cosines, images[rows], images[rows.start :], rejects, count)
    return HardestPairs(_as_tuples(-accepts[0], *accepts[1:]), _as_tuples(*rejects))


def hardest_listed_pairs(embeddings: ArrayLike, pairs: Pairs, count: int) -> HardestPairs:
    """:func:`hardest_pairs` of a list of pairs instead of all, each as the list has it.

    Args:
        embeddings: (N, D) floating, any length.
        pairs: positions in ``embeddings``.
        count: at least 1.

    Raises:
        ValueError: ``count`` below 1, or as :func:`~protomem_kernels.data.scores.cosine_scores`.

    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    scores = cosine_scores(embeddings, pairs)
    accepts, rejects = (
        _lowest(sign * scores[kind], pairs.first[kind], pairs.second[kind], count)
        for sign, kind in ((-1, ~pairs.same), (1, pairs.same))
    )
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
