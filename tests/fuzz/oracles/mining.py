"""Mining rules on dense cosines (B, M): what hard negatives become, which count, whose losses stay."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests.fuzz.oracles.margins import Bound


@dataclass
class Reshaped:
    """Reshaped cosines (B, M), the thresholds (B,) or None, and statistics after the batch."""

    h: Tensor
    tau: Tensor | None = None
    state: dict[str, float] = field(default_factory=dict)


# (cosines (B, M), target cosines (B,), counts (B,), the margin, statistics before, training) -> Reshaped
Reshape = Callable[[Tensor, Tensor, Tensor, Bound, dict[str, Any], bool], Reshaped]


def as_they_are(cosines: Tensor, *_: Any) -> Reshaped:
    return Reshaped(cosines)


def misclassified(t: float, kind: str) -> Reshape:
    def reshape(cosines: Tensor, c: Tensor, counts: Tensor, margin: Bound, *_: Any) -> Reshaped:
        tau = margin.guarded(c.detach()).detach()
        hard = (t + 1) * cosines + t if kind == "adaptive" else cosines + t
        return Reshaped(torch.where(cosines > tau[:, None], hard, cosines), tau)

    return reshape


def curricular(momentum: float) -> Reshape:
    def reshape(
        cosines: Tensor, c: Tensor, counts: Tensor, margin: Bound, before: dict[str, Any], training: bool
    ) -> Reshaped:
        t = before["t"]
        usable = counts & c.isfinite()
        if training and bool(usable.any()):
            t = momentum * float(c.detach()[usable].mean()) + (1 - momentum) * t
        tau = margin.unguarded(c.detach()).detach()
        return Reshaped(torch.where(cosines > tau[:, None], cosines * (t + cosines), cosines), tau, {"t": t})

    return reshape


def filtered(threshold: float) -> Reshape:
    def reshape(cosines: Tensor, c: Tensor, *_: Any) -> Reshaped:
        return Reshaped(torch.where(cosines > threshold, 0.0, cosines), torch.full_like(c.detach(), threshold))

    return reshape


@dataclass
class MiningOracle:
    """A rule: how it reshapes; ``k`` if only that many negatives count; ``keep`` if only that share of losses stays."""

    reshape: Reshape = as_they_are
    k: int | None = None
    keep: float | None = None


def hardest(cosines: Tensor, negative: Tensor, k: int) -> Tensor:
    """Return which of the negatives (B, M) are the k of the largest cosines, ties to the lower slot."""
    values = torch.where(negative, cosines.detach(), -math.inf)
    order = values.argsort(dim=1, descending=True, stable=True)[:, :k]
    return torch.zeros_like(negative).scatter(1, order, True) & negative


def stays(losses: Tensor, counts: Tensor, keep: float) -> Tensor:
    """Return the hardest share (B,) of the samples that count, rounded up; ties to the earlier."""
    number = int(counts.sum())
    wanted = max(1, math.ceil(round(keep * number, 6)))
    mine = sorted((i for i in range(len(losses)) if counts[i]), key=lambda i: (-float(losses[i]), i))[:wanted]
    return torch.zeros_like(counts).scatter(0, torch.tensor(mine, dtype=torch.int64), True)
