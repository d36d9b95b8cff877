"""Prototype Memory's Triton kernels: margin softmax over a memory of prototypes without its (batch x memory) logits.

``arcface_loss`` is differentiable. The others are single operators, without autograd or checks of their arguments; the
package protomem_kernels has both, modules, and backends for CPUs.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .backends.triton.aggregate_prototypes import aggregate_prototypes, aggregate_prototypes_backward
from .backends.triton.enqueue import enqueue_
from .backends.triton.hardest_negatives import hardest_negatives, hardest_negatives_backward
from .backends.triton.margin_softmax_logits import margin_softmax_logits, margin_softmax_logits_backward
from .backends.triton.negative_logsumexp import negative_logsumexp, negative_logsumexp_backward_
from .rows import sine_floor

__all__ = [
    "aggregate_prototypes",
    "aggregate_prototypes_backward",
    "arcface_loss",
    "enqueue_",
    "hardest_negatives",
    "hardest_negatives_backward",
    "margin_softmax_logits",
    "margin_softmax_logits_backward",
    "negative_logsumexp",
    "negative_logsumexp_backward_",
]


def arcface_loss(
    embeddings: Tensor, prototypes: Tensor, targets: Tensor, *, scale: float = 64.0, margin: float = 0.5
) -> Tensor:
    """Return the mean cross-entropy of softmax with an additive angular margin (Deng et al. 2019).

    Args:
        embeddings: (B, D) float32, raw; scaled to unit length inside.
        prototypes: (M, D) float32, bfloat16 or float16, unit rows; differentiated if they require it.
        targets: (B,) int64, each sample's slot, within [0, M).
        scale: s > 0, at most 64.
        margin: m >= 0, in radians.
    """
    if not 0 < scale <= 64:
        raise ValueError(f"scale must be above 0 and at most 64, got {scale}")
    x = torch.nn.functional.normalize(embeddings.float())
    cosine, n = _NegativeLogsumexp.apply(x, prototypes, targets, scale)
    sine = (1 - cosine.square()).clamp(min=sine_floor(cosine.dtype)).sqrt()
    with_margin = cosine * math.cos(margin) - sine * math.sin(margin)
    beyond = cosine - margin * math.sin(margin)  # where angle + margin would pass pi
    logit = scale * torch.where(cosine > -math.cos(margin), with_margin, beyond)
    return torch.nn.functional.softplus(n - logit).mean()


class _NegativeLogsumexp(torch.autograd.Function):
    """Each sample's target cosine, and the log-sum-exp of its scaled cosines to every other prototype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, prototypes: Tensor, targets: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Sum over the prototypes; keep what the gradient of ``x`` needs."""
        wanted = ctx.needs_input_grad[0]
        options = (None, None, None, None, scale, 0.0, False)  # all slots, no reshaping, exponents as they are
        cosine, n, rows, moment, _ = negative_logsumexp(x, prototypes, targets, *options, wanted, 0)
        ctx.scale, ctx.differentiates_prototypes = scale, ctx.needs_input_grad[1]
        ctx.save_for_backward(rows, moment, *((x, prototypes, targets, n) if ctx.differentiates_prototypes else ()))
        return cosine, n

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_cosine: Tensor, grad_n: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        """Scale what forward kept; form the probabilities again for the prototypes' gradient."""
        rows, moment, *others = ctx.saved_tensors
        grad_x = grad_prototypes = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_cosine[:, None] * rows + grad_n[:, None] * moment
        if ctx.differentiates_prototypes:
            x, prototypes, targets, n = others
            grad_prototypes = torch.empty_like(prototypes, memory_format=torch.contiguous_format)
            inside = (x, prototypes, targets, None, None, None, None, n, ctx.scale, 0.0, False, 0)
            negative_logsumexp_backward_(grad_prototypes, grad_cosine, grad_n, *inside)
        return grad_x, grad_prototypes, None, None
