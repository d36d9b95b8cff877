"""Reference of ``reduce_losses``: the loss of target cosines and negatives, and its derivatives.

With u = n - s T(c) and w = 1, or 1 over how many samples count,

    L = w sum softplus(u),   dL/dn = w sigmoid(u),   dL/dc = -s T'(c) w sigmoid(u)      over the samples that count.

T(c) = c - m ("cosine"), or cos(theta + m) = c cos m - sin(theta) sin m while theta + m <= pi, else c - m sin m
("angle"), or cos(theta + m) throughout with T' := 1 ("unguarded angle"). sin(theta) has the derivative 0 once 1 - c^2
is mere rounding, as in ``margins.safe_sine``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from protomem_kernels.rows import sine_floor


def target_map(cosine: Tensor, kind: str, margin: float) -> tuple[Tensor, Tensor]:
    """Return T(c) and T'(c)."""
    if kind == "cosine":
        return cosine - margin, torch.ones_like(cosine)
    squared = 1 - cosine * cosine
    value = cosine * math.cos(margin) - squared.clamp(min=0).sqrt() * math.sin(margin)
    if kind == "unguarded angle":
        return value, torch.ones_like(cosine)
    floor = sine_floor(cosine.dtype)
    bent = torch.where(squared >= floor, cosine / squared.clamp(min=floor).sqrt(), 0)
    guarded = cosine >= -math.cos(margin)
    value = torch.where(guarded, value, cosine - margin * math.sin(margin))
    return value, torch.where(guarded, math.cos(margin) + math.sin(margin) * bent, 1)


def reduce_losses(
    cosine: Tensor, n: Tensor, targets: Tensor, capacity: int, kind: str, margin: float, scale: float, mean: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss (), dL/dc (B,) and dL/dn (B,)."""
    counts = (targets >= 0) & (targets < capacity)
    value, slope = target_map(cosine, kind, margin)
    excess = n - scale * value
    losses = torch.where(counts, torch.nn.functional.softplus(excess, threshold=50.0), 0)
    weight = torch.where(counts, torch.sigmoid(excess), 0)
    if mean:
        share = 1 / counts.sum().clamp(min=1).to(cosine.dtype)
        return losses.sum() * share, torch.where(counts, -scale * slope * weight * share, 0), weight * share
    return losses.sum(), torch.where(counts, -scale * slope * weight, 0), weight
