"""``negative_logsumexp``: the one heavy operator behind every loss. Contract, checks, fake kernel and autograd."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from protomem_kernels._checks import refuse_targets_past_the_end
from protomem_kernels._torch import graph_is_kept
from protomem_kernels.backends.choice import BACKENDS
from protomem_kernels.ops.call import call, is_watched
from protomem_kernels.ops.problems import SCALE, hard_form, problems
from protomem_kernels.ops.register import register
from protomem_kernels.types import HardNegativeForm

# Exponents that float32 / float64 can hold, with a margin below overflow and above the smallest normal number.
EXPONENTS = {torch.float32: (-87.0, 88.0), torch.float64: (-708.0, 709.0)}


def exponent_offset(scale: float, slots: int, form: HardNegativeForm | None, dtype: torch.dtype) -> float | None:
    """Return the constant to subtract from every exponent s h, or None if no constant keeps all of them in range.

    A sum of ``slots`` terms exp(s h - offset), each times h' at most, must not overflow, and its smallest term must not
    underflow. From the scale, the shape and the form alone: no data is read. 0 wherever the plain sum is safe.
    """
    lowest, highest, steepest = (-1.0, 1.0, 1.0) if form is None else form[2:]
    bottom, top = EXPONENTS[dtype]
    largest = scale * highest + math.log(max(slots, 1)) + math.log(max(steepest, 1.0))
    offset = max(0.0, largest - top)
    return offset if scale * lowest - offset > bottom else None


def rows_to_keep(x: Tensor, prototypes: Tensor, offset: float | None) -> int:
    """Return for how many samples forward may keep its exponentials, to spare backward their product.

    They are kept where the prototypes' gradient will be written, so they take no memory of their own: D per slot fit.
    On the CPU, where a product costs more than writing and reading as many numbers; not where a compiler or a mode
    watches, for whom backward would overwrite an output of forward.
    """
    wanted = torch.is_grad_enabled() and prototypes.requires_grad
    if offset is None or not wanted or not x.is_cpu or x.dtype != prototypes.dtype or is_watched((x, prototypes)):
        return 0
    return min(x.shape)


def negative_logsumexp(
    x: Tensor,
    prototypes: Tensor,
    targets: Tensor,
    *,
    scale: float,
    occupied: Tensor | None = None,
    negatives: Tensor | None = None,
    form: HardNegativeForm | None = None,
    normalize_prototypes: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return each sample's target cosine c (B,) and the log-sum-exp n (B,) of its negatives' scaled cosines.

    ``n_i = log sum_j exp(scale h_ij)`` over the occupied slots j other than the target (only ``negatives``, if given),
    with ``h_ij`` the cosine or its hard-negative form; -inf where there are none. The gradient of ``x`` is accumulated
    in the forward pass, so the backward pass reads no prototype unless ``prototypes`` needs a gradient itself; the
    memory of that one is then allocated in the forward pass already (``rows_to_keep``).

    Args:
        x: (B, D) float32 or float64, unit or zero rows.
        prototypes: (M, D) floating, unit rows unless ``normalize_prototypes``.
        targets: (B,) int; outside [0, M): no target (c = 0, nothing excluded).
        scale: s > 0.
        occupied: (M,) bool; empty slots are no negatives. The target counts as present whatever it says.
        negatives: (B, k) int64, the slots to sum over instead of all; -1 is none.
        form: how hard negatives are reshaped; carries no gradient.
        normalize_prototypes: scale the rows of ``prototypes`` to unit length first.

    Returns:
        ``(c, n)``, both (B,) in the dtype of ``x`` and differentiable in ``x`` and ``prototypes``.

    Raises:
        ValueError: on CPU tensors, a target >= M.
    """
    offset = exponent_offset(scale, prototypes.shape[0], form, x.dtype)
    with_gradient = torch.is_grad_enabled() and x.requires_grad
    cosine, n, *_ = call(
        "negative_logsumexp",
        x,
        prototypes,
        targets,
        occupied,
        negatives,
        None if form is None else form.threshold,
        None if form is None else form.coefficients,
        float(scale),
        offset,
        normalize_prototypes,
        with_gradient,
        rows_to_keep(x, prototypes, offset) if negatives is None else 0,
    )
    return cosine, n


def _check_values(x: Tensor, prototypes: Tensor, targets: Tensor, *_: Any) -> None:
    refuse_targets_past_the_end(targets, prototypes.shape[0])


