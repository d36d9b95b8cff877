"""Gradient of the prototypes where each sample meets only a few chosen slots.

    dL/dw_j = sum over the entries e with slot_e = j of g_e x_{i(e)},   g_e = dL/dcos of the entry, i(e) its sample

and for rows that are scaled to unit length first (u = w / |w|), (dL/du - (dL/du . u) u) / |w|. Being linear, this is
applied once to the sum.

The entries (B K) are sorted by slot on the device, stably, so that those of a slot stand side by side in batch order.
One program per entry; the one at the head of a slot's entries adds them up and writes the row, the others end at once.
Every row is written by one program, in a fixed order: deterministic, no atomics, nothing read back by the host. Read
are B K rows of x, written M D zeros and at most B K rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from protomem_kernels.backends.triton import launch
from protomem_kernels.backends.triton.tiles import inverse_length, narrow_gradient, squares


@triton.jit
def chosen_rows_kernel(
    grad_prototypes_ptr,  # (M, D) contiguous, zeros
    sorted_ptr,  # (E,) int64: slots, ascending; negative ones are none
    order_ptr,  # (E,) int64: the entry that each came from
    coefficients_ptr,  # (E,): g
    x_ptr,  # (B, D)
    prototypes_ptr,  # (M, D)
    entries,
    chosen,  # entries per sample
    dim,
    stride_x_row,
    stride_x_column,
    stride_w_row,
    stride_w_column,
    NORMALIZE: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """Add up the entries of one slot; a program whose entry is not the first of its slot has nothing to do."""
    acc_dtype: tl.constexpr = coefficients_ptr.dtype.element_ty
    entry = tl.program_id(0)
    slot = tl.load(sorted_ptr + entry)
    before = tl.load(sorted_ptr + entry - 1, mask=entry > 0, other=-1)
    if (slot >= 0) & (slot != before):
        columns = tl.arange(0, BLOCK_DIM)
        inside = columns < dim
        total = tl.zeros((BLOCK_DIM,), dtype=acc_dtype)
        position = entry
        current = slot
        while current == slot:
            source = tl.load(order_ptr + position)
            x_row = x_ptr + (source // chosen) * stride_x_row
            x = tl.load(x_row + columns.to(tl.int64) * stride_x_column, mask=inside, other=0.0)
            total += tl.load(coefficients_ptr + source) * x
            position += 1
            current = tl.load(sorted_ptr + position, mask=position < entries, other=-1)
        if NORMALIZE:
            w_row = prototypes_ptr + slot * stride_w_row
            w = tl.load(w_row + columns.to(tl.int64) * stride_w_column, mask=inside, other=0.0)
            w = w.to(acc_dtype)[None, :]
            zero = tl.zeros((1,), dtype=acc_dtype)
            unit, squared = squares(w, zero, zero)
            inverse = inverse_length(unit, squared)[:, None]
            direction = w * inverse
            along = tl.sum(total[None, :] * direction, axis=1)[:, None]
            total = tl.sum((total[None, :] - along * direction) * inverse, axis=0)
        out = narrow_gradient(total, grad_prototypes_ptr.dtype.element_ty)
        tl.store(grad_prototypes_ptr + slot * dim + columns, out, mask=inside)


def chosen_rows_backward_(
    grad_prototypes: Tensor, coefficients: Tensor, slots: Tensor, x: Tensor, prototypes: Tensor, normalize: bool
) -> None:
    """Write all of ``grad_prototypes`` (M, D), contiguous, from the gradients of a few cosines.

    Args:
        grad_prototypes: overwritten; zero in rows that nobody chose.
        coefficients: (B, K) in the dtype of ``x``: dL/dcos of each sample's chosen slots.
        slots: (B, K) int64 in [0, M); negative: none.
        x: (B, D) float32 or float64.
        prototypes: (M, D).
        normalize: whether cosines are those of the prototypes scaled to unit length.
    """
    grad_prototypes.zero_()
    if slots.numel() == 0 or grad_prototypes.numel() == 0:
        return
    dim = x.shape[1]
    how = launch.choose("chosen rows", launch.architecture(x.device), prototypes.dtype, dim)
    ordered, order = torch.sort(slots.flatten(), stable=True)
    chosen_rows_kernel[(ordered.shape[0],)](
        grad_prototypes,
        ordered,
        order,
        coefficients.contiguous(),
        x,
        prototypes,
        ordered.shape[0],
        slots.shape[1],
        dim,
        *x.stride(),
        *prototypes.stride(),
        NORMALIZE=normalize,
        BLOCK_DIM=launch.padded(dim),
        **how.options(),
    )
