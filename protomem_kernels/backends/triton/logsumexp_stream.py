"""The kernels of ``negative_logsumexp`` on the whole memory: the stream, and the gradient of the slots.

What they compute is derived in ``backends/reference/negative_logsumexp.py``; the order of the work, what a tile moves
and why the result is deterministic stand in ``negative_logsumexp.py``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from protomem_kernels.backends.triton.logsumexp_samples import LIFT
from protomem_kernels.backends.triton.tiles import (
    LOG2_E,
    at_least_one,
    dot,
    load_form,
    load_present,
    load_rows,
    load_slots,
    load_vector,
    narrow,
    narrow_gradient,
    reshape_hard,
    scalar,
)


@triton.jit
def stream_kernel(
    x_ptr,  # (B, D): the embeddings; with 16-bit factors (HALVES, B, D): their parts, times LIFT
    prototypes_ptr,  # (M, D)
    targets_ptr,  # (B,)
    occupied_ptr,  # (M,), or None: all
    inverse_ptr,  # (M,) contiguous: 1 / |w_j|, if rows are scaled to unit length; else None
    threshold_ptr,  # (B,), or None: no hard-negative form
    coefficients_ptr,  # (3,)
    totals_ptr,  # (S, B) contiguous: each split's sum of exponentials
    maxima_ptr,  # (S, B) contiguous: the exponent of 2 taken out of it; None: ``offset`` is
    moments_ptr,  # (S, B, D) contiguous: the sum of exponentials times h' w; None: not wanted
    batch,
    capacity,
    dim,
    slots_per_split,
    scale: tl.float64,
    offset: tl.float64,
    stride_x_row,
    stride_x_column,
    stride_w_row,
    stride_w_column,
    stride_target,
    stride_occupied,
    stride_threshold,
    stride_coefficient,
    HALVES: tl.constexpr,  # 16-bit parts that stand for one number of x: 2, in "medium" 1; else 1
    TF32: tl.constexpr,  # whether one product of tf32 stands for one of float32
    BLOCK_ROWS: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """Stream one split of the memory past one block of rows."""
    acc_dtype: tl.constexpr = totals_ptr.dtype.element_ty
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    LIFTED: tl.constexpr = dtype.primitive_bitwidth == 16
    RUNNING: tl.constexpr = maxima_ptr is not None
    WHOLE: tl.constexpr = BLOCK_DEPTH == BLOCK_DIM
    CHUNKS: tl.constexpr = 1 if moments_ptr is None else BLOCK_DIM // BLOCK_COLUMNS
    # float16 ends at 2^-24: exponentials are 2^10 at most instead of 1, which leaves room for h' up to 64.
    HEADROOM: tl.constexpr = 10.0 if dtype == tl.float16 else 0.0

    block = tl.program_id(0) // CHUNKS
    chunk = tl.program_id(0) % CHUNKS
    split = tl.program_id(1)
    rows = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    keep = rows < batch
    targets = load_slots(targets_ptr, rows, stride_target, keep, capacity)
    # Both halves of x in one factor: with the tile's rows doubled, one product of full height gives both.
    line = tl.arange(0, HALVES * BLOCK_ROWS)
    stacked = block * BLOCK_ROWS + line % BLOCK_ROWS
    stacked_keep = stacked < batch
    stacked += line // BLOCK_ROWS * batch
    depth = tl.arange(0, BLOCK_DEPTH)
    columns = chunk * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    in_twos = scalar(scale * LOG2_E, acc_dtype)
    to_scaled = in_twos / LIFT if LIFTED else in_twos
    if threshold_ptr is not None:
        tau = in_twos * load_vector(threshold_ptr, rows, stride_threshold, keep).to(acc_dtype)
        a, b, g = load_form(coefficients_ptr, stride_coefficient, acc_dtype)

    total = tl.zeros((BLOCK_ROWS,), dtype=acc_dtype)
    maximum = tl.full((BLOCK_ROWS,), float("-inf"), dtype=acc_dtype)
    shift = scalar(offset * LOG2_E, acc_dtype)
    if moments_ptr is not None:
        moment = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=acc_dtype)
    if WHOLE:
        x = load_rows(x_ptr, stacked, depth, stride_x_row, stride_x_column, stacked_keep, dim)

    first = split * slots_per_split
    last = at_least_one(first, tl.minimum(first + slots_per_split, capacity))
    for start in range(first, last, BLOCK_SLOTS):
        slots = start + tl.arange(0, BLOCK_SLOTS)
        present = load_present(occupied_ptr, slots, stride_occupied, capacity)
        logits = tl.zeros((HALVES * BLOCK_ROWS, BLOCK_SLOTS), dtype=acc_dtype)
        if WHOLE:
            w = load_rows(prototypes_ptr, slots, depth, stride_w_row, stride_w_column, present, dim).to(dtype)
            logits = dot(x, tl.trans(w), logits, TF32)
        else:
            for k in range(0, BLOCK_DIM, BLOCK_DEPTH):
                part = k + depth
                x = load_rows(x_ptr, stacked, part, stride_x_row, stride_x_column, stacked_keep, dim)
                w = load_rows(prototypes_ptr, slots, part, stride_w_row, stride_w_column, present, dim).to(dtype)
                logits = dot(x, tl.trans(w), logits, TF32)
        if HALVES == 2:
            logits = tl.sum(logits.reshape(2, BLOCK_ROWS, BLOCK_SLOTS), axis=0)
        if inverse_ptr is not None:
            inverse = tl.load(inverse_ptr + slots, mask=present, other=0.0)
            y = logits * (inverse * to_scaled)[None, :]
        else:
            y = logits * to_scaled
        if threshold_ptr is not None:
            y, slope = reshape_hard(y, tau[:, None], a, b, g, in_twos)
        y = tl.where(present[None, :] & (slots[None, :] != targets[:, None]), y, float("-inf"))
        if RUNNING:
            if inverse_ptr is not None:  # in the moment stands e / |w|, which must not overflow either
                top = tl.max(y + tl.maximum(tl.log2(tl.where(inverse > 0, inverse, 1.0)), 0.0)[None, :], axis=1)
            else:
                top = tl.max(y, axis=1)
            top = tl.maximum(maximum, top)
            taken = tl.where(top == float("-inf"), 0.0, top)
            rescale = tl.exp2(maximum - taken)
            total = total * rescale
            if moments_ptr is not None:
                moment = moment * rescale[:, None]
            maximum = top
            e = tl.exp2(y - (taken - HEADROOM)[:, None])
        else:
            e = tl.exp2(y - shift)
        total += tl.sum(e, axis=1)
        if moments_ptr is not None:
            if threshold_ptr is not None:
                e = e * slope
            if inverse_ptr is not None:
                e = e * inverse[None, :]
            if WHOLE and CHUNKS == 1:
                values = w
            else:
                values = load_rows(prototypes_ptr, slots, columns, stride_w_row, stride_w_column, present, dim)
            moment = dot(narrow(e, dtype), values.to(dtype), moment, TF32)

    line = split.to(tl.int64) * batch + rows
    if chunk == 0:
        tl.store(totals_ptr + line, total, mask=keep)
        if RUNNING:
            tl.store(maxima_ptr + line, maximum - HEADROOM, mask=keep)
    if moments_ptr is not None:
        mask = keep[:, None] & (columns < dim)[None, :]
        tl.store(moments_ptr + line[:, None] * dim + columns[None, :], moment, mask=mask)


@triton.jit
def gradient_kernel(
    grad_prototypes_ptr,  # (M, D) contiguous
    grad_cosine_ptr,  # (B,)
    grad_n_ptr,  # (B,)
    unit_ptr,  # (1,): with float16 factors, the largest of these gradients; else None
    x_ptr,  # (B, D): the embeddings; with 16-bit factors (HALVES, B, D): their parts, times LIFT
    prototypes_ptr,  # (M, D)
    targets_ptr,  # (B,)
    occupied_ptr,  # (M,), or None: all
    present_ptr,  # (M,): occupied, or somebody's target; or None: all
    inverse_ptr,  # (M,) contiguous: 1 / |w_j|, if rows are scaled to unit length; else None
    threshold_ptr,  # (B,), or None: no hard-negative form
    coefficients_ptr,  # (3,)
    n_ptr,  # (B,)
    batch,
    capacity,
    dim,
    scale: tl.float64,
    stride_x_row,
    stride_x_column,
    stride_w_row,
    stride_w_column,
    stride_target,
    stride_occupied,
    stride_present,
    stride_threshold,
    stride_coefficient,
    HALVES: tl.constexpr,  # 16-bit parts that stand for one number of x: 2, in "medium" 1; else 1
    TF32: tl.constexpr,  # whether one product of tf32 stands for one of float32
    BLOCK_ROWS: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """Stream the batch past one tile of slots, and write the gradient of these."""
    acc_dtype: tl.constexpr = n_ptr.dtype.element_ty
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    LIFTED: tl.constexpr = dtype.primitive_bitwidth == 16
    WHOLE: tl.constexpr = BLOCK_DEPTH == BLOCK_DIM
    CHUNKS: tl.constexpr = BLOCK_DIM // BLOCK_COLUMNS
    slots = tl.program_id(0) // CHUNKS * BLOCK_SLOTS + tl.arange(0, BLOCK_SLOTS)
    inside = slots < capacity
    line = tl.arange(0, HALVES * BLOCK_ROWS)  # both halves of x in one factor
    depth = tl.arange(0, BLOCK_DEPTH)
    columns = tl.program_id(0) % CHUNKS * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    present = load_present(present_ptr, slots, stride_present, capacity)
    negative = load_present(occupied_ptr, slots, stride_occupied, capacity)
    scale = scalar(scale, acc_dtype)
    to_scaled = scale / LIFT if LIFTED else scale
    if threshold_ptr is not None:
        a, b, g = load_form(coefficients_ptr, stride_coefficient, acc_dtype)
    # float16 ends at 2^-24: what it has to hold is scaled to 2^10 at most, which leaves room for h' up to 64.
    unit = scalar(1.0, acc_dtype)
    if unit_ptr is not None:
        unit = 1024.0 / tl.load(unit_ptr)

    if inverse_ptr is not None:
        inverse = tl.load(inverse_ptr + slots, mask=present, other=0.0)
        along = tl.zeros((BLOCK_SLOTS,), dtype=acc_dtype)
    if WHOLE:
        w = load_rows(prototypes_ptr, slots, depth, stride_w_row, stride_w_column, present, dim).to(dtype)
    grad = tl.zeros((BLOCK_SLOTS, BLOCK_COLUMNS), dtype=acc_dtype)
    for start in range(0, at_least_one(0, batch), BLOCK_ROWS):
        rows = start + tl.arange(0, BLOCK_ROWS)
        keep = rows < batch
        stacked = start + line % BLOCK_ROWS
        stacked_keep = stacked < batch
        stacked += line // BLOCK_ROWS * batch
        logits = tl.zeros((BLOCK_SLOTS, HALVES * BLOCK_ROWS), dtype=acc_dtype)
        if WHOLE:
            x = load_rows(x_ptr, stacked, depth, stride_x_row, stride_x_column, stacked_keep, dim)
            logits = dot(w, tl.trans(x), logits, TF32)
        else:
            for k in range(0, BLOCK_DIM, BLOCK_DEPTH):
                part = k + depth
                x = load_rows(x_ptr, stacked, part, stride_x_row, stride_x_column, stacked_keep, dim)
                w = load_rows(prototypes_ptr, slots, part, stride_w_row, stride_w_column, present, dim).to(dtype)
                logits = dot(w, tl.trans(x), logits, TF32)
        if HALVES == 2:
            logits = tl.sum(logits.reshape(BLOCK_SLOTS, 2, BLOCK_ROWS), axis=1)
        if inverse_ptr is not None:
            y = logits * (inverse * to_scaled)[:, None]
            cosine = y
        else:
            y = logits * to_scaled
        if threshold_ptr is not None:
            tau = scale * load_vector(threshold_ptr, rows, stride_threshold, keep).to(acc_dtype)
            y, slope = reshape_hard(y, tau[None, :], a, b, g, scale)
        n = tl.load(n_ptr + rows, mask=keep, other=float("inf"))
        n = tl.where(n == float("-inf"), float("inf"), n)  # no negatives: no probability
        factor = scale * unit * tl.load(grad_n_ptr + rows, mask=keep, other=0.0)
        y = tl.where(negative[:, None], y, float("-inf"))  # before exp, which may overflow at a slot outside n
        # The difference first: it is exact where p is large, while s h log2(e), near 92, would be off by 4e-6.
        p = tl.exp2((y - n[None, :]) * LOG2_E) * factor[None, :]
        if threshold_ptr is not None:
            p = p * slope
        targets = load_slots(targets_ptr, rows, stride_target, keep, capacity)
        share = unit * tl.load(grad_cosine_ptr + rows, mask=keep, other=0.0)
        p = tl.where(slots[:, None] == targets[None, :], share[None, :], p)
        p = narrow(p, dtype)
        if inverse_ptr is not None:  # the gradient's part along the row is sum_i p_ij cos_ij
            along += tl.sum(p.to(acc_dtype) * cosine, axis=1)
        if WHOLE and CHUNKS == 1:
            values = x
        else:
            values = load_rows(x_ptr, stacked, columns, stride_x_row, stride_x_column, stacked_keep, dim)
        if HALVES == 2:
            p = tl.broadcast_to(p[:, None, :], (BLOCK_SLOTS, 2, BLOCK_ROWS)).reshape(BLOCK_SLOTS, 2 * BLOCK_ROWS)
        grad = dot(p, values, grad, TF32)
    if LIFTED:
        grad = grad / LIFT
    if inverse_ptr is not None:
        # (grad - c w) / |w|, c w the part along w. As grad / c - w, one more product of the tile, w need not
        # come into registers beside grad, and its factor, minus one, is exact in every dtype.
        c = along * inverse / scale
        c = tl.where(tl.abs(c) > 1e-30, c, 0.0)
        size = tl.where(c == 0, 1.0, c)
        if WHOLE and CHUNKS == 1:
            own = w
        else:
            own = load_rows(prototypes_ptr, slots, columns, stride_w_row, stride_w_column, present, dim).to(dtype)
        place = tl.arange(0, BLOCK_SLOTS)
        minus = tl.where((place[:, None] == place[None, :]) & (c != 0)[:, None], -1.0, 0.0).to(dtype)
        grad = dot(minus, own, grad / size[:, None]) * (size * inverse)[:, None]
    if unit_ptr is not None:
        grad = grad / unit
    out = narrow_gradient(grad, grad_prototypes_ptr.dtype.element_ty)
    offsets = slots.to(tl.int64)[:, None] * dim + columns[None, :]
    tl.store(grad_prototypes_ptr + offsets, out, mask=inside[:, None] & (columns < dim)[None, :])
