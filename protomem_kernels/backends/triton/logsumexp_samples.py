"""What ``negative_logsumexp`` does for each sample around the stream: targets and 16-bit parts before, sums after.

The mathematics stands in ``backends/reference/negative_logsumexp.py``, why x is split in ``negative_logsumexp.py``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from protomem_kernels.backends import precision
from protomem_kernels.backends.triton import launch
from protomem_kernels.backends.triton.tiles import (
    LN_2,
    inverse_length,
    load_rows,
    load_slots,
    narrow,
    scalar,
    squares,
)

# 16-bit factors are x times this, so that the rest of x after rounding is no subnormal number of float16.
LIFT = tl.constexpr(256.0)


@triton.jit
def split_rows(x, parts_ptr, batch, rows, columns, keep, dim, PARTS: tl.constexpr):
    """Write LIFT x as the sum of some 16-bit numbers, the largest first: ``parts`` (PARTS, B, D) contiguous."""
    dtype: tl.constexpr = parts_ptr.dtype.element_ty
    offsets = rows.to(tl.int64)[:, None] * dim + columns[None, :]
    mask = keep[:, None] & (columns < dim)[None, :]
    rest = x * LIFT
    for part in tl.static_range(PARTS):
        number = narrow(rest, dtype)
        tl.store(parts_ptr + tl.cast(batch, tl.int64) * dim * part + offsets, number, mask=mask)
        rest -= number.to(x.dtype)


@triton.jit
def target_kernel(
    x_ptr,  # (B, D)
    prototypes_ptr,  # (M, D)
    targets_ptr,  # (B,)
    cosine_ptr,  # (B,)
    target_rows_ptr,  # (B, D) contiguous
    parts_ptr,  # (PARTS, B, D) contiguous, or None: no 16-bit factors are wanted
    batch,
    capacity,
    dim,
    stride_x_row,
    stride_x_column,
    stride_w_row,
    stride_w_column,
    stride_target,
    NORMALIZE: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """Gather each sample's target row, and multiply: c and dc/dx; split x where the products want 16-bit factors."""
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.arange(0, BLOCK_DIM)
    keep = rows < batch
    x = load_rows(x_ptr, rows, columns, stride_x_row, stride_x_column, keep, dim)
    targets = load_slots(targets_ptr, rows, stride_target, keep, capacity)
    w = load_rows(prototypes_ptr, targets, columns, stride_w_row, stride_w_column, targets >= 0, dim).to(x.dtype)
    if NORMALIZE:
        zero = tl.zeros((BLOCK_ROWS,), dtype=x.dtype)
        length_unit, squared = squares(w, zero, zero)
        w = w * inverse_length(length_unit, squared)[:, None]
    tl.store(cosine_ptr + rows, tl.sum(x * w, axis=1), mask=keep)
    offsets = rows.to(tl.int64)[:, None] * dim + columns[None, :]
    tl.store(target_rows_ptr + offsets, w, mask=keep[:, None] & (columns < dim)[None, :])
    if parts_ptr is not None:
        split_rows(x, parts_ptr, batch, rows, columns, keep, dim, PARTS)


