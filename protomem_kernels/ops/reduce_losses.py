"""``reduce_losses``: margin, loss and their gradients in one launch. Contract, checks, fake kernel and autograd."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from protomem_kernels.backends.operators import BATCH
from protomem_kernels.ops.call import call
from protomem_kernels.ops.problems import SCALE, problems
from protomem_kernels.ops.register import register


def reduce_losses(
    cosine: Tensor, n: Tensor, targets: Tensor, capacity: int, kind: str, margin: float, scale: float, mean: bool
) -> Tensor:
    """Return the sum or mean of ``softplus(n - scale T(cosine))`` over the samples that have a target.

    Where every operation is a launch, this takes the place of some sixty of plain PyTorch's, forward and backward: the
    gradients are formed beside the loss.

    Args:
        cosine: (B,) float32 or float64, to the target.
        n: (B,) likewise, the log-sum-exp of the negatives; -inf where there are none.
        targets: (B,) int64; outside [0, capacity): the sample does not count.
        capacity: M.
        kind: T, as ``Margin.kernel_form`` says it: "angle", "unguarded angle" or "cosine".
        margin: of T, radians or a difference of cosines.
        scale: s > 0.
        mean: divide by how many count, at least 1.

    Returns:
        () like ``cosine``, differentiable in ``cosine`` and ``n``, once.
    """
    loss: Tensor
    loss, *_ = call("reduce_losses", cosine, n, targets, capacity, kind, margin, scale, mean)
    return loss


def _fake(cosine: Tensor, n: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return cosine.new_empty(()), cosine.new_empty(cosine.shape), n.new_empty(n.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, slope_cosine, slope_n = output
    ctx.mark_non_differentiable(slope_cosine, slope_n)
    ctx.set_materialize_grads(False)  # no zeros for what has no gradient
    ctx.save_for_backward(slope_cosine, slope_n, *inputs[:2])


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> Any:
    if grad is None:
        return (None,) * 8
    slope_cosine, slope_n, *_ = ctx.saved_tensors
    return grad * slope_cosine, grad * slope_n, *[None] * 6


def _problems(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    for x, prototypes, targets, _, grad in problems(dtype):
        cosine = torch.cos(3 * torch.arange(len(x), dtype=x.dtype))  # 1 first: an image that is its own prototype
        n = 2 * grad
        n[2:3] = float("-inf")
        yield cosine, n, targets, len(prototypes), "angle", 0.5, SCALE, True
        yield cosine, n, targets, len(prototypes), "unguarded angle", 0.5, SCALE, False
        yield cosine, n, targets, len(prototypes), "cosine", 0.4, SCALE, True


register(
    "reduce_losses",
    works_through=BATCH,
    problems=_problems,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
