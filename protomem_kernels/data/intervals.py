"""How sure a verification rate is, given how many identities it was measured on.

Pairs are not independent: all pairs of one identity share its images. So identities are drawn again, with replacement
(the bootstrap over identities: a genuine pair counts as often as its identity is drawn, an impostor pair as often as
both), and the rate's variance v over these draws says how many independent trials it is worth: n = p (1 - p) / v, no
more than there are pairs. Where the draws do not vary, at p = 0 or 1, n is the number of identities. The interval is
Wilson's for n trials at 95 %, which is no point at 0 and 1 either.

Sources: Wilson, "Probable Inference, the Law of Succession, and Statistical Inference" (1927); Kish, "Survey Sampling"
(1965) for the effective number; Bolle et al., "Evaluating authentication systems using bootstrap confidence intervals"
(1999) for drawing identities instead of pairs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["Interval", "accuracy_interval", "tar_intervals", "wilson"]

Z = 1.959964  # of 95 %


class Interval(NamedTuple):
    """Where a rate lies with 95 % confidence."""

    low: float
    high: float


class ScoredPairs(NamedTuple):
    """P pairs, the genuine ones among them, and whose they are."""

    first: npt.NDArray[np.int64]  # (P,) identity of one image, in [0, identities)
    second: npt.NDArray[np.int64]  # (P,) of the other
    same: npt.NDArray[np.bool_]  # (P,)
    identities: int


def wilson(rate: float, trials: float) -> Interval:
    """Return Wilson's interval of a rate that was found in so many independent trials.

    Example:
        >>> [round(bound, 3) for bound in wilson(1.0, 10)]
        [0.722, 1.0]

    """
    if trials <= 0:
        return Interval(0.0, 1.0)
    spread = Z * math.sqrt(rate * (1 - rate) / trials + Z * Z / (4 * trials * trials))
    centre, scale = rate + Z * Z / (2 * trials), 1 + Z * Z / trials
    return Interval(max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale))


def accuracy_interval(
    accuracy: float, right: npt.NDArray[np.bool_], pairs: ScoredPairs, *, resamples: int, seed: int
) -> Interval:
    """Return the interval of the part of the pairs that is judged rightly, ``right`` (P,) telling which."""
    share = float(pairs.same.mean())
    drawn = []
    for genuine, impostors in _draws(pairs, resamples, seed):
        rates = [float(weights[right].sum() / weights.sum()) for weights in (genuine, impostors)]
        drawn.append(share * rates[0] + (1 - share) * rates[1])
    return _interval(accuracy, drawn, pairs.identities, len(right))


def tar_intervals(
    tars: dict[float, float], scores: npt.NDArray[np.float64], pairs: ScoredPairs, *, resamples: int, seed: int
) -> dict[float, Interval]:
    """Return the interval of each true accept rate, by the false accept rate that it was found at."""
    order = np.argsort(-scores, kind="stable")
    pairs = ScoredPairs(pairs.first[order], pairs.second[order], pairs.same[order], pairs.identities)
    ends = np.flatnonzero(np.diff(scores[order], append=-np.inf))  # the last of equal scores
    drawn: dict[float, list[float]] = {far: [] for far in tars}
    for genuine, impostors in _draws(pairs, resamples, seed):
        accepted, let_in = (np.cumsum(weights)[ends] for weights in (genuine, impostors))
        for far, found in drawn.items():
            place = int(np.searchsorted(let_in, far * let_in[-1], side="right"))
            found.append(float(accepted[place - 1] / accepted[-1]) if place else 0.0)
    genuine_pairs = int(pairs.same.sum())
    return {far: _interval(tars[far], found, pairs.identities, genuine_pairs) for far, found in drawn.items()}


def _draws(
    pairs: ScoredPairs, resamples: int, seed: int
) -> Iterator[tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]]:
    """Yield how often each pair counts as a genuine one, and as an impostor, in each draw that has both."""
    rng = np.random.default_rng([seed, 0x1D])
    for _ in range(resamples):
        times = rng.multinomial(pairs.identities, np.full(pairs.identities, 1 / pairs.identities)).astype(np.float64)
        first = times[pairs.first]
        genuine, impostors = first * pairs.same, first * times[pairs.second] * ~pairs.same
        if genuine.any() and impostors.any():
            yield genuine, impostors


def _interval(rate: float, drawn: list[float], identities: int, pairs: int) -> Interval:
    variance = float(np.var(drawn)) if drawn else 0.0
    trials = rate * (1 - rate) / variance if variance > 0 else 0.0
    return wilson(rate, min(trials, pairs) if trials > 0 else min(identities, pairs))
