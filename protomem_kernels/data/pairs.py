"""Pairs of labelled images: all of them, or some, each as likely as any other, without listing the rest."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from protomem_kernels.data.arrays import ArrayLike, Bools, Ints, checked_labels


class Pairs(NamedTuple):
    """P pairs of images.

    Those that are made from labels are ``first < second``, no pair twice: the genuine ones, then the impostors.
    """

    first: Ints  # (P,) position of one image
    second: Ints  # (P,) position of the other
    same: Bools  # (P,) whether both show the same identity


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
    counter = PairCounter(checked_labels(labels))
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
    return drawn_pairs(PairCounter(checked_labels(labels)), max_genuine, None, seed)


class PairCounter:
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
        """Return the pairs of these numbers."""
        ends = []
        for numbers, (start, total) in ((genuine, self._genuine), (impostors, self._impostor)):
            one = np.searchsorted(total, numbers, side="right")
            before = np.concatenate([[0], total])[one]
            ends.append(np.sort(self.order[np.stack([one, start[one] + numbers - before])], axis=0))
        first, second = np.concatenate(ends, axis=1)
        return Pairs(first, second, np.arange(len(first)) < len(genuine))


def drawn_pairs(counter: PairCounter, genuine: int | None, impostors: int | None, seed: int) -> Pairs:
    """So many of the genuine pairs (None: all) and of the impostors (None: as many as those), uniformly drawn."""
    kept = counter.genuine if genuine is None else min(counter.genuine, genuine)
    wanted = min(counter.impostors, kept if impostors is None else impostors)
    return counter.pairs(draw(counter.genuine, kept, [seed, 1]), draw(counter.impostors, wanted, seed))


def draw(total: int, count: int, seed: int | list[int]) -> Ints:
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
