"""The loss and its logits the plain way: all (B, M) cosines at once."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from tests.fuzz.oracles.margins import Bound, MarginOracle
from tests.fuzz.oracles.mining import MiningOracle, hardest, stays
from tests.fuzz.oracles.rows import directions, lengths


class Softmax(NamedTuple):
    """What a batch's softmax is: per sample unless said otherwise.

    ``gap``: how near, in cosine, the closest place is at which rounding decides (a guard, a threshold, a cut between
    negatives that count and others); ``steep``: 1 - c^2. ``negative`` (B, M): the slots in the sum.
    """

    cosine: Tensor
    n: Tensor
    target_logit: Tensor
    losses: Tensor
    logits: Tensor
    kept: Tensor
    gap: Tensor
    steep: Tensor
    negative: Tensor
    bound: Bound
    state: dict[str, float]


def log_sum_exp(values: Tensor, which: Tensor) -> Tensor:
    """Return log sum exp (B,) over the ``which`` (B, M); -inf, without a gradient, where there are none."""
    some = which.any(dim=1)
    if values.shape[1] == 0:
        return values.new_full((values.shape[0],), -math.inf)
    masked = torch.where(which, values, -math.inf)
    return torch.where(some, torch.where(some[:, None], masked, 0).logsumexp(dim=1), -math.inf)


def softplus(u: Tensor) -> Tensor:
    low = u == -math.inf
    v = torch.where(low, 0, u)
    positive = torch.maximum(v, torch.zeros_like(v))  # whose slope at 0 is 1 / 2, where clamp has 1
    return torch.where(low, 0, positive + (-v.abs()).exp().log1p())


def softmax(
    embeddings: Tensor,
    prototypes: Tensor,
    targets: Tensor,
    present: Tensor,
    *,
    margin: MarginOracle,
    mining: MiningOracle,
    scale: float,
    normalize: bool,
    before: dict[str, Any],
    training: bool,
    ignored_are_zero: bool = True,
) -> Softmax:
    """``present`` (M,) bool; ``before``: statistics of margin and rule; logits have norms of ignored samples too."""
    slots = prototypes.shape[0]
    counts = (targets >= 0) & (targets < slots)
    e = torch.where(counts[:, None], embeddings, 0) if ignored_are_zero else embeddings
    x, norm = directions(e), lengths(e)
    w = directions(prototypes) if normalize else prototypes
    bound = margin.bind(norm, before, training)
    is_target = torch.arange(slots) == torch.where(counts, targets, -1)[:, None]
    cosines = x @ w.T
    c = torch.where(is_target, cosines, 0).sum(dim=1)
    reshaped = mining.reshape(cosines, c, counts, bound, before, training)
    allowed = present & ~is_target
    negative = allowed if mining.k is None else hardest(cosines, allowed, mining.k)
    n = log_sum_exp(scale * reshaped.h, negative)
    z = scale * bound.guarded(c)
    pull = None if margin.d is None else softplus(scale * (margin.d - c))
    losses = softplus(n - z) if pull is None else pull + softplus(n)
    if bound.penalty is not None:
        losses = losses + bound.penalty
    kept = counts if mining.keep is None else stays(losses.detach(), counts, mining.keep)
    logits = torch.where(is_target, z[:, None], torch.where(negative, scale * reshaped.h, -math.inf))

    with torch.no_grad():
        gap = bound.edges(c).amin(dim=1)
        if slots:
            if reshaped.tau is not None:
                off = torch.where(allowed, (cosines - reshaped.tau[:, None]).abs(), 1)
                gap = torch.minimum(gap, off.amin(dim=1))
            if mining.k is not None and mining.k < slots:
                ranked = torch.where(allowed, cosines, -math.inf).sort(dim=1, descending=True).values
                cut = ranked[:, mining.k - 1] - ranked[:, mining.k]
                gap = torch.minimum(gap, torch.where(cut.isfinite(), cut, 1))
        if mining.keep is not None and bool((counts & ~kept).any()):
            lowest = torch.where(kept, losses, math.inf).min()
            highest = torch.where(counts & ~kept, losses, -math.inf).max()
            gap = torch.minimum(gap, (lowest - highest) / scale)
    state = {**bound.state, **reshaped.state}
    return Softmax(c, n, z, losses, logits, kept, gap, 1 - c.detach() ** 2, negative, bound, state)


def reduced(losses: Tensor, kept: Tensor, reduction: str) -> Tensor:
    losses = torch.where(kept, losses, 0)
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / max(1, int(kept.sum()))


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(logits, targets.long(), reduction="none")
