"""The loss written the plain way, for comparison: all (B, M) logits at once, then PyTorch's own cross-entropy."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional


def arcface(c: Tensor, m: float = 0.5) -> Tensor:
    edge = torch.finfo(c.dtype).eps
    theta = c.clamp(-1 + edge, 1 - edge).acos()
    return torch.where(theta + m <= math.pi, (theta + m).cos(), c - m * math.sin(m))


def dense_logits(
    embeddings: Tensor,
    prototypes: Tensor,
    targets: Tensor,
    *,
    scale: float = 64.0,
    occupied: Tensor | None = None,
    normalize_prototypes: bool = False,
    m: float = 0.5,
) -> Tensor:
    """ArcFace logits (B, M): scaled cosines, -inf at empty slots, the margin at the target."""
    length = embeddings.norm(dim=1, keepdim=True)
    x = embeddings / torch.where(length > 0, length, 1)
    w = prototypes
    if normalize_prototypes:
        length = w.norm(dim=1, keepdim=True)
        w = w / torch.where(length > 0, length, 1)
    cosine = x @ w.T
    logits = scale * cosine
    if occupied is not None:
        logits = torch.where(occupied, logits, float("-inf"))
    is_target = torch.arange(prototypes.shape[0]) == targets[:, None]
    return torch.where(is_target, scale * arcface(cosine, m), logits)


def dense_loss(embeddings: Tensor, prototypes: Tensor, targets: Tensor, **kwargs: object) -> Tensor:
    """Per-sample ArcFace cross-entropy (B,), 0 where the target is negative."""
    if prototypes.shape[0] == 0 or embeddings.shape[0] == 0:
        return embeddings.sum(dim=1) * 0
    logits = dense_logits(embeddings, prototypes, targets, **kwargs)  # type: ignore[arg-type]
    kept = torch.where((targets >= 0)[:, None], logits, 0)
    return torch.where(targets >= 0, functional.cross_entropy(kept, targets.clamp(min=0), reduction="none"), 0)
