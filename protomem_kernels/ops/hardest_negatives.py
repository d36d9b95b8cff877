"""``hardest_negatives``: contract, checks, fake kernel and autograd."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from protomem_kernels._checks import (
    check_batch,
    check_int,
    check_occupied,
    check_prototypes,
    refuse_targets_past_the_end,
)
from protomem_kernels.backends.operators import CHOSEN
from protomem_kernels.ops.call import call
from protomem_kernels.ops.problems import problems
from protomem_kernels.ops.register import register
from protomem_kernels.rows import unit_embeddings
from protomem_kernels.types import HardestNegativesResult


def hardest_negatives(
    embeddings: Tensor,
    prototypes: Tensor,
    targets: Tensor | None = None,
    *,
    k: int,
    occupied: Tensor | None = None,
    normalize_prototypes: bool = False,
) -> HardestNegativesResult:
    """Find the exact k largest cosines of each embedding to the memory, without the (B, M) logits.

    Descending; ties go to the lower slot. The target and empty slots never appear; where there are fewer than k
    negatives the rest is (-inf, -1). With prototypes as the queries it yields the *doppelgangers* of each identity.
    ``cosines`` carry gradient to ``embeddings`` and ``prototypes``, touching only the rows that were chosen.

    Args:
        embeddings: (B, D) floating, raw; scaled to unit length inside. A non-finite row gets (nan, -1).
        prototypes: (M, D) floating, unit rows unless ``normalize_prototypes``.
        targets: (B,) int slots to leave out; negative or None: nothing is left out.
        k: how many, >= 1.
        occupied: (M,) bool or None (all).
        normalize_prototypes: scale the rows of ``prototypes`` to unit length first.

    Returns:
        ``HardestNegativesResult(cosines (B, k), slots (B, k) int64)``; cosines are float32 (float64 for float64
        embeddings).

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape or device, k < 1; on CPU tensors (elsewhere under ``PROTOMEM_DEBUG=1``) a target >= M.

    Example:
        >>> prototypes = torch.eye(3)
        >>> hardest_negatives(torch.tensor([[3.0, 4.0, 0.0]]), prototypes, torch.tensor([1]), k=2)
        HardestNegativesResult(cosines=tensor([[0.6000, 0.0000]]), slots=tensor([[0, 2]]))
    """
    if targets is None and isinstance(embeddings, Tensor) and embeddings.ndim > 0:
        targets = torch.full(embeddings.shape[:1], -1, dtype=torch.int64, device=embeddings.device)
    targets = check_batch(embeddings, targets, "targets")
    check_prototypes(prototypes, embeddings)
    check_occupied(occupied, prototypes)
    check_int("k", k, at_least=1)
    x, _ = unit_embeddings(embeddings)
    return HardestNegativesResult(*call("hardest_negatives", x, prototypes, targets, occupied, k, normalize_prototypes))


def _check_values(x: Tensor, prototypes: Tensor, targets: Tensor, *_: Any) -> None:
    refuse_targets_past_the_end(targets, prototypes.shape[0])


def _fake(x: Tensor, prototypes: Tensor, targets: Tensor, occupied: Tensor | None, k: int, _: bool) -> Any:
    return x.new_empty(x.shape[0], k), targets.new_empty(x.shape[0], k, dtype=torch.int64)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, prototypes, _, _, _, ctx.normalize_prototypes = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, prototypes, output[1])


def _backward(ctx: Any, grad_cosines: Tensor, _slots: Tensor) -> Any:
    x, prototypes, slots = ctx.saved_tensors
    grad_x, grad_prototypes = call(
        "hardest_negatives_backward",
        grad_cosines,
        x,
        prototypes,
        slots,
        ctx.normalize_prototypes,
        ctx.needs_input_grad[1],
    )
    return grad_x, grad_prototypes if ctx.needs_input_grad[1] else None, None, None, None, None


def _backward_fake(grad: Tensor, x: Tensor, prototypes: Tensor, slots: Tensor, _: bool, need_prototypes: bool) -> Any:
    return x.new_empty(x.shape), prototypes.new_empty(prototypes.shape if need_prototypes else (0, 0))


def _problems(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    for x, prototypes, targets, occupied, _ in problems(dtype):
        yield x, prototypes, targets, occupied, 7, False
        yield x, 3 * prototypes, targets, occupied, 3, True


def _backward_problems(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    for x, prototypes, targets, _, grad in problems(dtype):
        slots = torch.stack([targets, (targets + 3) % len(prototypes)], dim=1)
        yield torch.stack([grad, grad.flip(0)], dim=1), x, prototypes, slots, True, True


register(
    "hardest_negatives",
    problems=_problems,
    fake=_fake,
    check_values=_check_values,
    setup_context=_setup_context,
    backward=_backward,
)
register(
    "hardest_negatives_backward",
    works_through=CHOSEN,
    problems=_backward_problems,
    fake=_backward_fake,
)
