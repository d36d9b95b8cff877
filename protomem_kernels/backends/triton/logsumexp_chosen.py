"""``negative_logsumexp`` where each sample meets a few chosen negatives: a program per sample gathers their rows.

Forward it sums with a running maximum; backward it writes the gradients of the cosines, which ``chosen_rows.py`` takes
to the prototypes. What is computed is derived in ``backends/reference/negative_logsumexp.py``.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from protomem_kernels.backends.triton import launch
from protomem_kernels.backends.triton.tiles import (
    LOG2_E,
    inverse_length,
    load_form,
    load_rows,
    load_slots,
    reshape_hard,
    scalar,
    squares,
)


@triton.jit
def load_chosen(negatives_ptr, row, index, stride_row, stride_column, count, target, capacity):
    """Return the slots of a sample that count as negatives; -1: none."""
    inside = index < count
    slots = load_slots(negatives_ptr + row.to(tl.int64) * stride_row, index, stride_column, inside, capacity)
    return tl.where(slots == target, -1, slots)


@triton.jit
def chosen_kernel(
    x_ptr,  # (B, D)
    prototypes_ptr,  # (M, D)
    targets_ptr,  # (B,)
    negatives_ptr,  # (B, K)
    threshold_ptr,  # (B,), or None: no hard-negative form
    coefficients_ptr,  # (3,)
    n_ptr,  # (B,): written in the forward pass, read in the backward pass
    o_ptr,  # (B, D) contiguous, or None: not wanted
    grad_cosine_ptr,  # (B,), or None: this is the forward pass
    grad_n_ptr,  # (B,)
    slots_ptr,  # (B, K + 1) contiguous int64: written in the backward pass, the sample's negatives and its target
    grads_ptr,  # (B, K + 1) contiguous: written in the backward pass, the gradients of their cosines
    capacity,
    dim,
    count,
    scale: tl.float64,
    stride_x_row,
    stride_x_column,
    stride_w_row,
    stride_w_column,
    stride_target,
    stride_negative_row,
    stride_negative_column,
    stride_threshold,
    stride_coefficient,
    NORMALIZE: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """Meet one sample with its chosen negatives, gathered; sums with a running maximum, or gradients from n."""
    acc_dtype: tl.constexpr = n_ptr.dtype.element_ty
    FORWARD: tl.constexpr = grad_cosine_ptr is None
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK_DIM)
    x = load_rows(
        x_ptr, row + tl.arange(0, 1), columns, stride_x_row, stride_x_column, tl.full((1,), True, tl.int1), dim
    )
    target = tl.load(targets_ptr + row.to(tl.int64) * stride_target).to(tl.int64)
    target = tl.where((target >= 0) & (target < capacity), target, -1)
    scale = scalar(scale, acc_dtype)
    if threshold_ptr is not None:
        tau = scale * tl.load(threshold_ptr + row.to(tl.int64) * stride_threshold).to(acc_dtype)
        a, b, g = load_form(coefficients_ptr, stride_coefficient, acc_dtype)
    if FORWARD:
        total = scalar(0.0, acc_dtype)
        maximum = scalar(float("-inf"), acc_dtype)
        moment = tl.zeros((BLOCK_DIM,), dtype=acc_dtype)
    else:
        line = row.to(tl.int64) * (count + 1)
        n = tl.load(n_ptr + row)
        n = tl.where(n == float("-inf"), float("inf"), n)  # no negatives: no probability
        factor = scale * tl.load(grad_n_ptr + row)
        tl.store(slots_ptr + line + count, target)
        tl.store(grads_ptr + line + count, tl.load(grad_cosine_ptr + row))
    for start in range(0, count, BLOCK_SLOTS):
        index = start + tl.arange(0, BLOCK_SLOTS)
        slots = load_chosen(
            negatives_ptr, row, index, stride_negative_row, stride_negative_column, count, target, capacity
        )
        w = load_rows(prototypes_ptr, slots, columns, stride_w_row, stride_w_column, slots >= 0, dim).to(acc_dtype)
        if NORMALIZE:
            zero = tl.zeros((BLOCK_SLOTS,), dtype=acc_dtype)
            length_unit, squared = squares(w, zero, zero)
            w = w * inverse_length(length_unit, squared)[:, None]
        y = tl.sum(w * x, axis=1) * scale
        if threshold_ptr is not None:
            y, slope = reshape_hard(y, tau, a, b, g, scale)
        y = tl.where(slots >= 0, y, float("-inf"))
        if FORWARD:
            top = tl.maximum(maximum, tl.max(y, axis=0))
            shift = tl.where(top == float("-inf"), 0.0, top)
            rescale = tl.exp2((maximum - shift) * LOG2_E)
            e = tl.exp2((y - shift) * LOG2_E)
            total = total * rescale + tl.sum(e, axis=0)
            maximum = top
            if o_ptr is not None:
                if threshold_ptr is not None:
                    e = e * slope
                moment = moment * rescale + tl.sum(e[:, None] * w, axis=0)
        else:
            p = tl.exp2((y - n) * LOG2_E) * factor
            if threshold_ptr is not None:
                p = p * slope
            tl.store(slots_ptr + line + index, slots, mask=index < count)
            tl.store(grads_ptr + line + index, p, mask=index < count)
    if FORWARD:
        some = total != 0
        tl.store(n_ptr + row, tl.where(some, tl.log(tl.where(some, total, 1.0)) + maximum, float("-inf")))
        if o_ptr is not None:
            factor = tl.where(some, scale / tl.where(some, total, 1.0), 0.0)
            tl.store(o_ptr + row.to(tl.int64) * dim + columns, moment * factor, mask=columns < dim)


def stride(vector: Tensor | None) -> int:
    """Return the stride of a vector; without one, any number will do."""
    return 1 if vector is None else vector.stride(0)


def launch_chosen(
    x: Tensor,
    prototypes: Tensor,
    targets: Tensor,
    negatives: Tensor,
    threshold: Tensor | None,
    coefficients: Tensor | None,
    scale: float,
    normalize: bool,
    *,
    n: Tensor,
    o: Tensor | None = None,
    grad_cosine: Tensor | None = None,
    grad_n: Tensor | None = None,
    slots: Tensor | None = None,
    grads: Tensor | None = None,
) -> None:
    """Launch ``chosen_kernel``: forward (n, o) or, given gradients, backward (slots, grads)."""
    dim = x.shape[1]
    how = launch.choose("chosen negatives", launch.architecture(x.device), prototypes.dtype, dim)
    chosen_kernel[(x.shape[0],)](
        x,
        prototypes,
        targets,
        negatives,
        threshold,
        coefficients,
        n,
        o,
        grad_cosine,
        grad_n,
        slots,
        grads,
        prototypes.shape[0],
        dim,
        negatives.shape[1],
        scale,
        *x.stride(),
        *prototypes.stride(),
        targets.stride(0),
        *negatives.stride(),
        stride(threshold),
        stride(coefficients),
        NORMALIZE=normalize,
        BLOCK_SLOTS=how.slots,
        BLOCK_DIM=launch.padded(dim),
        **how.options(),
    )