def _fake(x: Tensor, prototypes: Tensor, targets: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    *_, with_gradient, kept_rows = rest
    o = torch.empty_like(x, memory_format=torch.contiguous_format) if with_gradient else x.new_empty(0, 0)
    kept = prototypes.new_empty(prototypes.shape if kept_rows else (0, 0))
    return x.new_empty(x.shape[0]), x.new_empty(x.shape[0]), x.new_empty(x.shape), o, kept


class _Kept(NamedTuple):
    """What forward kept of the first ``rows`` samples, ``e^{s h - offset} h'`` (M, D), and the prototypes it is of.

    None of it is among autograd's saved tensors, which must stay as they are: backward writes the gradient over the
    exponentials, and where all samples were kept, prototypes that were written over since then are no error.
    """

    exponentials: Tensor
    rows: int
    prototypes: Tensor
    version: int

    def outlived_them(self) -> bool:
        """Say whether the prototypes were written over since forward."""
        return self.prototypes._version != self.version


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, *inside, scale, offset, normalize_prototypes, _, kept_rows = inputs
    _, n, target_rows, o, kept = output
    ctx.mark_non_differentiable(target_rows, o, kept)
    ctx.set_materialize_grads(False)  # no zeros as large as what was kept
    # Without a gradient of their own, the prototypes may be overwritten before backward: they are not kept.
    ctx.keeps_prototypes = ctx.needs_input_grad[1]
    ctx.kept, ctx.unsaved = None, ()
    if ctx.keeps_prototypes and kept.numel():
        prototypes = inside[0]
        ctx.kept = _Kept(kept, kept_rows, prototypes.detach(), prototypes._version)
        if kept_rows == x.shape[0] and not normalize_prototypes:
            inside[0], ctx.unsaved = None, (prototypes,)
    ctx.save_for_backward(target_rows, o, x, *((*inside, n) if ctx.keeps_prototypes else ()))
    ctx.scale, ctx.offset, ctx.normalize_prototypes = scale, offset, normalize_prototypes


def _backward(ctx: Any, grad_cosine: Tensor | None, grad_n: Tensor | None, *_: Any) -> Any:
    target_rows, o, x, *inside = ctx.saved_tensors
    grad_cosine = target_rows.new_zeros(len(target_rows)) if grad_cosine is None else grad_cosine
    grad_n = target_rows.new_zeros(len(target_rows)) if grad_n is None else grad_n
    grad_x = grad_prototypes = None
    if ctx.needs_input_grad[0]:
        grad_x = grad_cosine[:, None] * target_rows + grad_n[:, None] * o
    if ctx.keeps_prototypes:
        grad_prototypes = _prototypes_gradient(ctx, grad_cosine, grad_n, x, *inside)
    return grad_x, grad_prototypes, *[None] * 10


def _problems(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    for problem in problems(dtype):
        x, prototypes, targets, occupied, _ = problem
        chosen = (targets[:, None] + torch.tensor([2, 5, 7])) % len(prototypes)
        yield x, prototypes, targets, occupied, None, None, None, SCALE, 0.0, False, True, 0
        yield x, 3 * prototypes, targets, None, None, *hard_form(problem), SCALE, 1.0, True, True, 0
        yield x, prototypes, targets, occupied, None, None, None, SCALE, None, False, False, 0
        yield x, prototypes, targets, occupied, chosen, None, None, SCALE, 0.0, False, True, 0


def _backward_problems(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    forward = BACKENDS["reference"].kernels["negative_logsumexp"]
    for args in _problems(dtype):
        x, prototypes, *inside, scale, offset, normalize, _, _ = args
        _, n, *_ = forward(*args)
        grad = torch.cos(torch.arange(len(x), dtype=x.dtype))
        yield torch.zeros_like(prototypes), grad.flip(0), grad, x, prototypes, *inside, n, scale, offset, normalize, 0


def _prototypes_gradient(
    ctx: Any, grad_cosine: Tensor, grad_n: Tensor, x: Tensor, prototypes: Tensor | None, *others: Tensor
) -> Tensor:
    """Return dL/dw (M, D): where it can be, written over what forward kept."""
    *inside, n = others
    kept: _Kept | None = ctx.kept
    # A broken embedding passes nothing on: the prototypes' gradient belongs to all samples.
    alive = torch.isfinite(x).all(dim=1)
    grad_cosine, grad_n = torch.where(alive, grad_cosine, 0), torch.where(alive, grad_n, 0)
    x, n = torch.where(alive[:, None], x, 0), torch.where(alive, n, float("-inf"))
    if kept is not None and prototypes is None and kept.outlived_them():
        return _gradient_of_kept(kept.exponentials, grad_cosine, grad_n, x, inside[0], n, ctx.scale, ctx.offset)
    if kept is None:
        assert prototypes is not None
        into, kept_rows = torch.empty_like(prototypes, memory_format=torch.contiguous_format), 0
    else:
        into, kept_rows = kept.exponentials, kept.rows
        prototypes = kept.prototypes if prototypes is None else prototypes
        if graph_is_kept():  # another backward pass may want them
            into = into.clone()
        else:
            ctx.kept = None
    call(
        "negative_logsumexp_backward_",
        into,
        grad_cosine,
        grad_n,
        x,
        prototypes,
        *inside,
        n,
        ctx.scale,
        ctx.offset,
        ctx.normalize_prototypes,
        kept_rows,
    )
    return into


def _gradient_of_kept(
    exponentials: Tensor,
    grad_cosine: Tensor,
    grad_n: Tensor,
    x: Tensor,
    targets: Tensor,
    n: Tensor,
    scale: float,
    offset: float,
) -> Tensor:
    """Return dL/dw (M, D) without the prototypes, from the exponentials that forward kept of every sample.

    A backend is free to form them again from the prototypes; here those are gone.
    """
    factor = torch.where(n == float("-inf"), 0, scale * grad_n * torch.exp(offset - n))
    p = torch.where(factor == 0, 0, exponentials[:, : len(x)] * factor)
    inside = (targets >= 0) & (targets < len(p))
    at_target = torch.where(inside, targets, 0).long(), torch.arange(len(x), device=x.device)
    p[at_target] = torch.where(inside, grad_cosine, p[at_target])
    return p @ x


register(
    "negative_logsumexp",
    problems=_problems,
    fake=_fake,
    check_values=_check_values,
    setup_context=_setup_context,
    backward=_backward,
)
register(
    "negative_logsumexp_backward_",
    problems=_backward_problems,
    fake=lambda *_: None,
)
