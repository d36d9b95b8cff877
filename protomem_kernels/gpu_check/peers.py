"""What operators are measured beside, and judged by at sizes that no CPU computes in time: PyTorch as one writes it.

ArcFace with m = 0.5 and s = 64; prototypes (M, D) are unit rows.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

MARGIN, SCALE, K = 0.5, 64.0, 16
MATRICES = 5  # of (B, M) float32 that the loss holds at its peak, gradients included


def cosines_and_margin(x: Tensor, w: Tensor, targets: Tensor) -> Tensor:
    """Return the cosines (B, M) with ArcFace's margin in the targets' places."""
    cosine = functional.normalize(x) @ w.T
    target = cosine.gather(1, targets[:, None])
    sine = (1 - target**2).clamp(min=1e-12).sqrt()
    shifted = target * math.cos(MARGIN) - sine * math.sin(MARGIN)
    inside = target > -math.cos(MARGIN)
    return cosine.scatter(1, targets[:, None], torch.where(inside, shifted, target - MARGIN * math.sin(MARGIN)))


def logits(x: Tensor, w: Tensor, targets: Tensor) -> Tensor:
    """Return ArcFace's logits (B, M)."""
    return SCALE * cosines_and_margin(x, w, targets)


def loss(x: Tensor, w: Tensor, targets: Tensor) -> Tensor:
    """Return ArcFace's mean loss."""
    return functional.cross_entropy(logits(x, w, targets), targets)


@functools.cache
def compiled() -> Callable[..., Tensor]:
    """Return ``loss`` through torch.compile."""
    return torch.compile(loss, dynamic=False)


def linear_cross_entropy(x: Tensor, w: Tensor, targets: Tensor) -> Tensor:
    """Return the mean loss by PyTorch's own linear + cross-entropy, which knows no margin: plain scaled softmax."""
    function: Any = getattr(functional, "linear_cross_entropy")  # noqa: B009  # not in every torch
    return function(SCALE * functional.normalize(x), w, targets)  # type: ignore[no-any-return]


def hardest(x: Tensor, w: Tensor, targets: Tensor) -> Tensor:
    """Return the cosines (B, K) of the hardest negatives."""
    cosine = functional.normalize(x) @ w.T
    return cosine.scatter(1, targets[:, None], float("-inf")).topk(K, dim=1).values


def aggregate(x: Tensor, labels: Tensor, identities: int) -> Tensor:
    """Return the prototypes (P, D) of labels in [0, P), every one of them present."""
    total = x.new_zeros(identities, x.shape[1]).index_add_(0, labels, functional.normalize(x))
    return functional.normalize(total)