@triton.jit
def split_kernel(
    x_ptr,  # (B, D)
    parts_ptr,  # (PARTS, B, D) contiguous
    batch,
    dim,
    stride_x_row,
    stride_x_column,
    PARTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """Split x into 16-bit factors."""
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.arange(0, BLOCK_DIM)
    x = load_rows(x_ptr, rows, columns, stride_x_row, stride_x_column, rows < batch, dim)
    split_rows(x, parts_ptr, batch, rows, columns, rows < batch, dim, PARTS)


@triton.jit
def reduction_kernel(
    totals_ptr,  # (S, B) contiguous
    maxima_ptr,  # (S, B) contiguous, or None
    moments_ptr,  # (S, B, D) contiguous, or None
    n_ptr,  # (B,)
    o_ptr,  # (B, D) contiguous
    x_ptr,  # (B, D)
    parts_ptr,  # (PARTS, B, D) contiguous, or None: no 16-bit factors
    batch,
    dim,
    splits,
    scale: tl.float64,
    offset: tl.float64,
    stride_x_row,
    stride_x_column,
    PARTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """Add the splits in order: n = log(sum) and o = s moment / sum."""
    acc_dtype: tl.constexpr = totals_ptr.dtype.element_ty
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.arange(0, BLOCK_DIM)
    keep = rows < batch
    mask = keep[:, None] & (columns < dim)[None, :]
    shift = tl.zeros((BLOCK_ROWS,), dtype=acc_dtype)
    if maxima_ptr is not None:
        maximum = tl.full((BLOCK_ROWS,), float("-inf"), dtype=acc_dtype)
        for split in range(splits):
            line = tl.cast(split, tl.int64) * batch + rows
            maximum = tl.maximum(maximum, tl.load(maxima_ptr + line, mask=keep, other=float("-inf")))
        shift = tl.where(maximum == float("-inf"), 0.0, maximum)
    total = tl.zeros((BLOCK_ROWS,), dtype=acc_dtype)
    moment = tl.zeros((BLOCK_ROWS, BLOCK_DIM), dtype=acc_dtype)
    for split in range(splits):
        line = tl.cast(split, tl.int64) * batch + rows
        weight = tl.full((BLOCK_ROWS,), 1.0, dtype=acc_dtype)
        if maxima_ptr is not None:
            weight = tl.exp2(tl.load(maxima_ptr + line, mask=keep, other=float("-inf")) - shift)
        total += weight * tl.load(totals_ptr + line, mask=keep, other=0.0)
        if moments_ptr is not None:
            part = tl.load(moments_ptr + line[:, None] * dim + columns[None, :], mask=mask, other=0.0)
            moment += weight[:, None] * part
    some = total != 0
    n = tl.where(some, tl.log(tl.where(some, total, 1.0)) + (shift * LN_2 + scalar(offset, acc_dtype)), float("-inf"))
    if moments_ptr is not None:
        o = moment * tl.where(some, scalar(scale, acc_dtype) / tl.where(some, total, 1.0), 0.0)[:, None]
        offsets = rows.to(tl.int64)[:, None] * dim + columns[None, :]
        tl.store(o_ptr + offsets, o, mask=mask)
        if parts_ptr is not None:  # what the parts leave of x (of two 2^-18) counts to first order: dn/dx = o
            rest = load_rows(x_ptr, rows, columns, stride_x_row, stride_x_column, keep, dim)
            for part in tl.static_range(PARTS):
                place = parts_ptr + tl.cast(batch, tl.int64) * dim * part + offsets
                rest -= tl.load(place, mask=mask, other=0.0).to(acc_dtype) / LIFT
            n += tl.sum(rest * o, axis=1)
    tl.store(n_ptr + rows, n, mask=keep)


def parts_of(x: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Return memory for the 16-bit parts (PARTS, B, D) of ``x``, or None where products take ``x`` as it is."""
    if dtype in (torch.float32, torch.float64):
        return None
    return x.new_empty(precision.halves(dtype), *x.shape, dtype=dtype)


def launch_targets(
    x: Tensor, prototypes: Tensor, targets: Tensor, normalize: bool, parts: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return c (B,) and the target rows (B, D); fill ``parts``, if given."""
    batch, dim = x.shape
    cosine, target_rows = x.new_empty(batch), x.new_empty(batch, dim)
    how = launch.choose("targets", launch.architecture(x.device), launch.compute_dtype(x, prototypes), dim)
    if batch:
        target_kernel[(triton.cdiv(batch, how.rows),)](
            x,
            prototypes,
            targets,
            cosine,
            target_rows,
            parts,
            batch,
            prototypes.shape[0],
            dim,
            *x.stride(),
            *prototypes.stride(),
            targets.stride(0),
            NORMALIZE=normalize,
            PARTS=1 if parts is None else len(parts),
            BLOCK_ROWS=how.rows,
            BLOCK_DIM=launch.padded(dim),
            **how.options(),
        )
    return cosine, target_rows


def split_into(parts: Tensor, x: Tensor) -> Tensor:
    """Fill ``parts`` (PARTS, B, D) with 16-bit numbers whose sum is LIFT ``x``, and return it."""
    batch, dim = x.shape
    how = launch.choose("targets", launch.architecture(x.device), parts.dtype, dim)
    if batch:
        split_kernel[(triton.cdiv(batch, how.rows),)](
            x,
            parts,
            batch,
            dim,
            *x.stride(),
            PARTS=len(parts),
            BLOCK_ROWS=how.rows,
            BLOCK_DIM=launch.padded(dim),
            **how.options(),
        )
    return parts


def launch_reduction(
    x: Tensor,
    parts: Tensor | None,
    totals: Tensor,
    maxima: Tensor | None,
    moments: Tensor | None,
    scale: float,
    offset: float,
) -> tuple[Tensor, Tensor]:
    """Add the splits (S, ...) in order: return n (B,) and o (B, D), or an empty o without ``moments``."""
    (batch, dim), splits = x.shape, len(totals)
    n = x.new_empty(batch)
    o = x.new_empty(0, 0) if moments is None else x.new_empty(batch, dim)
    dtype = x.dtype if parts is None else parts.dtype
    how = launch.choose("reduction", launch.architecture(x.device), dtype, dim)
    reduction_kernel[(triton.cdiv(batch, how.rows),)](
        totals,
        maxima,
        moments,
        n,
        o,
        x,
        parts,
        batch,
        dim,
        splits,
        scale,
        offset,
        *x.stride(),
        PARTS=1 if parts is None else len(parts),
        BLOCK_ROWS=how.rows,
        BLOCK_DIM=1 if moments is None else launch.padded(dim),
        **how.options(),
    )
    return n, o
