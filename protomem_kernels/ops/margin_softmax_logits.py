"""``margin_softmax_logits``: the (B, M) logits for whoever wants them. Contract, checks, fake kernel and autograd."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from protomem_kernels._checks import refuse_targets_past_the_end
from protomem_kernels.ops.call import call
from protomem_kernels.ops.problems import SCALE, hard_form, problems
from protomem_kernels.ops.register import register
from protomem_kernels.types import HardNegativeForm


def margin_softmax_logits(
    x: Tensor,
    prototypes: Tensor,
    targets: Tensor,
    target_logits: Tensor,
    *,
    scale: float,
    occupied: Tensor | None = None,
    form: HardNegativeForm | None = None,
    normalize_prototypes: bool = False,
) -> Tensor:
    """Return the scaled logits (B, M): ``target_logits`` at the targets, ``scale h_ij`` elsewhere.

    ``h_ij`` is the cosine or its hard-negative form; an empty slot has -inf. ``protomem_kernels.margin_softmax_logits``
    adds margin and mining.

    Args:
        x: (B, D) float32 or float64, unit or zero rows.
        prototypes: (M, D) floating, unit rows unless ``normalize_prototypes``.
        targets: (B,) int; outside [0, M): the row has no target.
        target_logits: (B,) like ``x``.
        scale: s > 0.
        occupied: (M,) bool, default all.
        form: how hard negatives are reshaped; carries no gradient.
        normalize_prototypes: scale the rows of ``prototypes`` to unit length first.

    Returns:
        (B, M) in the dtype of ``x``, differentiable in ``x``, ``prototypes`` and ``target_logits``.

    Raises:
        ValueError: on CPU tensors, a target >= M.
    """
    logits: Tensor = call(
        "margin_softmax_logits",
        x,
        prototypes,
        targets,
        target_logits,
        occupied,
        None if form is None else form.threshold,
        None if form is None else form.coefficients,
        float(scale),
        normalize_prototypes,
    )
    return logits


def _check_values(x: Tensor, prototypes: Tensor, targets: Tensor, *_: Any) -> None:
    refuse_targets_past_the_end(targets, prototypes.shape[0])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, prototypes, targets, _, occupied, threshold, coefficients, ctx.scale, ctx.normalize_prototypes = inputs
    ctx.save_for_backward(x, prototypes, targets, occupied, threshold, coefficients)


def _backward(ctx: Any, grad: Tensor) -> Any:
    need_prototypes = ctx.needs_input_grad[1]
    grad_x, grad_prototypes, grad_target = call(
        "margin_softmax_logits_backward", grad, *ctx.saved_tensors, ctx.scale, ctx.normalize_prototypes, need_prototypes
    )
    return grad_x, grad_prototypes if need_prototypes else None, None, grad_target, *[None] * 5


def _backward_fake(grad: Tensor, x: Tensor, prototypes: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    need_prototypes = rest[-1]
    grad_prototypes = prototypes.new_empty(prototypes.shape) if need_prototypes else x.new_empty(0, 0)
    return x.new_empty(x.shape), grad_prototypes, x.new_empty(x.shape[0])


def _problems(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    for problem in problems(dtype):
        x, prototypes, targets, occupied, target_logits = problem
        yield x, prototypes, targets, target_logits, occupied, *hard_form(problem), SCALE, False
        yield x, 3 * prototypes, targets, target_logits, None, None, None, SCALE, True


def _backward_problems(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    for x, prototypes, targets, _, *rest in _problems(dtype):
        yield (x @ prototypes.to(x.dtype).T).flip(0), x, prototypes, targets, *rest, True


register(
    "margin_softmax_logits",
    problems=_problems,
    fake=lambda x, prototypes, *_: x.new_empty(x.shape[0], prototypes.shape[0]),
    check_values=_check_values,
    setup_context=_setup_context,
    backward=_backward,
)
register(
    "margin_softmax_logits_backward",
    problems=_backward_problems,
    fake=_backward_fake,
)
